// RAM that is given back to the kernel as it is saved (QVMSTATE_SAVE_MAY_FREE).
//
// What was written is told in pieces, each byte once; a page of the host is freed when all of it
// was.
//
// Threads: any.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "plugin/abi/host_ram.h"

namespace qvmstate::abi {

class PageRelease {
 public:
  explicit PageRelease(std::span<const HostBlock> blocks);
  /// These bytes of the block are in the image.
  void landed(size_t block, uint64_t offset, uint64_t bytes);
  uint64_t freed_bytes() const { return freed_bytes_; }

 private:
  struct Block {
    HostBlock ram;
    std::unique_ptr<std::atomic<uint64_t>[]> landed_bytes;  ///< of each host page
  };
  void free(const HostBlock &ram, uint64_t offset, uint64_t bytes);

  std::vector<Block> blocks_;
  std::atomic<uint64_t> freed_bytes_ = 0;
};

}  // namespace qvmstate::abi
