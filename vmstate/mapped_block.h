// A RAM block in the mapped-ram layout: a bitmap with a bit for each page, and a region in which
// page n stands at n times the page size.
//
// A set bit says that the page is stored; what lies in the region under a clear bit is stale, and
// the page is zero. Words of the bitmap are in the order of the host that wrote it, which is taken
// to be little-endian: page n is bit n % 8 of byte n / 8.
// Source of the facts: QEMU docs/devel/migration/mapped-ram.rst.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "qcow2/io/offsets.h"
#include "qcow2/io/result.h"
#include "vmstate/stream_source.h"

namespace qvmstate::vmstate {

/// Offsets are those of the source: of a whole migration file, wherever in it the stream begins.
struct MappedBlock {
  uint64_t page_bytes = 0;
  StreamOffset bitmap_offset;
  StreamOffset pages_offset;
};

/// Whole words of 64 bits.
constexpr uint64_t mapped_bitmap_bytes(uint64_t pages) {
  return divide_up(pages, 64) * 8;
}

/// Whole pages of a block that either all have data or all are zero.
struct MappedRun {
  bool has_data = false;
  uint64_t bytes = 0;
};

/// Tells which pages of a block have data. A page has none if its bit is clear or if the source
/// knows that it stores nothing there (a zero cluster, a hole).
///
/// The bitmap is read in small windows, so memory does not depend on the size of the block.
/// Threads: one at a time, that of the source.
class MappedBlockMap {
 public:
  /// Precondition: the regions lie in the source, as read_stream() checks; used_bytes is a multiple
  /// of the page size. The source must outlive this.
  MappedBlockMap(StreamSource &source, const MappedBlock &block, uint64_t used_bytes);
  /// From `offset` on, at most `bytes_max`, both multiples of the page size; at least one page.
  Result<MappedRun> run_at(uint64_t offset, uint64_t bytes_max);

 private:
  struct Bits {
    bool set;
    uint64_t pages;
  };
  Result<MappedRun> next_run(uint64_t offset, uint64_t bytes_max);
  Result<MappedRun> stored_run(uint64_t offset, uint64_t bytes);
  Result<Bits> bits_at(uint64_t page, uint64_t pages_max);
  Result<void> load_window(uint64_t word);

  StreamSource &source_;
  MappedBlock block_;
  uint64_t bitmap_bytes_;
  std::vector<uint64_t> window_;  ///< words of the bitmap, native order
  uint64_t window_start_ = 0;     ///< word index of the first
};

}  // namespace qvmstate::vmstate
