// Finding where the FULL sections of a stream end.
//
// A device's bytes carry no length. A section ends at the first footer (7e and its own id) that is
// followed by something that can follow: the header of another FULL section, or what the caller
// says closes the run. A footer-like pattern inside a body may pass that test by accident or by a
// guest's malice; then a later section cannot be closed, and the search goes back to the next
// candidate. The work is bounded, so no bytes keep it busy for long.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "qcow2/io/result.h"
#include "vmstate/device_sections.h"

namespace qvmstate::vmstate {

constexpr size_t device_sections_max = 16384;    // 4 a vCPU and one a device leave ample room
constexpr uint32_t section_version_max = 65535;  // QEMU counts versions up from 0, one a change
constexpr size_t section_idstr_bytes_max = 255;  // format: u8 length
constexpr size_t section_footer_bytes = 5;

/// The header of a START or FULL section: type, id, idstr, instance, version.
struct SectionHeader {
  uint8_t type = 0;
  uint32_t id = 0;
  std::string_view idstr;  ///< into the bytes
  uint32_t instance = 0;
  uint32_t version = 0;
  size_t bytes = 0;  ///< of the header: the body starts after them
};

/// The header at `at`, if its type is START or FULL and everything in it is plausible.
std::optional<SectionHeader> parse_section_header(std::span<const std::byte> bytes, size_t at);

/// Says whether what stands at `at`, directly after a footer, closes the run of FULL sections.
using RunEnd = std::function<bool(size_t at)>;

struct SectionRun {
  std::vector<DeviceSection> sections;
  size_t end = 0;  ///< of the last footer
};

/// Splits the FULL sections from `start` on, which must be a section header.
Result<SectionRun> split_section_run(std::span<const std::byte> bytes, size_t start,
                                     const RunEnd &is_run_end);

}  // namespace qvmstate::vmstate
