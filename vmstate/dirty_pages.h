// Which pages of RAM to write again: those that changed since they were written.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

namespace qvmstate::vmstate {

/// A bitmap for each block: bit n % 64 of words[b][n / 64] is page n of block b; a null pointer: no
/// page of the block. The words are somebody else's, and must stay as they are. Threads: any.
class DirtyPages {
 public:
  explicit DirtyPages(std::span<const uint64_t *const> words) : words_(words) {}

  bool has(size_t block, uint64_t page) const {
    return words_[block] != nullptr && (words_[block][page / 64] >> page % 64 & 1) != 0;
  }
  /// The first dirty page in [page, end), or `end`.
  uint64_t first_dirty(size_t block, uint64_t page, uint64_t end) const {
    return words_[block] == nullptr ? end : first_bit(block, page, end, 0);
  }
  /// The first page in [page, end) that is not dirty, or `end`. Precondition: the block has a
  /// bitmap.
  uint64_t first_clean(size_t block, uint64_t page, uint64_t end) const {
    return first_bit(block, page, end, ~uint64_t{0});
  }
  /// How many of a block's first `end` pages are dirty.
  uint64_t count(size_t block, uint64_t end) const {
    uint64_t pages = 0;
    for (uint64_t page = first_dirty(block, 0, end); page < end;) {
      const uint64_t clean = first_clean(block, page, end);
      pages += clean - page;
      page = first_dirty(block, clean, end);
    }
    return pages;
  }

 private:
  /// `flip`: what turns the bits looked for into ones.
  uint64_t first_bit(size_t block, uint64_t page, uint64_t end, uint64_t flip) const {
    while (page < end) {
      const uint64_t rest = (words_[block][page / 64] ^ flip) >> page % 64;
      if (rest != 0) {
        return std::min(end, page + static_cast<uint64_t>(std::countr_zero(rest)));
      }
      page = (page / 64 + 1) * 64;
    }
    return end;
  }

  std::span<const uint64_t *const> words_;
};

}  // namespace qvmstate::vmstate
