#include "vmstate/stream_reader.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <unordered_map>

#include "qcow2/io/endian.h"
#include "vmstate/section_scan.h"
#include "vmstate/stream_format.h"

namespace qvmstate::vmstate {
namespace {

constexpr size_t window_bytes = 1 * mib;          // holds any page with its header
constexpr uint64_t page_bytes_default = 4096;     // x86, and arm where the stream says so
constexpr uint32_t target_page_bits_min = 10;     // arm's smallest; the flags need 10 bits
constexpr uint32_t target_page_bits_max = 16;     // 64 KiB, the largest of any target
constexpr uint32_t machine_type_bytes_max = 255;  // QEMU's are shorter than 64
constexpr uint32_t capabilities_max = 64;         // QEMU has about 25
constexpr size_t blocks_max = 65536;              // QEMU has 256 DIMM slots and a few per device
constexpr uint32_t vmdescription_bytes_max = 16 * mib;
constexpr size_t uuid_bytes = 16;
// Device sections are split in memory: first in a little of what follows, then in more, at last in
// as much as a virtio-gpu with all its resources may need.
constexpr std::array<uint64_t, 3> device_window_bytes = {1 * mib, 16 * mib, 256 * mib};

constexpr uint16_t command_switchover_start = 11;
constexpr uint16_t command_packaged = 7;

/// A moving window over the source: what is taken stands in memory in one piece.
class Cursor {
 public:
  /// Precondition: start <= source.bytes_max().
  Cursor(StreamSource &source, StreamOffset start)
      : source_(source),
        memory_(std::min<uint64_t>(window_bytes, source.bytes_max() - start.value)),
        position_(start.value) {}

  uint64_t tell() const { return position_; }
  uint64_t left() const { return source_.bytes_max() - position_; }

  /// The next `bytes` (at most a window) without moving on; valid until the next call.
  Result<std::span<const std::byte>> peek(size_t bytes) {
    if (bytes > left()) {
      return fail(ErrorCode::bad_stream, "vmstate stream: ends in the middle of a record at byte " +
                                             std::to_string(source_.bytes_max()) +
                                             "; it is cut short");
    }
    if (position_ < start_ || position_ + bytes > start_ + filled_) {
      QV_TRY(refill());
    }
    return std::span<const std::byte>(memory_).subspan(position_ - start_, bytes);
  }

  Result<std::span<const std::byte>> take(size_t bytes) {
    QV_ASSIGN(const auto taken, peek(bytes));
    position_ += bytes;
    return taken;
  }

  template <std::unsigned_integral T>
  Result<T> take_integer() {
    QV_ASSIGN(const auto bytes, take(sizeof(T)));
    return load_be<T>(bytes.data());
  }

  Result<std::string> take_text(size_t bytes) {
    QV_ASSIGN(const auto text, take(bytes));
    return std::string(reinterpret_cast<const char *>(text.data()), text.size());
  }

  Result<std::string> take_short_text() {
    QV_ASSIGN(const uint8_t bytes, take_integer<uint8_t>());
    return take_text(bytes);
  }

  /// Any number of bytes, copied.
  Result<std::vector<std::byte>> copy_ahead(uint64_t bytes) {
    std::vector<std::byte> copy(std::min(bytes, left()));
    QV_TRY(source_.read(StreamOffset(position_), copy));
    return copy;
  }

  void skip(uint64_t bytes) { position_ += bytes; }

 private:
  /// Fills the window from the position on, keeping what it already has of that.
  Result<void> refill() {
    const size_t wanted = std::min<uint64_t>(window_bytes, left());
    size_t kept = 0;
    if (position_ >= start_ && position_ < start_ + filled_) {
      kept = start_ + filled_ - position_;
      std::memmove(memory_.data(), memory_.data() + (position_ - start_), kept);
    }
    start_ = position_;
    filled_ = kept;
    QV_TRY(
        source_.read(StreamOffset(start_ + kept), std::span(memory_).subspan(kept, wanted - kept)));
    filled_ = wanted;
    return {};
  }

  StreamSource &source_;
  std::vector<std::byte> memory_;
  uint64_t start_ = 0;  // stream offset of the window
  size_t filled_ = 0;   // bytes of it that are valid
  uint64_t position_;
};

class Reader {
 public:
  Reader(StreamSource &source, const PageHook &hook, StreamOffset start,
         const BlocksHook &blocks_hook, const PlaceHook &place_hook)
      : source_(source),
        cursor_(source, start),
        start_(start),
        hook_(hook),
        blocks_hook_(blocks_hook),
        place_hook_(place_hook) {}

  Result<StreamSummary> read() {
    QV_TRY(read_file_header());
    for (;;) {
      QV_ASSIGN(const auto next, cursor_.peek(1));
      const auto type = static_cast<uint8_t>(next[0]);
      if (type == section_eof) {
        cursor_.skip(1);
        QV_TRY(read_vmdescription());
        summary_.stream_bytes = StreamOffset(cursor_.tell()) - start_;
        return std::move(summary_);
      }
      QV_TRY(read_section(type));
    }
  }

 private:
  tl::unexpected<Error> bad(const std::string &what) const {
    return fail(ErrorCode::bad_stream, "vmstate stream: " + what + " before byte " +
                                           std::to_string(cursor_.tell()) +
                                           "; it is damaged or not of QEMU");
  }

  tl::unexpected<Error> not_decoded(const std::string &what) const {
    return fail(ErrorCode::not_supported,
                "vmstate stream: " + what + " before byte " + std::to_string(cursor_.tell()) +
                    " is not supported by this program; let QEMU load it");
  }

  Result<void> read_file_header() {
    QV_ASSIGN(const uint32_t magic, cursor_.take_integer<uint32_t>());
    QV_ASSIGN(const uint32_t version, cursor_.take_integer<uint32_t>());
    if (magic != stream_magic || version != stream_version) {
      return bad("no QEMU stream header of version 3");
    }
    return {};
  }

  Result<void> read_section(uint8_t type) {
    switch (type) {
      case section_configuration:
        cursor_.skip(1);
        return read_configuration();
      case section_start:
      case section_full:
        return read_named_section();
      case section_part:
      case section_end: {
        cursor_.skip(1);
        QV_ASSIGN(const uint32_t id, cursor_.take_integer<uint32_t>());
        if (!ram_id_ || id != *ram_id_) {
          return bad("a section continues that never started");
        }
        return read_ram_body();
      }
      case section_command:
        cursor_.skip(1);
        return read_command();
      default:
        return bad("an unknown section type " + std::to_string(type));
    }
  }

  Result<void> read_configuration() {
    QV_ASSIGN(const uint32_t bytes, cursor_.take_integer<uint32_t>());
    if (!summary_.machine_type.empty() || ram_id_ || bytes == 0 || bytes > machine_type_bytes_max) {
      return bad("a misplaced configuration section, or one with an impossible machine type");
    }
    QV_ASSIGN(summary_.machine_type, cursor_.take_text(bytes));
    for (;;) {
      QV_ASSIGN(const auto next, cursor_.peek(1));
      if (static_cast<uint8_t>(next[0]) != section_subsection) {
        return {};
      }
      cursor_.skip(1);
      QV_TRY(read_configuration_subsection());
    }
  }

  Result<void> read_configuration_subsection() {
    QV_ASSIGN(const std::string name, cursor_.take_short_text());
    QV_TRY(cursor_.take_integer<uint32_t>());  // version
    if (name == "configuration/target-page-bits") {
      QV_ASSIGN(const uint32_t bits, cursor_.take_integer<uint32_t>());
      if (bits < target_page_bits_min || bits > target_page_bits_max) {
        return bad("pages of 2^" + std::to_string(bits) + " bytes");
      }
      summary_.target_page_bits = bits;
      summary_.page_bytes = uint64_t{1} << bits;
      return {};
    }
    if (name == "configuration/capabilities") {
      QV_ASSIGN(const uint32_t count, cursor_.take_integer<uint32_t>());
      if (count > capabilities_max) {
        return bad(std::to_string(count) + " capabilities");
      }
      for (uint32_t i = 0; i < count; ++i) {
        QV_ASSIGN(std::string capability, cursor_.take_short_text());
        // These two change the block list. Others change nothing in what is written.
        if (capability == "x-ignore-shared") {
          return not_decoded("RAM saved with the capability " + capability);
        }
        if (capability == mapped_ram_capability) {
          summary_.layout = Layout::mapped_ram;
        }
        summary_.capabilities.push_back(std::move(capability));
      }
      return {};
    }
    if (name == "configuration/uuid") {
      return ignore(cursor_.take(uuid_bytes));
    }
    return bad("an unknown part of the configuration section");
  }

  template <class T>
  static Result<void> ignore(Result<T> result) {
    QV_TRY(std::move(result));
    return {};
  }

  Result<void> read_named_section() {
    QV_ASSIGN(const auto ahead, cursor_.peek(std::min<uint64_t>(header_bytes_max, cursor_.left())));
    const auto header = parse_section_header(ahead, 0);
    if (!header) {
      return bad("an impossible section header");
    }
    if (header->idstr == "ram") {
      if (ram_id_ || header->instance != 0 || header->version != ram_section_version) {
        return bad("a second RAM section, or one of a version other than 4");
      }
      ram_id_ = header->id;
      cursor_.skip(header->bytes);
      return read_ram_body();
    }
    if (header->type == section_start) {
      return not_decoded("iterative section \"" + std::string(header->idstr) + "\"");
    }
    return read_device_run();
  }

  static constexpr size_t header_bytes_max = 1 + 4 + 1 + section_idstr_bytes_max + 4 + 4;

  /// FULL sections up to the end mark, or to the RAM section if they come before it. A stream with
  /// a vmdescription is told from an end mark inside a body by it; only if none is found, an end
  /// mark alone is enough.
  Result<void> read_device_run() {
    for (const bool need_description : {true, false}) {
      for (const uint64_t bytes : device_window_bytes) {
        QV_ASSIGN(const auto ahead, cursor_.copy_ahead(bytes));
        const std::span<const std::byte> view(ahead);
        auto run = split_section_run(
            view, 0, [&](size_t at) { return is_run_end(view, at, need_description); });
        if (run) {
          return take_run(view, *run);
        }
        if (ahead.size() < bytes || bytes == device_window_bytes.back()) {
          if (!need_description) {
            return tl::unexpected(with_context(std::move(run).error(), "vmstate stream"));
          }
          break;
        }
      }
    }
    return {};
  }

  bool is_run_end(std::span<const std::byte> ahead, size_t at, bool need_description) const {
    if (at >= ahead.size()) {
      return false;
    }
    switch (static_cast<uint8_t>(ahead[at])) {
      case section_eof:
        return !need_description || description_bytes(ahead.subspan(at + 1)).has_value();
      case section_start: {
        const auto header = parse_section_header(ahead, at);
        return header && header->type == section_start && header->idstr == "ram";
      }
      case section_part:
      case section_end:
        return ram_id_ && ahead.size() - at >= 5 &&
               load_be<uint32_t>(ahead.data() + at + 1) == *ram_id_;
      default:
        return false;
    }
  }

  Result<void> take_run(std::span<const std::byte> ahead, const SectionRun &run) {
    if (summary_.devices.size() + run.sections.size() > device_sections_max) {
      return bad("more than " + std::to_string(device_sections_max) + " device sections");
    }
    for (const DeviceSection &section : run.sections) {
      const auto at = static_cast<uint64_t>(section.body.data() - ahead.data());
      summary_.devices.push_back({section.idstr, section.instance, section.version,
                                  cursor_.tell() + at, section.body.size()});
    }
    cursor_.skip(run.end);
    return {};
  }

  Result<void> read_command() {
    QV_ASSIGN(const uint16_t command, cursor_.take_integer<uint16_t>());
    QV_ASSIGN(const uint16_t bytes, cursor_.take_integer<uint16_t>());
    if (command != command_switchover_start) {
      return not_decoded(command == command_packaged ? "a packaged stream (postcopy)"
                                                     : "command " + std::to_string(command));
    }
    return ignore(cursor_.take(bytes));
  }

  /// Records to the end mark, and the footer.
  Result<void> read_ram_body() {
    for (;;) {
      QV_ASSIGN(const uint64_t word, cursor_.take_integer<uint64_t>());
      const uint64_t flags = word & (summary_.page_bytes - 1);
      const uint64_t offset = word - flags;
      if (flags == ram_eos) {
        break;
      }
      if (flags == ram_mem_size) {
        QV_TRY(read_block_list(offset));
      } else if ((flags & ~ram_continue) == ram_page || (flags & ~ram_continue) == ram_zero) {
        QV_TRY(read_page(flags, offset));
      } else {
        return refuse_flags(flags);
      }
    }
    QV_ASSIGN(const uint8_t type, cursor_.take_integer<uint8_t>());
    QV_ASSIGN(const uint32_t id, cursor_.take_integer<uint32_t>());
    if (type != section_footer || id != *ram_id_) {
      return bad("a RAM section without footer");
    }
    return {};
  }

  Result<void> refuse_flags(uint64_t flags) const {
    switch (flags & ~ram_continue) {
      case ram_xbzrle:
        return not_decoded("an XBZRLE page");
      case ram_compress_page:
        return not_decoded("a compressed page");
      case ram_hook:
        return not_decoded("an RDMA record");
      case ram_multifd_flush:
        return not_decoded("a multifd record");
      default:
        return bad("a RAM record with flags " + std::to_string(flags));
    }
  }

  Result<void> read_block_list(uint64_t total_bytes) {
    if (!summary_.blocks.empty()) {
      return bad("a second list of RAM blocks");
    }
    while (total_bytes > 0) {
      QV_ASSIGN(std::string idstr, cursor_.take_short_text());
      QV_ASSIGN(const uint64_t used_bytes, cursor_.take_integer<uint64_t>());
      const bool is_new = block_by_idstr_.emplace(idstr, summary_.blocks.size()).second;
      if (idstr.empty() || !is_new || used_bytes == 0 || used_bytes > total_bytes ||
          summary_.blocks.size() >= blocks_max) {
        return bad("an impossible list of RAM blocks");
      }
      total_bytes -= used_bytes;
      summary_.blocks.push_back({std::move(idstr), used_bytes, std::nullopt});
      if (summary_.layout == Layout::mapped_ram) {
        QV_TRY(read_mapped_header(summary_.blocks.back()));
      }
    }
    if (blocks_hook_) {
      QV_TRY(blocks_hook_(summary_));
    }
    return summary_.layout == Layout::mapped_ram ? read_mapped_pages() : Result<void>{};
  }

  /// Where the pages of a block are. The list goes on behind them.
  Result<void> read_mapped_header(StreamBlock &block) {
    QV_ASSIGN(const uint32_t version, cursor_.take_integer<uint32_t>());
    QV_ASSIGN(const uint64_t page_bytes, cursor_.take_integer<uint64_t>());
    QV_ASSIGN(const uint64_t bitmap_offset, cursor_.take_integer<uint64_t>());
    QV_ASSIGN(const uint64_t pages_offset, cursor_.take_integer<uint64_t>());
    const std::string name = "RAM block \"" + block.idstr + "\"";
    if (version != mapped_ram_version) {
      return not_decoded("a mapped-ram header of version " + std::to_string(version));
    }
    if (page_bytes != summary_.page_bytes) {
      return bad(name + " in pages of " + std::to_string(page_bytes) + " bytes instead of " +
                 std::to_string(summary_.page_bytes));
    }
    if (block.used_bytes % page_bytes != 0) {
      return bad(name + " with a part of a page");
    }
    // Header, bitmap and pages follow one another, so none lies over another.
    const uint64_t bitmap_bytes = mapped_bitmap_bytes(block.used_bytes / page_bytes);
    QV_TRY(check_region(name + ": its bitmap", bitmap_offset, bitmap_bytes, cursor_.tell()));
    QV_TRY(check_region(name + ": its pages", pages_offset, block.used_bytes,
                        bitmap_offset + bitmap_bytes));
    if (pages_offset % page_bytes != 0) {
      return bad(name + " whose pages do not begin at a multiple of their size");
    }
    block.mapped = {page_bytes, StreamOffset(bitmap_offset), StreamOffset(pages_offset)};
    cursor_.skip(pages_offset + block.used_bytes - cursor_.tell());
    return {};
  }

  Result<void> check_region(const std::string &what, uint64_t offset, uint64_t bytes,
                            uint64_t least) const {
    const uint64_t end = source_.bytes_max();
    if (offset < least) {
      return bad(what + " at byte " + std::to_string(offset) +
                 " where something else is already, up to byte " + std::to_string(least));
    }
    if (offset > end || bytes > end - offset) {
      return bad(what + ", " + std::to_string(bytes) + " bytes at byte " + std::to_string(offset) +
                 ", past the " + std::to_string(end) + " that there are (cut short?)");
    }
    return {};
  }

  Result<void> read_mapped_pages() {
    for (size_t i = 0; i < summary_.blocks.size(); ++i) {
      const StreamBlock &block = summary_.blocks[i];
      MappedBlockMap map(source_, *block.mapped, block.used_bytes);
      for (uint64_t offset = 0; offset < block.used_bytes;) {
        QV_ASSIGN(const MappedRun run, map.run_at(offset, block.used_bytes - offset));
        const uint64_t pages = run.bytes / summary_.page_bytes;
        (run.has_data ? summary_.data_pages : summary_.zero_pages) += pages;
        if (hook_) {
          QV_TRY(report_mapped_run(i, offset, run));
        }
        offset += run.bytes;
      }
    }
    return {};
  }

  Result<void> report_mapped_run(size_t block, uint64_t offset, const MappedRun &run) {
    const uint64_t page_bytes = summary_.page_bytes;
    for (uint64_t done = 0; done < run.bytes; done += page_bytes) {
      const uint64_t in_piece = done % window_bytes;
      if (run.has_data && in_piece == 0) {
        piece_.resize(std::min<uint64_t>(window_bytes, run.bytes - done));
        QV_TRY(source_.read(summary_.blocks[block].mapped->pages_offset + offset + done, piece_));
      }
      QV_TRY(hook_(block, offset + done, page_bytes,
                   run.has_data ? std::span(piece_).subspan(in_piece, page_bytes)
                                : std::span<const std::byte>()));
    }
    return {};
  }

  Result<void> read_page(uint64_t flags, uint64_t offset) {
    if (summary_.layout == Layout::mapped_ram) {
      return bad("a page record in a mapped-ram stream");
    }
    if ((flags & ram_continue) == 0) {
      QV_ASSIGN(const std::string idstr, cursor_.take_short_text());
      const auto block = block_by_idstr_.find(idstr);
      block_ = block == block_by_idstr_.end() ? no_block : block->second;
    }
    if (block_ == no_block) {
      return bad("a page of an unknown RAM block");
    }
    const uint64_t used_bytes = summary_.blocks[block_].used_bytes;
    if (offset >= used_bytes || used_bytes - offset < summary_.page_bytes) {
      return bad("a page past the end of RAM block \"" + summary_.blocks[block_].idstr + "\"");
    }
    std::span<const std::byte> data;
    if ((flags & ram_zero) != 0) {
      QV_ASSIGN(const uint8_t fill, cursor_.take_integer<uint8_t>());
      if (fill != 0) {
        return bad("a zero page filled with " + std::to_string(fill));
      }
      summary_.zero_pages += 1;
    } else {
      QV_ASSIGN(data, cursor_.take(summary_.page_bytes));
      summary_.data_pages += 1;
      if (place_hook_) {
        place_hook_(StreamOffset(cursor_.tell() - summary_.page_bytes));
      }
    }
    return hook_ ? hook_(block_, offset, summary_.page_bytes, data) : Result<void>{};
  }

  /// The length of the JSON, if a vmdescription begins here.
  static std::optional<uint32_t> description_bytes(std::span<const std::byte> ahead) {
    constexpr size_t head_bytes = 1 + 4;
    if (ahead.size() <= head_bytes || static_cast<uint8_t>(ahead[0]) != section_vmdescription ||
        ahead[head_bytes] != std::byte{'{'}) {
      return std::nullopt;
    }
    const auto bytes = load_be<uint32_t>(ahead.data() + 1);
    return bytes > 0 && bytes <= vmdescription_bytes_max ? std::optional(bytes) : std::nullopt;
  }

  /// After the end mark. What is no vmdescription is not of the stream.
  Result<void> read_vmdescription() {
    QV_ASSIGN(const auto ahead, cursor_.peek(std::min<uint64_t>(6, cursor_.left())));
    const auto bytes = description_bytes(ahead);
    if (!bytes || *bytes > cursor_.left() - 5) {
      return {};
    }
    cursor_.skip(5);
    QV_ASSIGN(const auto json, cursor_.copy_ahead(*bytes));
    summary_.vmdescription.assign(reinterpret_cast<const char *>(json.data()), json.size());
    cursor_.skip(json.size());
    return {};
  }

  StreamSource &source_;
  Cursor cursor_;
  StreamOffset start_;
  const PageHook &hook_;
  const BlocksHook &blocks_hook_;
  const PlaceHook &place_hook_;
  StreamSummary summary_;
  std::optional<uint32_t> ram_id_;
  std::unordered_map<std::string, size_t> block_by_idstr_;
  static constexpr size_t no_block = SIZE_MAX;
  size_t block_ = no_block;       // of the record before, for CONTINUE
  std::vector<std::byte> piece_;  // of the pages of a mapped-ram block
};

}  // namespace

const char *layout_name(Layout layout) {
  return layout == Layout::mapped_ram ? "mapped-ram" : "legacy";
}

Result<StreamSummary> read_stream(StreamSource &source, const PageHook &hook, StreamOffset start,
                                  const BlocksHook &blocks_hook, const PlaceHook &place_hook) {
  if (start.value > source.bytes_max()) {
    return fail(ErrorCode::bad_stream, "vmstate stream: would begin at byte " +
                                           std::to_string(start.value) + ", past the end at byte " +
                                           std::to_string(source.bytes_max()));
  }
  return Reader(source, hook, start, blocks_hook, place_hook).read();
}

}  // namespace qvmstate::vmstate
