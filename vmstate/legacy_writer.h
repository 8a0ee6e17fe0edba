// Where a page becomes bytes: the legacy stream, written in one pass over stopped RAM.
//
// File header; configuration section; "ram" START (block list), PART (one PAGE or ZERO record for
// every page of every block), END; the device sections as QEMU wrote them; EOF; vmdescription.
// Every page gets a record, because a hot loadvm leaves a page stale that has none. Loads in every
// QEMU since 2.4.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>

#include "qcow2/io/result.h"
#include "qcow2/io/stream_buffer.h"
#include "vmstate/device_sections.h"
#include "vmstate/ram_source.h"

namespace qvmstate::vmstate {

struct StreamConfiguration {
  std::string machine_type;                  ///< resolved, for example "pc-i440fx-7.2"
  std::optional<uint32_t> target_page_bits;  ///< written where the loader demands it (arm virt)
  uint64_t page_bytes = 4096;                ///< target page size
};

struct StreamStats {
  uint64_t stream_bytes = 0;
  uint64_t ram_bytes = 0;  ///< of all blocks
  uint64_t data_pages = 0;
  uint64_t zero_pages = 0;       ///< read and found zero
  uint64_t untouched_pages = 0;  ///< not read at all
  uint64_t copied_bytes = 0;     ///< RAM bytes copied by this process
};

/// Called now and then with the RAM bytes dealt with so far; an error (cancelled) stops the writer.
using RamHook = std::function<Result<void>(uint64_t ram_bytes_done)>;

/// Writes all of it and finishes `out`.
Result<StreamStats> write_legacy_stream(io::StreamBuffer &out,
                                        const StreamConfiguration &configuration, RamSource &ram,
                                        std::span<const DeviceSection> devices,
                                        const RamHook &hook);

}  // namespace qvmstate::vmstate
