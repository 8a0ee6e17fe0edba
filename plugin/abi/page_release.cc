#include "plugin/abi/page_release.h"

#include <sys/mman.h>

#include <algorithm>

#include "qcow2/io/offsets.h"

namespace qvmstate::abi {
namespace {

// Pieces are of guest pages, which hold whole host pages of this size.
constexpr uint64_t small_page_bytes = 4096;

}  // namespace

PageRelease::PageRelease(std::span<const HostBlock> blocks) {
  for (const HostBlock &ram : blocks) {
    Block block{ram, nullptr};
    if (ram.page_bytes > small_page_bytes) {
      const uint64_t pages = divide_up(ram.bytes, ram.page_bytes);
      block.landed_bytes = std::make_unique<std::atomic<uint64_t>[]>(pages);
    }
    blocks_.push_back(std::move(block));
  }
}

void PageRelease::landed(size_t block, uint64_t offset, uint64_t bytes) {
  Block &known = blocks_[block];
  const uint64_t page_bytes = known.ram.page_bytes;
  if (known.landed_bytes == nullptr) {
    free(known.ram, offset, bytes);
    return;
  }
  for (const uint64_t end = offset + bytes; offset < end;) {
    const uint64_t page = offset / page_bytes;
    const uint64_t part = std::min(end, (page + 1) * page_bytes) - offset;
    if (known.landed_bytes[page].fetch_add(part) + part == page_bytes) {
      free(known.ram, page * page_bytes, page_bytes);
    }
    offset += part;
  }
}

/// Locked memory stays, which is no harm.
void PageRelease::free(const HostBlock &ram, uint64_t offset, uint64_t bytes) {
  if (::madvise(ram.address + offset, bytes, MADV_DONTNEED) == 0) {
    freed_bytes_ += bytes;
  }
}

}  // namespace qvmstate::abi
