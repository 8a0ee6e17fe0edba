#include "vmstate/mapped_block.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <optional>
#include <span>

namespace qvmstate::vmstate {

namespace {

constexpr uint64_t word_bits = 64;
// 64 KiB of bitmap tell of 2 GiB of RAM in pages of 4 KiB.
constexpr uint64_t window_words_max = 64 * kib / 8;

}  // namespace

MappedBlockMap::MappedBlockMap(StreamSource &source, const MappedBlock &block, uint64_t used_bytes)
    : source_(source),
      block_(block),
      bitmap_bytes_(mapped_bitmap_bytes(used_bytes / block.page_bytes)) {
  assert(used_bytes % block.page_bytes == 0);
}

Result<MappedRun> MappedBlockMap::run_at(uint64_t offset, uint64_t bytes_max) {
  assert(bytes_max > 0 && (offset | bytes_max) % block_.page_bytes == 0);
  QV_ASSIGN(MappedRun run, next_run(offset, bytes_max));
  while (!run.has_data && run.bytes < bytes_max) {
    QV_ASSIGN(const MappedRun next, next_run(offset + run.bytes, bytes_max - run.bytes));
    if (next.has_data) {
      break;
    }
    run.bytes += next.bytes;
  }
  return run;
}

/// One kind, but perhaps not all of it.
Result<MappedRun> MappedBlockMap::next_run(uint64_t offset, uint64_t bytes_max) {
  const uint64_t page_bytes = block_.page_bytes;
  QV_ASSIGN(const Bits bits, bits_at(offset / page_bytes, bytes_max / page_bytes));
  if (bits.set) {
    return stored_run(offset, bits.pages * page_bytes);
  }
  return MappedRun{false, bits.pages * page_bytes};
}

/// Of pages whose bits are set, the first ones that are of one kind. What is stored may begin and
/// end inside pages: clusters can be smaller.
Result<MappedRun> MappedBlockMap::stored_run(uint64_t offset, uint64_t bytes) {
  const uint64_t page_bytes = block_.page_bytes;
  std::optional<uint64_t> zeros_from;
  for (uint64_t at = 0;;) {
    StreamRun run;
    if (at < bytes) {
      QV_ASSIGN(run, source_.run_at(block_.pages_offset + offset + at, bytes - at));
      assert(run.bytes > 0 && run.bytes <= bytes - at);
    }
    if (at < bytes && run.kind == StreamRun::Kind::zeros) {
      zeros_from = zeros_from.value_or(at);
    } else {
      if (zeros_from) {
        const uint64_t from = round_up(*zeros_from, page_bytes);
        const uint64_t to = round_down(at, page_bytes);
        if (from < to) {
          return from == 0 ? MappedRun{false, to} : MappedRun{true, from};
        }
        zeros_from.reset();
      }
      if (at == bytes) {
        return MappedRun{true, bytes};
      }
    }
    at += run.bytes;
  }
}

/// The bit of `page`, and how many from there on are the same; perhaps not all of them.
Result<MappedBlockMap::Bits> MappedBlockMap::bits_at(uint64_t page, uint64_t pages_max) {
  uint64_t word = page / word_bits;
  if (word < window_start_ || word - window_start_ >= window_.size()) {
    const uint64_t at = word * 8;
    QV_ASSIGN(const StreamRun run, source_.run_at(block_.bitmap_offset + at, bitmap_bytes_ - at));
    if (run.kind == StreamRun::Kind::zeros && run.bytes >= 8) {
      return Bits{false, std::min(pages_max, run.bytes / 8 * word_bits - page % word_bits)};
    }
    QV_TRY(load_window(word));
  }
  const auto word_at = [&](uint64_t index) { return window_[index - window_start_]; };
  const bool set = word_at(word) >> page % word_bits & 1;
  const uint64_t other = set ? ~uint64_t{0} : 0;  // a word of the same bits becomes 0
  uint64_t pages = 0;
  uint64_t rest = (word_at(word) ^ other) >> page % word_bits;
  if (rest != 0) {
    return Bits{set, std::min<uint64_t>(pages_max, std::countr_zero(rest))};
  }
  pages = word_bits - page % word_bits;
  for (++word; pages < pages_max && word - window_start_ < window_.size(); ++word) {
    rest = word_at(word) ^ other;
    if (rest != 0) {
      pages += static_cast<uint64_t>(std::countr_zero(rest));
      break;
    }
    pages += word_bits;
  }
  return Bits{set, std::min(pages_max, pages)};
}

Result<void> MappedBlockMap::load_window(uint64_t word) {
  static_assert(std::endian::native == std::endian::little);
  window_.resize(std::min(window_words_max, bitmap_bytes_ / 8 - word));
  window_start_ = word;
  auto loaded =
      source_.read(block_.bitmap_offset + word * 8, std::as_writable_bytes(std::span(window_)));
  if (!loaded) {
    window_.clear();
  }
  return loaded;
}

}  // namespace qvmstate::vmstate
