#include "vmstate/stream_reader.h"

#include <algorithm>
#include <array>
#include <utility>

#include "qcow2/io/endian.h"
#include "vmstate/described_run.h"
#include "vmstate/ram_records.h"
#include "vmstate/section_scan.h"
#include "vmstate/stream_cursor.h"
#include "vmstate/stream_format.h"

namespace qvmstate::vmstate {
namespace {

constexpr uint32_t machine_type_bytes_max = 255;  // QEMU's are shorter than 64
constexpr uint32_t target_page_bits_max = 16;     // 64 KiB, the largest of any target
constexpr uint32_t capabilities_max = 64;         // QEMU has about 25
constexpr uint32_t vmdescription_bytes_max = 16 * mib;
constexpr size_t uuid_bytes = 16;
// Device sections are split in memory: first in a little of what follows, then in more, at last in
// as much as a virtio-gpu with all its resources may need.
constexpr std::array<uint64_t, 3> device_window_bytes = {1 * mib, 16 * mib, 256 * mib};

/// Whether a command's payload can have this length.
bool is_command(uint16_t command, uint16_t bytes) {
  switch (command) {
    case command_open_return_path:
    case command_postcopy_listen:
    case command_postcopy_run:
    case command_switchover_start:
      return bytes == 0;
    case command_ping:
    case command_packaged:
      return bytes == 4;
    case command_postcopy_advise:
      return bytes == 0 || bytes == 16;
    case command_postcopy_discard:
      return true;
    default:
      return false;
  }
}

class Reader {
 public:
  Reader(StreamSource &source, StreamOffset start, const StreamHooks &hooks)
      : cursor_(source, start), start_(start), ram_(source, cursor_, summary_, hooks) {}

  Result<StreamSummary> read() {
    QV_TRY(read_file_header());
    for (;;) {
      QV_ASSIGN(const auto next, cursor_.peek(1));
      const auto type = static_cast<uint8_t>(next[0]);
      if (type == section_eof) {
        cursor_.skip(1);
        QV_TRY(ram_.finish());
        QV_TRY(read_vmdescription());
        summary_.stream_bytes = StreamOffset(cursor_.tell()) - start_;
        return std::move(summary_);
      }
      QV_TRY(read_section(type));
    }
  }

 private:
  Result<void> read_file_header() {
    QV_ASSIGN(const uint32_t magic, cursor_.take_integer<uint32_t>());
    if (magic == multifd_magic) {
      return cursor_.not_decoded("a channel of a multifd migration, which holds pages alone,");
    }
    QV_ASSIGN(const uint32_t version, cursor_.take_integer<uint32_t>());
    if (magic != stream_magic || version != stream_version) {
      return cursor_.bad("no QEMU stream header of version 3");
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
          return cursor_.bad("a section continues that never started");
        }
        return read_ram_section();
      }
      case section_command:
        cursor_.skip(1);
        return read_command();
      default:
        return cursor_.bad("an unknown section type " + std::to_string(type));
    }
  }

  Result<void> read_configuration() {
    QV_ASSIGN(const uint32_t bytes, cursor_.take_integer<uint32_t>());
    if (!summary_.machine_type.empty() || ram_id_ || bytes == 0 || bytes > machine_type_bytes_max) {
      return cursor_.bad(
          "a misplaced configuration section, or one with an impossible machine type");
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
      if (bits > target_page_bits_max || !ram_.set_page_bytes(uint64_t{1} << bits)) {
        return cursor_.bad("pages of 2^" + std::to_string(bits) + " bytes");
      }
      summary_.target_page_bits = bits;
      return {};
    }
    if (name == "configuration/capabilities") {
      QV_ASSIGN(const uint32_t count, cursor_.take_integer<uint32_t>());
      if (count > capabilities_max) {
        return cursor_.bad(std::to_string(count) + " capabilities");
      }
      for (uint32_t i = 0; i < count; ++i) {
        QV_ASSIGN(std::string capability, cursor_.take_short_text());
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
    return cursor_.bad("an unknown part of the configuration section");
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
      return cursor_.bad("an impossible section header");
    }
    if (header->idstr == "ram") {
      if (ram_id_ || header->instance != 0 || header->version != ram_section_version) {
        return cursor_.bad("a second RAM section, or one of a version other than 4");
      }
      ram_id_ = header->id;
      cursor_.skip(header->bytes);
      return read_ram_section();
    }
    if (header->type == section_start) {
      return cursor_.not_decoded("iterative section \"" + std::string(header->idstr) + "\"");
    }
    return read_device_run();
  }

  static constexpr size_t header_bytes_max = 1 + 4 + 1 + section_idstr_bytes_max + 4 + 4;

  /// FULL sections up to the end mark, or to the RAM section if they come before it. A stream with
  /// a vmdescription is told from an end mark inside a body by it; only if none is found, an end
  /// mark alone is enough.
  Result<void> read_device_run() {
    std::optional<Error> error;
    if (has_footers_.value_or(true)) {
      for (const bool need_description : {true, false}) {
        for (const uint64_t bytes : device_window_bytes) {
          QV_ASSIGN(const auto ahead, cursor_.copy_ahead(bytes));
          const std::span<const std::byte> view(ahead);
          auto run = split_section_run(
              view, 0, [&](size_t at) { return is_run_end(view, at, need_description); });
          if (run) {
            has_footers_ = true;
            return take_run(view, *run);
          }
          error = std::move(run).error();
          if (ahead.size() < bytes) {
            break;
          }
        }
      }
    }
    if (!has_footers_.value_or(false)) {
      for (const uint64_t bytes : device_window_bytes) {
        QV_ASSIGN(const auto ahead, cursor_.copy_ahead(bytes));
        auto run = split_described_run(ahead);
        if (run) {
          has_footers_ = false;
          return take_run(ahead, *run);
        }
        if (!error) {
          error = std::move(run).error();
        }
        if (ahead.size() < bytes) {
          break;
        }
      }
    }
    return tl::unexpected(with_context(std::move(*error), "vmstate stream"));
  }

  bool is_run_end(std::span<const std::byte> ahead, size_t at, bool need_description) const {
    if (at >= ahead.size()) {
      return false;
    }
    switch (static_cast<uint8_t>(ahead[at])) {
      case section_eof:
        return !need_description || description_bytes(ahead.subspan(at + 1)).has_value();
      case section_start:
      case section_full: {
        const auto header = parse_section_header(ahead, at);
        return header && header->idstr == "ram";
      }
      case section_part:
      case section_end:
        return ram_id_ && ahead.size() - at >= 5 &&
               load_be<uint32_t>(ahead.data() + at + 1) == *ram_id_;
      case section_command:
        return ahead.size() - at >= 5 && is_command(load_be<uint16_t>(ahead.data() + at + 1),
                                                    load_be<uint16_t>(ahead.data() + at + 3));
      default:
        return false;
    }
  }

  Result<void> take_run(std::span<const std::byte> ahead, const SectionRun &run) {
    if (summary_.devices.size() + run.sections.size() > device_sections_max) {
      return cursor_.bad("more than " + std::to_string(device_sections_max) + " device sections");
    }
    for (const DeviceSection &section : run.sections) {
      const auto at = static_cast<uint64_t>(section.body.data() - ahead.data());
      summary_.devices.push_back({section.idstr, section.instance, section.version,
                                  cursor_.tell() + at, section.body.size()});
    }
    cursor_.skip(run.end);
    return {};
  }

  /// What belongs to the transport is passed over. A package holds sections and commands as the
  /// stream around it does, so it is read as a part of that; pages that postcopy discards come
  /// again.
  Result<void> read_command() {
    QV_ASSIGN(const uint16_t command, cursor_.take_integer<uint16_t>());
    QV_ASSIGN(const uint16_t bytes, cursor_.take_integer<uint16_t>());
    if (!is_command(command, bytes)) {
      return cursor_.not_decoded("command " + std::to_string(command) + " of " +
                                 std::to_string(bytes) + " bytes");
    }
    QV_ASSIGN(const auto payload, cursor_.take(bytes));
    if (command == command_postcopy_advise && bytes > 0) {
      ram_.expect_host_page_bytes(load_be<uint64_t>(payload.data()));
      const auto page_bytes = load_be<uint64_t>(payload.data() + 8);
      if (!ram_.set_page_bytes(page_bytes)) {
        return cursor_.bad("pages of " + std::to_string(page_bytes) + " bytes");
      }
    }
    return {};
  }

  /// Records to the end mark, and the footer. Whether there are footers the first section tells.
  Result<void> read_ram_section() {
    QV_TRY(ram_.read_body());
    if (!has_footers_) {
      QV_ASSIGN(const auto next, cursor_.peek(1));
      has_footers_ = static_cast<uint8_t>(next[0]) == section_footer;
    }
    if (*has_footers_) {
      QV_ASSIGN(const uint8_t type, cursor_.take_integer<uint8_t>());
      QV_ASSIGN(const uint32_t id, cursor_.take_integer<uint32_t>());
      if (type != section_footer || id != *ram_id_) {
        return cursor_.bad("a RAM section without footer");
      }
    }
    return {};
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

  StreamCursor cursor_;
  StreamOffset start_;
  StreamSummary summary_;
  RamRecords ram_;
  std::optional<uint32_t> ram_id_;
  std::optional<bool> has_footers_;  ///< not known before the first section
};

}  // namespace

const char *layout_name(Layout layout) {
  return layout == Layout::mapped_ram ? "mapped-ram" : "legacy";
}

Result<StreamSummary> read_stream(StreamSource &source, StreamOffset start,
                                  const StreamHooks &hooks) {
  if (start.value > source.bytes_max()) {
    return fail(ErrorCode::bad_stream, "vmstate stream: would begin at byte " +
                                           std::to_string(start.value) + ", past the end at byte " +
                                           std::to_string(source.bytes_max()));
  }
  return Reader(source, start, hooks).read();
}

Result<StreamSummary> read_stream(StreamSource &source, const PageHook &hook, StreamOffset start,
                                  const BlocksHook &blocks_hook) {
  return read_stream(source, start, {.page = hook, .blocks = blocks_hook});
}

bool has_plain_pages(const StreamSummary &stream) {
  return stream.compressed_pages == 0 && stream.xbzrle_pages == 0;
}

Result<void> check_room_for_pages(const StreamSummary &stream, uint64_t stream_bytes_max) {
  constexpr uint64_t record_bytes_min = 8 + 1;  // of a zero page
  uint64_t pages_max = stream_bytes_max / record_bytes_min;
  for (const StreamBlock &block : stream.blocks) {
    const uint64_t pages = block.used_bytes / stream.page_bytes;
    if (stream.layout == Layout::legacy && pages > pages_max) {
      return fail(ErrorCode::bad_stream,
                  "vmstate stream: RAM block '" + block.idstr +
                      "' has more pages than the stream has room for; it is cut short or damaged");
    }
    pages_max -= std::min(pages, pages_max);
  }
  return {};
}

bool is_left_out(const StreamSummary &stream, size_t block) {
  return stream.blocks[block].page_records == 0 &&
         std::ranges::find(stream.capabilities, ignore_shared_capability) !=
             stream.capabilities.end();
}

}  // namespace qvmstate::vmstate
