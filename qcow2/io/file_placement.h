// A plain file as the place of a stream: byte 0 of the stream at an offset of the file. Streams at
// fixed offsets count them from the start of the file (mapped-ram).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "qcow2/io/placement.h"

namespace qvmstate::io {

class FilePlacement : public Placement, public FixedPlacement {
 public:
  explicit FilePlacement(uint64_t offset) : offset_(offset) {}

  Result<void> place(StreamOffset from, uint64_t bytes, std::vector<HostRun> &runs) override {
    runs.push_back({HostOffset(offset_ + from.value), bytes});
    return {};
  }
  uint64_t unit_bytes() const override { return 4096; }

  Result<void> place_at(std::span<const StreamRange> ranges, std::vector<HostRun> &runs) override {
    for (const StreamRange &range : ranges) {
      runs.push_back({HostOffset(range.from.value), range.bytes});
    }
    return {};
  }
  uint64_t place_unit_bytes() const override { return 4096; }

 private:
  uint64_t offset_;
};

}  // namespace qvmstate::io
