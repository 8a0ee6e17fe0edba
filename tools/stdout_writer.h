// Bytes at ascending offsets to standard output; what is left out comes as zeros.
//
// Threads: one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "qcow2/io/result.h"

namespace qvmstate::tools {

class StdoutWriter {
 public:
  /// Refuses an offset before the end of what was written.
  Result<void> write(uint64_t offset, std::span<const std::byte> data);
  Result<void> fill_up_to(uint64_t offset);

 private:
  uint64_t position_ = 0;
};

}  // namespace qvmstate::tools
