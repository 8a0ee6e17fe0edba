#include "vmstate/ram_records.h"

#include <algorithm>
#include <array>
#include <bit>
#include <numeric>

#include "qcow2/io/endian.h"
#include "vmstate/stream_format.h"

namespace qvmstate::vmstate {
namespace {

constexpr size_t blocks_max = 65536;        // QEMU has 256 DIMM slots and a few per device
constexpr uint64_t page_bytes_min = 1024;   // arm's smallest; the flags need 10 bits
constexpr uint64_t page_bytes_max = 65536;  // the largest of any target
constexpr uint64_t flags_mask = page_bytes_min - 1;
constexpr uint8_t xbzrle_encoding = 1;
// zlib adds a few bytes to what it cannot compress.
constexpr uint64_t compressed_surplus_max = 1024;

constexpr bool is_page(uint64_t flags) {
  switch (flags & ~ram_continue) {
    case ram_page:
    case ram_zero:
    case ram_xbzrle:
    case ram_compress_page:
      return true;
    default:
      return false;
  }
}

bool is_in_block(const StreamBlock &block, uint64_t offset, uint64_t page_bytes) {
  return offset < block.used_bytes && block.used_bytes - offset >= page_bytes;
}

}  // namespace

bool RamRecords::set_page_bytes(uint64_t bytes) {
  if (!std::has_single_bit(bytes) || bytes < page_bytes_min || bytes > page_bytes_max ||
      (pages_begun_ && bytes != summary_.page_bytes)) {
    return false;
  }
  summary_.page_bytes = bytes;
  knows_page_bytes_ = true;
  return true;
}

Result<void> RamRecords::read_body() {
  for (;;) {
    if (!pages_begun_) {
      QV_ASSIGN(const auto next, cursor_.peek(8));
      if (is_page(load_be<uint64_t>(next.data()) & flags_mask)) {
        QV_TRY(knows_page_bytes_ ? Result<void>() : find_page_bytes());
        QV_TRY(begin_pages());
      }
    }
    QV_ASSIGN(const uint64_t word, cursor_.take_integer<uint64_t>());
    const uint64_t flags = word & (summary_.page_bytes - 1);
    const uint64_t offset = word - flags;
    if (flags == ram_eos) {
      return {};
    }
    if (flags == ram_mem_size) {
      QV_TRY(read_block_list(offset));
    } else if (is_page(flags)) {
      QV_TRY(read_page(flags, offset));
    } else {
      return refuse_flags(flags);
    }
  }
}

Result<void> RamRecords::finish() {
  return summary_.blocks.empty() ? Result<void>() : begin_pages();
}

/// From here on the size of pages is what it is.
Result<void> RamRecords::begin_pages() {
  if (pages_begun_) {
    return {};
  }
  pages_begun_ = true;
  return hooks_.blocks ? hooks_.blocks(summary_) : Result<void>();
}

Result<void> RamRecords::refuse_flags(uint64_t flags) const {
  switch (flags & ~ram_continue) {
    case ram_hook:
      return cursor_.not_decoded("an RDMA record");
    case ram_multifd_flush:
      return cursor_.not_decoded("a multifd record (the pages went over channels of their own)");
    default:
      return cursor_.bad("a RAM record with flags " + std::to_string(flags));
  }
}

Result<void> RamRecords::read_block_list(uint64_t total_bytes) {
  if (!summary_.blocks.empty()) {
    return cursor_.bad("a second list of RAM blocks");
  }
  const bool has_addresses = std::ranges::find(summary_.capabilities, ignore_shared_capability) !=
                             summary_.capabilities.end();
  while (total_bytes > 0) {
    QV_ASSIGN(std::string idstr, cursor_.take_short_text());
    QV_ASSIGN(const uint64_t used_bytes, cursor_.take_integer<uint64_t>());
    const bool is_new = block_by_idstr_.emplace(idstr, summary_.blocks.size()).second;
    if (idstr.empty() || !is_new || used_bytes == 0 || used_bytes > total_bytes ||
        summary_.blocks.size() >= blocks_max) {
      return cursor_.bad("an impossible list of RAM blocks");
    }
    total_bytes -= used_bytes;
    summary_.blocks.push_back({std::move(idstr), used_bytes, {}, {}, 0});
    StreamBlock &block = summary_.blocks.back();
    QV_TRY(read_host_page_bytes());
    if (has_addresses) {
      QV_ASSIGN(block.address, cursor_.take_integer<uint64_t>());
    }
    if (summary_.layout == Layout::mapped_ram) {
      QV_TRY(read_mapped_header(block));
    }
  }
  if (summary_.layout != Layout::mapped_ram) {
    return {};
  }
  QV_TRY(begin_pages());
  return read_mapped_pages();
}

/// Only blocks of host pages other than the usual ones have this word. What else can follow begins
/// with a name's length, or is a record, which has flags: neither looks like a size of pages.
Result<void> RamRecords::read_host_page_bytes() {
  if (host_page_bytes_mask_ == 0 || cursor_.left() < 8) {
    return {};
  }
  QV_ASSIGN(const auto next, cursor_.peek(8));
  const auto word = load_be<uint64_t>(next.data());
  if (std::has_single_bit(word) && word > page_bytes_min && (word & host_page_bytes_mask_) != 0) {
    cursor_.skip(8);
  }
  return {};
}

/// Where the pages of a block are. The list goes on behind them.
Result<void> RamRecords::read_mapped_header(StreamBlock &block) {
  QV_ASSIGN(const uint32_t version, cursor_.take_integer<uint32_t>());
  QV_ASSIGN(const uint64_t page_bytes, cursor_.take_integer<uint64_t>());
  QV_ASSIGN(const uint64_t bitmap_offset, cursor_.take_integer<uint64_t>());
  QV_ASSIGN(const uint64_t pages_offset, cursor_.take_integer<uint64_t>());
  const std::string name = "RAM block \"" + block.idstr + "\"";
  if (version != mapped_ram_version) {
    return cursor_.not_decoded("a mapped-ram header of version " + std::to_string(version));
  }
  if (!knows_page_bytes_ && !set_page_bytes(page_bytes)) {
    return cursor_.bad(name + " in pages of " + std::to_string(page_bytes) + " bytes");
  }
  if (page_bytes != summary_.page_bytes) {
    return cursor_.bad(name + " in pages of " + std::to_string(page_bytes) + " bytes instead of " +
                       std::to_string(summary_.page_bytes));
  }
  if (block.used_bytes % page_bytes != 0) {
    return cursor_.bad(name + " with a part of a page");
  }
  // Header, bitmap and pages follow one another, so none lies over another.
  const uint64_t bitmap_bytes = mapped_bitmap_bytes(block.used_bytes / page_bytes);
  QV_TRY(check_region(name + ": its bitmap", bitmap_offset, bitmap_bytes, cursor_.tell()));
  QV_TRY(check_region(name + ": its pages", pages_offset, block.used_bytes,
                      bitmap_offset + bitmap_bytes));
  if (pages_offset % page_bytes != 0) {
    return cursor_.bad(name + " whose pages do not begin at a multiple of their size");
  }
  block.mapped = {page_bytes, StreamOffset(bitmap_offset), StreamOffset(pages_offset)};
  cursor_.skip(pages_offset + block.used_bytes - cursor_.tell());
  return {};
}

Result<void> RamRecords::check_region(const std::string &what, uint64_t offset, uint64_t bytes,
                                      uint64_t least) const {
  const uint64_t end = source_.bytes_max();
  if (offset < least) {
    return cursor_.bad(what + " at byte " + std::to_string(offset) +
                       " where something else is already, up to byte " + std::to_string(least));
  }
  if (offset > end || bytes > end - offset) {
    return cursor_.bad(what + ", " + std::to_string(bytes) + " bytes at byte " +
                       std::to_string(offset) + ", past the " + std::to_string(end) +
                       " that there are (cut short?)");
  }
  return {};
}

Result<void> RamRecords::read_mapped_pages() {
  for (size_t i = 0; i < summary_.blocks.size(); ++i) {
    StreamBlock &block = summary_.blocks[i];
    MappedBlockMap map(source_, *block.mapped, block.used_bytes);
    for (uint64_t offset = 0; offset < block.used_bytes;) {
      QV_ASSIGN(const MappedRun run, map.run_at(offset, block.used_bytes - offset));
      const uint64_t pages = run.bytes / summary_.page_bytes;
      (run.has_data ? summary_.data_pages : summary_.zero_pages) += pages;
      block.page_records += run.has_data ? pages : 0;
      if (hooks_.page) {
        QV_TRY(report_mapped_run(i, offset, run));
      }
      offset += run.bytes;
    }
  }
  return {};
}

Result<void> RamRecords::report_mapped_run(size_t block, uint64_t offset, const MappedRun &run) {
  const uint64_t page_bytes = summary_.page_bytes;
  for (uint64_t done = 0; done < run.bytes; done += page_bytes) {
    const uint64_t in_piece = done % StreamCursor::window_bytes;
    if (run.has_data && in_piece == 0) {
      piece_.resize(std::min<uint64_t>(StreamCursor::window_bytes, run.bytes - done));
      QV_TRY(source_.read(summary_.blocks[block].mapped->pages_offset + offset + done, piece_));
    }
    QV_TRY(hooks_.page(block, offset + done, page_bytes,
                       run.has_data ? std::span(piece_).subspan(in_piece, page_bytes)
                                    : std::span<const std::byte>()));
  }
  return {};
}

Result<void> RamRecords::read_page(uint64_t flags, uint64_t offset) {
  if (summary_.layout == Layout::mapped_ram) {
    return cursor_.bad("a page record in a mapped-ram stream");
  }
  if ((flags & ram_continue) == 0) {
    QV_ASSIGN(const std::string idstr, cursor_.take_short_text());
    const auto block = block_by_idstr_.find(idstr);
    block_ = block == block_by_idstr_.end() ? no_block : block->second;
  }
  if (block_ == no_block) {
    return cursor_.bad("a page of an unknown RAM block");
  }
  StreamBlock &block = summary_.blocks[block_];
  if (!is_in_block(block, offset, summary_.page_bytes)) {
    return cursor_.bad("a page past the end of RAM block \"" + block.idstr + "\"");
  }
  QV_ASSIGN(const Encoded encoded, take_encoded(flags & ~ram_continue));
  if (hooks_.place) {
    hooks_.place({StreamOffset(cursor_.tell() - encoded.bytes.size()),
                  static_cast<uint32_t>(encoded.bytes.size()), encoded.coding});
  }
  QV_ASSIGN(const auto data, decode(encoded, offset));
  (data.empty() ? summary_.zero_pages : summary_.data_pages) += 1;
  summary_.compressed_pages += encoded.coding == PageCoding::compressed;
  summary_.xbzrle_pages += encoded.coding == PageCoding::difference;
  block.page_records += 1;
  return hooks_.page ? hooks_.page(block_, offset, summary_.page_bytes, data) : Result<void>{};
}

Result<RamRecords::Encoded> RamRecords::take_encoded(uint64_t kind) {
  Encoded encoded;
  uint64_t bytes = summary_.page_bytes;
  switch (kind) {
    case ram_zero: {
      encoded.coding = PageCoding::filled;
      bytes = 1;
      break;
    }
    case ram_compress_page: {
      encoded.coding = PageCoding::compressed;
      QV_ASSIGN(bytes, cursor_.take_integer<uint32_t>());
      if (bytes > summary_.page_bytes + compressed_surplus_max) {
        return cursor_.bad("a compressed page of " + std::to_string(bytes) + " bytes");
      }
      break;
    }
    case ram_xbzrle: {
      encoded.coding = PageCoding::difference;
      QV_ASSIGN(const uint8_t encoding, cursor_.take_integer<uint8_t>());
      QV_ASSIGN(bytes, cursor_.take_integer<uint16_t>());
      if (encoding != xbzrle_encoding || bytes > summary_.page_bytes) {
        return cursor_.bad("an XBZRLE page of " + std::to_string(bytes) + " bytes in encoding " +
                           std::to_string(encoding));
      }
      break;
    }
    default:
      break;
  }
  QV_ASSIGN(encoded.bytes, cursor_.take(bytes));
  return encoded;
}

/// Empty: zeros.
Result<std::span<const std::byte>> RamRecords::decode(const Encoded &encoded, uint64_t offset) {
  if (encoded.coding == PageCoding::plain) {
    return encoded.bytes;
  }
  if (encoded.coding == PageCoding::filled && encoded.bytes[0] == std::byte{0}) {
    return std::span<const std::byte>();
  }
  piece_.assign(summary_.page_bytes, std::byte{0});
  if (encoded.coding == PageCoding::difference && hooks_.page) {
    if (!hooks_.page_now) {
      return cursor_.not_decoded("an XBZRLE page, which changes an earlier one,");
    }
    QV_TRY(hooks_.page_now(block_, offset, piece_));
  }
  if (!decode_page(encoded.coding, encoded.bytes, piece_)) {
    return cursor_.bad(encoded.coding == PageCoding::difference
                           ? "an XBZRLE page that cannot be decoded"
                           : "a compressed page that does not inflate to one");
  }
  return std::span<const std::byte>(piece_);
}

/// What the records ahead are, if pages have some size.
struct RamRecords::Walk {
  bool fits = true;
  uint64_t records = 0;
  uint64_t data_records = 0;
  uint64_t offsets_divisor = 0;  ///< greatest common one; 0: no page but the first of blocks
};

RamRecords::Walk RamRecords::walk_records(std::span<const std::byte> ahead,
                                          uint64_t page_bytes) const {
  Walk walk;
  size_t block = block_;
  const auto has = [&](size_t at, size_t bytes) {
    return at <= ahead.size() && bytes <= ahead.size() - at;
  };
  for (size_t at = 0; has(at, 8);) {
    const auto word = load_be<uint64_t>(&ahead[at]);
    const uint64_t flags = word & (page_bytes - 1);
    at += 8;
    if (flags == ram_eos) {
      break;
    }
    if (!is_page(flags)) {
      walk.fits = false;
      break;
    }
    if ((flags & ram_continue) == 0) {
      if (!has(at, 1) || !has(at + 1, static_cast<size_t>(ahead[at]))) {
        break;
      }
      const auto found = block_by_idstr_.find(std::string(
          reinterpret_cast<const char *>(&ahead[at]) + 1, static_cast<size_t>(ahead[at])));
      block = found == block_by_idstr_.end() ? no_block : found->second;
      at += 1 + static_cast<size_t>(ahead[at]);
    }
    if (block == no_block || !is_in_block(summary_.blocks[block], word - flags, page_bytes)) {
      walk.fits = false;
      break;
    }
    walk.records += 1;
    walk.offsets_divisor = std::gcd(walk.offsets_divisor, word - flags);
    switch (flags & ~ram_continue) {
      case ram_zero:
        at += 1;
        break;
      case ram_page:
        at += page_bytes;
        walk.data_records += 1;
        break;
      case ram_xbzrle:
        at += has(at, 3) ? 3 + load_be<uint16_t>(&ahead[at + 1]) : 3;
        break;
      default:
        at += has(at, 4) ? 4 + load_be<uint32_t>(&ahead[at]) : 4;
        break;
    }
  }
  return walk;
}

/// Most targets do not say how large their pages are before they send some. The usual size, unless
/// another one fits what lies ahead and it does not.
Result<void> RamRecords::find_page_bytes() {
  constexpr std::array<uint64_t, 7> candidates = {4096, 8192, 16384, 32768, 65536, 2048, 1024};
  constexpr uint64_t records_telling = 16;
  QV_ASSIGN(const auto ahead,
            cursor_.peek(std::min<uint64_t>(StreamCursor::window_bytes, cursor_.left())));
  uint64_t found = candidates[0];
  for (const uint64_t candidate : candidates) {
    const Walk walk = walk_records(ahead, candidate);
    if (!walk.fits) {
      continue;
    }
    found = candidate;
    // Zero pages fit larger sizes too; that they follow one another tells.
    if (walk.data_records == 0 && walk.records >= records_telling &&
        std::ranges::find(candidates, walk.offsets_divisor) != candidates.end()) {
      found = walk.offsets_divisor;
    }
    break;
  }
  set_page_bytes(found);
  return {};
}

}  // namespace qvmstate::vmstate
