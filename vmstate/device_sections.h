// The device state that QEMU's xen-save-devices-state writes, split into its sections.
//
// The bytes are: file header, FULL sections each closed by a footer, EOF. They carry no lengths; a
// section ends where its own footer is followed by a valid next section header or by the end mark.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "qcow2/io/result.h"

namespace qvmstate::vmstate {

struct DeviceSection {
  uint32_t id = 0;
  std::string idstr;
  uint32_t instance = 0;
  uint32_t version = 0;
  std::span<const std::byte> body;   ///< into the bytes that were parsed
  std::span<const std::byte> whole;  ///< type byte to footer
};

/// Splits; refuses anything that does not end in the end mark exactly at the last byte, more than
/// device_sections_max sections (section_scan.h), and sections without footer (machine types up to
/// 2.3).
/// The bytes must outlive the result.
Result<std::vector<DeviceSection>> split_device_sections(std::span<const std::byte> bytes);

/// The VM clock in nanoseconds as savevm records it: the third field of section "timer", and under
/// -icount shift=auto the instruction count. not_supported under -icount with a fixed shift, which
/// the device state does not tell.
Result<uint64_t> vm_clock_nanos(std::span<const DeviceSection> sections);

/// The vmdescription JSON: the configuration section and these device sections, in stream order,
/// with name, instance, version and size, one buffer field each, so that readers can walk the
/// stream. As in QEMU's own, the RAM section is not listed: its records say where it ends.
std::string format_vmdescription(const std::string &machine_type,
                                 std::optional<uint32_t> target_page_bits, uint64_t page_bytes,
                                 std::span<const DeviceSection> sections);

}  // namespace qvmstate::vmstate
