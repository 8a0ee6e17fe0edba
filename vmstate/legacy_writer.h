// Where a page becomes bytes: the legacy stream, written from its first byte to its last.
//
// File header; configuration section; device sections that are loaded before RAM; "ram" START
// (block list); "ram" PART (one PAGE or ZERO record for every page of every block), and for a VM
// that runs meanwhile one more PART a round, with the pages that changed; "ram" END; the other
// device sections; EOF; vmdescription. Every page gets a record, because a hot loadvm leaves a page
// stale that has none; of several records the last one counts. Loads in every QEMU since 2.4.
//
// Threads: one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "qcow2/io/result.h"
#include "qcow2/io/stream_buffer.h"
#include "vmstate/device_sections.h"
#include "vmstate/dirty_pages.h"
#include "vmstate/ram_source.h"
#include "vmstate/stream_parts.h"

namespace qvmstate::vmstate {

class LegacyWriter {
 public:
  /// Puts all that comes before the pages. `out` and the bytes of the sections must outlive the
  /// writer.
  static Result<LegacyWriter> begin(io::StreamBuffer &out, const StreamConfiguration &configuration,
                                    std::span<const RamBlock> blocks,
                                    std::span<const DeviceSection> before_ram);
  /// Puts every page, or in a later round those of `dirty`. `ram` has the blocks of begin().
  Result<void> put_pages(RamSource &ram, const RamHook &hook, const DirtyPages *dirty = nullptr);
  /// Puts the rest and finishes the stream's buffer.
  Result<StreamStats> finish(std::span<const DeviceSection> after_ram);

 private:
  LegacyWriter(io::StreamBuffer &out, const StreamConfiguration &configuration,
               std::span<const RamBlock> blocks, std::span<const DeviceSection> before_ram);
  class Round;

  io::StreamBuffer *out_;
  StreamConfiguration configuration_;
  std::vector<RamBlock> blocks_;
  LoadOrder devices_;
  uint64_t start_;                  // position of the first byte
  std::vector<std::byte> scratch_;  // a page with its record
  StreamStats stats_;
};

/// All of it, with the pages of stopped RAM.
Result<StreamStats> write_legacy_stream(io::StreamBuffer &out,
                                        const StreamConfiguration &configuration, RamSource &ram,
                                        const LoadOrder &devices, const RamHook &hook);

}  // namespace qvmstate::vmstate
