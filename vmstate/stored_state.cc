#include "vmstate/stored_state.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "qcow2/io/endian.h"
#include "vmstate/mapped_block.h"
#include "vmstate/read_ahead_source.h"
#include "vmstate/section_scan.h"
#include "vmstate/stream_format.h"

namespace qvmstate::vmstate {
namespace {

constexpr uint64_t page_header_bytes = 8;
constexpr uint64_t presence_pages_max = 8192;   // looked at for one answer
constexpr uint64_t device_bytes_max = 1 << 30;  // QEMU's have some 100 KiB, frame buffers aside

}  // namespace

/// Reads RAM through a source of its own. Threads: one.
class StoredState::Ram : public RamSource {
 public:
  Ram(const StoredState &state, std::unique_ptr<StreamSource> source)
      : state_(state), source_(std::move(source)), page_bytes_(state.summary_.page_bytes) {}

  std::span<const RamBlock> blocks() const override { return state_.blocks_; }
  const std::byte *view(size_t) const override { return nullptr; }

  Result<Presence> presence(size_t block, uint64_t offset) override {
    const uint64_t bytes_max = state_.blocks_[block].used_bytes - offset;
    if (is_mapped()) {
      QV_ASSIGN(const MappedRun run,
                map_of(block).run_at(offset, std::min(bytes_max, mapped_portion_bytes)));
      return Presence{run.has_data, run.bytes};
    }
    const std::vector<uint64_t> &places = state_.pages_[block];
    const uint64_t first = offset / page_bytes_;
    const bool touched = places[first] != page_is_zero;
    const uint64_t end = std::min<uint64_t>(places.size(), first + presence_pages_max);
    uint64_t page = first + 1;
    while (page < end && (places[page] != page_is_zero) == touched) {
      ++page;
    }
    return Presence{touched, (page - first) * page_bytes_};
  }

  Result<void> read_pages(size_t block, uint64_t offset, size_t count, size_t page_bytes,
                          std::byte *to, size_t stride) override {
    const uint64_t bytes = count * page_bytes;
    if (is_mapped()) {
      const StreamOffset at = state_.summary_.blocks[block].mapped->pages_offset + offset;
      if (stride == page_bytes) {
        return source_->read(at, {to, bytes});
      }
      QV_TRY(read_scratch(at, bytes));
      for (size_t i = 0; i < count; ++i) {
        std::memcpy(to + i * stride, &scratch_[i * page_bytes], page_bytes);
      }
      return {};
    }
    const uint64_t *places = &state_.pages_[block][offset / page_bytes_];
    for (size_t i = 0; i < count;) {
      if (places[i] == page_is_zero || (places[i] & page_is_encoded) != 0) {
        QV_TRY(read_other(places[i], {to + i * stride, page_bytes}));
        ++i;
        continue;
      }
      // Records that follow one another are read at once, headers and all.
      const uint64_t record_bytes = page_header_bytes + page_bytes;
      size_t run = 1;
      while (i + run < count && places[i + run] == places[i] + run * record_bytes) {
        ++run;
      }
      QV_TRY(read_scratch(StreamOffset(places[i]), run * record_bytes - page_header_bytes));
      for (size_t k = 0; k < run; ++k) {
        std::memcpy(to + (i + k) * stride, &scratch_[k * record_bytes], page_bytes);
      }
      i += run;
    }
    return {};
  }

 private:
  bool is_mapped() const { return state_.summary_.layout == Layout::mapped_ram; }

  MappedBlockMap &map_of(size_t block) {
    if (map_block_ != block) {
      const StreamBlock &described = state_.summary_.blocks[block];
      map_.emplace(*source_, *described.mapped, described.used_bytes);
      map_block_ = block;
    }
    return *map_;
  }

  /// A page of zeros, or one that does not stand in the stream as it is.
  Result<void> read_other(uint64_t place, std::span<std::byte> page) {
    chain_.clear();
    while ((place & page_is_encoded) != 0) {
      const EncodedPage &encoded = state_.encoded_[place & ~page_is_encoded];
      chain_.push_back(&encoded);
      place = encoded.coding == PageCoding::difference ? encoded.before : page_is_zero;
    }
    if (place == page_is_zero) {
      std::ranges::fill(page, std::byte{0});
    } else {
      QV_TRY(source_->read(StreamOffset(place), page));
    }
    for (; !chain_.empty(); chain_.pop_back()) {
      const EncodedPage &encoded = *chain_.back();
      QV_TRY(read_scratch(StreamOffset(encoded.place), encoded.bytes));
      if (!decode_page(encoded.coding, std::span(scratch_).first(encoded.bytes), page)) {
        return fail(ErrorCode::bad_stream, "vmstate stream: the page at byte " +
                                               std::to_string(encoded.place) +
                                               " is another one now: the file was changed");
      }
    }
    return {};
  }

  Result<void> read_scratch(StreamOffset at, uint64_t bytes) {
    scratch_.resize(std::max<size_t>(scratch_.size(), bytes));
    return source_->read(at, std::span(scratch_).first(bytes));
  }

  const StoredState &state_;
  std::unique_ptr<StreamSource> source_;
  const uint64_t page_bytes_;
  std::vector<std::byte> scratch_;
  std::vector<const EncodedPage *> chain_;  ///< of a page, the last one first
  std::optional<size_t> map_block_;
  std::optional<MappedBlockMap> map_;
};

Result<std::unique_ptr<StoredState>> StoredState::open(SourceOpener open_source,
                                                       StreamOffset start) {
  std::unique_ptr<StoredState> state(new StoredState);
  state->open_source_ = std::move(open_source);
  QV_ASSIGN(auto opened, state->open_source_());
  QV_ASSIGN(auto source, ReadAheadSource::create(std::move(opened)));
  QV_TRY(state->read_all(*source, start));
  for (const StreamBlock &block : state->summary_.blocks) {
    state->blocks_.push_back({block.idstr, block.used_bytes, state->summary_.page_bytes});
  }
  QV_TRY(state->check_all_pages());
  QV_TRY(state->read_devices(*source));
  return state;
}

Result<void> StoredState::begin_blocks(const StreamSummary &so_far, uint64_t stream_bytes_max) {
  QV_TRY(check_room_for_pages(so_far, stream_bytes_max));
  for (const StreamBlock &block : so_far.blocks) {
    if (block.used_bytes % so_far.page_bytes != 0) {
      return fail(ErrorCode::bad_stream, "vmstate stream: RAM block '" + block.idstr +
                                             "' has a part of a page; it is damaged");
    }
    if (so_far.layout == Layout::legacy) {
      pages_.emplace_back(block.used_bytes / so_far.page_bytes, page_is_missing);
    }
  }
  return {};
}

Result<void> StoredState::note_page(uint64_t &page, const PagePlace &place) {
  if (place.coding == PageCoding::plain) {
    page = place.offset.value;
    return {};
  }
  if (place.coding == PageCoding::difference && page == page_is_missing) {
    return fail(ErrorCode::bad_stream, "vmstate stream: the difference (XBZRLE) before byte " +
                                           std::to_string(place.offset.value) +
                                           " is to a page that has no record");
  }
  encoded_.push_back({place.offset.value, page, place.bytes, place.coding});
  page = page_is_encoded | (encoded_.size() - 1);
  return {};
}

Result<void> StoredState::read_all(StreamSource &source, StreamOffset start) {
  PagePlace place;
  StreamHooks hooks;
  hooks.page = [&](size_t block, uint64_t offset, uint64_t page_bytes,
                   std::span<const std::byte> data) -> Result<void> {
    uint64_t &page = pages_[block][offset / page_bytes];
    if (data.empty()) {
      page = page_is_zero;
      return {};
    }
    return note_page(page, place);
  };
  const BlocksHook on_blocks = [&](const StreamSummary &so_far) {
    return begin_blocks(so_far, source.bytes_max());
  };
  // The pages of mapped-ram are not of interest yet; a hook for them would read them.
  bool is_legacy = true;
  hooks.blocks = [&](const StreamSummary &so_far) -> Result<void> {
    is_legacy = so_far.layout == Layout::legacy;
    if (!is_legacy) {
      return fail(ErrorCode::cancelled, "another layout");
    }
    return on_blocks(so_far);
  };
  // Whether a difference is valid does not hang on what it is applied to.
  hooks.page_now = [](size_t, uint64_t, std::span<std::byte>) { return Result<void>(); };
  hooks.place = [&](const PagePlace &at) { place = at; };
  auto summary = read_stream(source, start, hooks);
  if (!is_legacy) {
    summary = read_stream(source, {}, start, on_blocks);
  }
  QV_ASSIGN(summary_, std::move(summary));
  return {};
}

Result<void> StoredState::check_all_pages() const {
  for (size_t i = 0; i < pages_.size(); ++i) {
    const auto missing = std::ranges::count(pages_[i], page_is_missing);
    if (missing > 0) {
      return fail(ErrorCode::bad_stream, "vmstate stream: RAM block '" + blocks_[i].idstr +
                                             "': " + std::to_string(missing) +
                                             " pages have no record; `qvmstate check` tells more");
    }
  }
  return {};
}

Result<void> StoredState::read_devices(StreamSource &source) {
  uint64_t left_bytes = device_bytes_max;
  for (const StreamSection &section : summary_.devices) {
    const uint64_t header_bytes = 1 + 4 + 1 + section.idstr.size() + 4 + 4;
    const uint64_t whole_bytes = header_bytes + section.bytes + section_footer_bytes;
    if (section.offset < header_bytes ||
        whole_bytes > source.bytes_max() - (section.offset - header_bytes)) {
      return fail(ErrorCode::bad_stream, "vmstate stream: section '" + section.idstr +
                                             "' does not lie in it; it is damaged");
    }
    if (whole_bytes > left_bytes) {
      return fail(ErrorCode::not_supported,
                  "vmstate stream: more than " + std::to_string(device_bytes_max / mib) +
                      " MiB of device sections; let QEMU load it and save it anew");
    }
    left_bytes -= whole_bytes;
    std::vector<std::byte> whole(whole_bytes);
    QV_TRY(source.read(StreamOffset(section.offset - header_bytes), whole));
    const auto header = parse_section_header(whole, 0);
    const std::byte *footer = whole.data() + whole_bytes - section_footer_bytes;
    if (!header || header->bytes != header_bytes || header->type != section_full ||
        static_cast<uint8_t>(footer[0]) != section_footer ||
        load_be<uint32_t>(footer + 1) != header->id) {
      return fail(ErrorCode::not_supported,
                  "vmstate stream: section '" + section.idstr +
                      "' is iterative, or has no footer (machine types up to 2.3), and cannot be "
                      "written anew; let QEMU load it and save it anew");
    }
    const uint32_t id = header->id;
    device_bytes_.push_back(std::move(whole));
    const std::span<const std::byte> bytes = device_bytes_.back();
    devices_.push_back({id, section.idstr, section.instance, section.version,
                        bytes.subspan(header_bytes, section.bytes), bytes});
  }
  return {};
}

StreamConfiguration StoredState::configuration() const {
  StreamConfiguration configuration;
  configuration.machine_type = summary_.machine_type;
  configuration.target_page_bits = summary_.target_page_bits;
  configuration.page_bytes = summary_.page_bytes;
  configuration.vmdescription = summary_.vmdescription;
  return configuration;
}

Result<std::unique_ptr<RamSource>> StoredState::ram() const {
  QV_ASSIGN(auto source, open_source_());
  return std::unique_ptr<RamSource>(std::make_unique<Ram>(*this, std::move(source)));
}

}  // namespace qvmstate::vmstate
