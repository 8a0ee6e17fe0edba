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
constexpr uint64_t presence_pages_max = 8192;  // looked at for one answer

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
      if (places[i] == page_is_zero) {
        std::memset(to + i * stride, 0, page_bytes);
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

  Result<void> read_scratch(StreamOffset at, uint64_t bytes) {
    scratch_.resize(std::max<size_t>(scratch_.size(), bytes));
    return source_->read(at, std::span(scratch_).first(bytes));
  }

  const StoredState &state_;
  std::unique_ptr<StreamSource> source_;
  const uint64_t page_bytes_;
  std::vector<std::byte> scratch_;
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

Result<void> StoredState::read_all(StreamSource &source, StreamOffset start) {
  std::optional<StreamOffset> place;
  const PageHook on_page = [&](size_t block, uint64_t offset, uint64_t page_bytes,
                               std::span<const std::byte> data) -> Result<void> {
    uint64_t &page = pages_[block][offset / page_bytes];
    if (data.empty()) {
      page = page_is_zero;
      return {};
    }
    if (!place) {
      return fail(ErrorCode::not_supported,
                  "vmstate stream: a page of RAM is not stored as it is (XBZRLE or compressed); "
                  "let QEMU load it and save it anew");
    }
    page = std::exchange(place, std::nullopt)->value;
    return {};
  };
  const BlocksHook on_blocks = [&](const StreamSummary &so_far) -> Result<void> {
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
  };
  // The pages of mapped-ram are not of interest yet; a hook for them would read them.
  bool is_legacy = true;
  StreamHooks hooks;
  hooks.page = on_page;
  hooks.blocks = [&](const StreamSummary &so_far) -> Result<void> {
    is_legacy = so_far.layout == Layout::legacy;
    if (!is_legacy) {
      return fail(ErrorCode::cancelled, "another layout");
    }
    return on_blocks(so_far);
  };
  // A page that is a difference has no place, and on_page refuses it.
  hooks.page_now = [](size_t, uint64_t, std::span<std::byte>) { return Result<void>(); };
  hooks.place = [&](StreamOffset at) { place = at; };
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
  for (const StreamSection &section : summary_.devices) {
    const uint64_t header_bytes = 1 + 4 + 1 + section.idstr.size() + 4 + 4;
    const uint64_t whole_bytes = header_bytes + section.bytes + section_footer_bytes;
    if (section.offset < header_bytes ||
        whole_bytes > source.bytes_max() - (section.offset - header_bytes)) {
      return fail(ErrorCode::bad_stream, "vmstate stream: section '" + section.idstr +
                                             "' does not lie in it; it is damaged");
    }
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
