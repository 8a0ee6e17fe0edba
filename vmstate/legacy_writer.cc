#include "vmstate/legacy_writer.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <optional>

#include "qcow2/io/endian.h"
#include "vmstate/page_scan.h"
#include "vmstate/section_scan.h"
#include "vmstate/stream_format.h"
#include "vmstate/stream_parts.h"

namespace qvmstate::vmstate {
namespace {

constexpr size_t page_header_bytes = 8;
constexpr size_t zero_record_bytes = page_header_bytes + 1;
// What is read before it is looked at again for zeros: small enough to be still in the L2 cache.
constexpr size_t batch_bytes = 256 * kib;
constexpr uint64_t hook_interval_bytes = 4 * mib;

}  // namespace

/// One pass over RAM.
class LegacyWriter::Round {
 public:
  Round(LegacyWriter &writer, RamSource &ram, const RamHook &hook, const DirtyPages *dirty)
      : out_(*writer.out_),
        ram_(ram),
        hook_(hook),
        dirty_(dirty),
        page_bytes_(writer.configuration_.page_bytes),
        record_bytes_(page_header_bytes + page_bytes_),
        scratch_(writer.scratch_),
        stats_(writer.stats_) {}

  Result<void> put_all() {
    RamOrder *order = dirty_ == nullptr ? ram_.order() : nullptr;
    if (order != nullptr) {
      QV_TRY(put_in_order(*order));
    } else {
      for (size_t block = 0; block < ram_.blocks().size(); ++block) {
        QV_TRY(put_block(block));
      }
    }
    return hook_ && done_bytes_ > reported_bytes_ ? hook_(done_bytes_) : Result<void>{};
  }

 private:
  Result<void> put_block(size_t block) {
    const uint64_t end = ram_.blocks()[block].used_bytes / page_bytes_;
    bool named = false;
    for (uint64_t page = first_wanted(block, 0, end); page < end;
         page = first_wanted(block, page, end)) {
      const uint64_t run_end = dirty_ == nullptr ? end : dirty_->first_clean(block, page, end);
      if (!named) {
        QV_TRY(put_named_page(block, page * page_bytes_));
        named = true;
        page += 1;
      }
      QV_TRY(put_pages(block, page, run_end));
      page = run_end;
    }
    return {};
  }

  Result<void> put_in_order(RamOrder &order) {
    std::optional<size_t> named;  // the block that CONTINUE means
    for (;;) {
      QV_ASSIGN(const std::optional<RamRange> range, order.next());
      if (!range) {
        return {};
      }
      uint64_t page = range->offset / page_bytes_;
      const uint64_t end = page + range->bytes / page_bytes_;
      if (named != range->block) {
        QV_TRY(put_named_page(range->block, range->offset));
        named = range->block;
        page += 1;
      }
      QV_TRY(put_pages(range->block, page, end));
    }
  }

  uint64_t first_wanted(size_t block, uint64_t page, uint64_t end) const {
    return dirty_ == nullptr ? page : dirty_->first_dirty(block, page, end);
  }

  /// Records that carry CONTINUE.
  Result<void> put_pages(size_t block, uint64_t page, uint64_t end) {
    while (page < end) {
      QV_ASSIGN(const Run run, run_at(block, page * page_bytes_));
      const uint64_t pages = std::min(run.pages, end - page);
      if (run.touched) {
        QV_TRY(put_data_run(block, page * page_bytes_, pages));
      } else {
        QV_TRY(put_untouched_run(page * page_bytes_, pages));
      }
      page += pages;
    }
    return {};
  }

  struct Run {
    bool touched;
    uint64_t pages;  ///< > 0
  };

  /// What presence() says of the pages from `offset` on. A page only part of which is untouched
  /// counts as touched.
  Result<Run> run_at(size_t block, uint64_t offset) {
    QV_ASSIGN(const RamSource::Presence presence, ram_.presence(block, offset));
    const uint64_t bytes = std::min(presence.bytes, ram_.blocks()[block].used_bytes - offset);
    if (bytes == 0) {
      return fail(ErrorCode::bad_argument, "vmstate stream: RAM block \"" +
                                               ram_.blocks()[block].idstr +
                                               "\": its source names an empty range");
    }
    if (presence.touched || bytes < page_bytes_) {
      return Run{true, divide_up(bytes, page_bytes_)};
    }
    return Run{false, bytes / page_bytes_};
  }

  /// The first record of a block carries its name.
  Result<void> put_named_page(size_t block, uint64_t offset) {
    QV_ASSIGN(const Run run, run_at(block, offset));
    std::byte *const page = scratch_.data();
    bool zero = true;
    if (run.touched) {
      QV_TRY(read_page(block, offset, page));
      zero = is_zero(page, page_bytes_);
    }
    StreamPart record;
    record.add(offset | (zero ? ram_zero : ram_page));
    record.add_short_text(ram_.blocks()[block].idstr);
    if (zero) {
      record.add(uint8_t{0});
      (run.touched ? stats_.zero_pages : stats_.untouched_pages) += 1;
    }
    QV_TRY(out_.put(record.span()));
    if (!zero) {
      stats_.data_pages += 1;
      QV_TRY(out_.put({page, page_bytes_}));
    }
    return report(1);
  }

  Result<void> read_page(size_t block, uint64_t offset, std::byte *to) {
    stats_.copied_bytes += page_bytes_;
    if (const std::byte *memory = ram_.view(block)) {
      std::memcpy(to, memory + offset, page_bytes_);
      return {};
    }
    return ram_.read_pages(block, offset, 1, page_bytes_, to, record_bytes_);
  }

  Result<void> put_untouched_run(uint64_t offset, uint64_t pages) {
    while (pages > 0) {
      QV_ASSIGN(const std::span<std::byte> room, out_.space());
      uint64_t count = std::min<uint64_t>(pages, room.size() / zero_record_bytes);
      if (count == 0) {
        count = 1;
        put_zero_record(scratch_.data(), offset);
        QV_TRY(out_.put({scratch_.data(), zero_record_bytes}));
      } else {
        std::byte *to = room.data();
        for (uint64_t i = 0; i < count; ++i) {
          to = put_zero_record(to, offset + i * page_bytes_);
        }
        QV_TRY(out_.advance(to - room.data()));
      }
      stats_.untouched_pages += count;
      QV_TRY(report(count));
      offset += count * page_bytes_;
      pages -= count;
    }
    return {};
  }

  Result<void> put_data_run(size_t block, uint64_t offset, uint64_t pages) {
    const std::byte *memory = ram_.view(block);
    const uint64_t batch = batch_bytes / page_bytes_;
    while (pages > 0) {
      QV_ASSIGN(const std::span<std::byte> room, out_.space());
      const uint64_t count = std::min({pages, batch, room.size() / record_bytes_});
      if (count == 0) {
        QV_TRY(put_straddling_page(block, offset));
        offset += page_bytes_;
        pages -= 1;
        QV_TRY(report(1));
        continue;
      }
      std::byte *end = nullptr;
      if (memory != nullptr) {
        end = copy_pages(memory, offset, count, room.data());
      } else {
        QV_TRY(ram_.read_pages(block, offset, count, page_bytes_, room.data() + page_header_bytes,
                               record_bytes_));
        stats_.copied_bytes += count * page_bytes_;
        end = frame_pages(offset, count, room.data());
      }
      QV_TRY(out_.advance(end - room.data()));
      offset += count * page_bytes_;
      pages -= count;
      QV_TRY(report(count));
    }
    return {};
  }

  /// From memory of this process: zero pages are seen where they are, the others copied.
  std::byte *copy_pages(const std::byte *memory, uint64_t offset, uint64_t count, std::byte *to) {
    for (uint64_t i = 0; i < count; ++i, offset += page_bytes_) {
      if (is_zero(memory + offset, page_bytes_)) {
        to = put_zero_record(to, offset);
        stats_.zero_pages += 1;
      } else {
        store_be<uint64_t>(to, offset | ram_page | ram_continue);
        std::memcpy(to + page_header_bytes, memory + offset, page_bytes_);
        to += record_bytes_;
        stats_.data_pages += 1;
        stats_.copied_bytes += page_bytes_;
      }
    }
    return to;
  }

  /// From pages already read to where they stand if none before them is zero; behind a zero page
  /// the rest moves down.
  std::byte *frame_pages(uint64_t offset, uint64_t count, std::byte *room) {
    std::byte *to = room;
    for (uint64_t i = 0; i < count; ++i, offset += page_bytes_) {
      const std::byte *page = room + i * record_bytes_ + page_header_bytes;
      if (is_zero(page, page_bytes_)) {
        to = put_zero_record(to, offset);
        stats_.zero_pages += 1;
      } else {
        if (to + page_header_bytes != page) {
          std::memmove(to + page_header_bytes, page, page_bytes_);
        }
        store_be<uint64_t>(to, offset | ram_page | ram_continue);
        to += record_bytes_;
        stats_.data_pages += 1;
      }
    }
    return to;
  }

  /// A page whose record would not fit into what is left of the current buffer.
  Result<void> put_straddling_page(size_t block, uint64_t offset) {
    std::byte *const record = scratch_.data();
    QV_TRY(read_page(block, offset, record + page_header_bytes));
    return out_.put({record, static_cast<size_t>(frame_pages(offset, 1, record) - record)});
  }

  std::byte *put_zero_record(std::byte *to, uint64_t offset) {
    store_be<uint64_t>(to, offset | ram_zero | ram_continue);
    to[page_header_bytes] = std::byte{0};
    return to + zero_record_bytes;
  }

  Result<void> report(uint64_t pages) {
    done_bytes_ += pages * page_bytes_;
    if (hook_ && done_bytes_ - reported_bytes_ >= hook_interval_bytes) {
      reported_bytes_ = done_bytes_;
      return hook_(done_bytes_);
    }
    return {};
  }

  io::StreamBuffer &out_;
  RamSource &ram_;
  const RamHook &hook_;
  const DirtyPages *dirty_;
  const uint64_t page_bytes_;
  const uint64_t record_bytes_;
  std::vector<std::byte> &scratch_;
  StreamStats &stats_;
  uint64_t done_bytes_ = 0;
  uint64_t reported_bytes_ = 0;
};

LegacyWriter::LegacyWriter(io::StreamBuffer &out, const StreamConfiguration &configuration,
                           std::span<const RamBlock> blocks,
                           std::span<const DeviceSection> before_ram)
    : out_(&out),
      configuration_(configuration),
      blocks_(blocks.begin(), blocks.end()),
      devices_{{before_ram.begin(), before_ram.end()}, {}},
      start_(out.tell()),
      scratch_(page_header_bytes + 1 + section_idstr_bytes_max + configuration.page_bytes) {
  stats_.ram_bytes = total_bytes(blocks);
}

Result<LegacyWriter> LegacyWriter::begin(io::StreamBuffer &out,
                                         const StreamConfiguration &configuration,
                                         std::span<const RamBlock> blocks,
                                         std::span<const DeviceSection> before_ram) {
  QV_TRY(check_stream_arguments(configuration, blocks));
  LegacyWriter writer(out, configuration, blocks, before_ram);
  StreamPart head;
  add_stream_head(head, configuration, {}, before_ram);
  add_ram_start(head, writer.stats_.ram_bytes);
  for (const RamBlock &block : blocks) {
    head.add_short_text(block.idstr);
    head.add(block.used_bytes);
  }
  add_ram_body_end(head);
  QV_TRY(out.put(head.span()));
  return writer;
}

Result<void> LegacyWriter::put_pages(RamSource &ram, const RamHook &hook, const DirtyPages *dirty) {
  assert(std::ranges::equal(ram.blocks(), blocks_, {}, &RamBlock::idstr, &RamBlock::idstr));
  StreamPart part;
  add_ram_continuation(part, section_part);
  QV_TRY(out_->put(part.span()));
  QV_TRY(Round(*this, ram, hook, dirty).put_all());
  StreamPart end;
  add_ram_body_end(end);
  return out_->put(end.span());
}

Result<StreamStats> LegacyWriter::finish(std::span<const DeviceSection> after_ram) {
  devices_.after_ram.assign(after_ram.begin(), after_ram.end());
  StreamPart tail;
  add_ram_continuation(tail, section_end);
  add_ram_body_end(tail);
  add_stream_tail(tail, configuration_, devices_);
  QV_TRY(out_->put(tail.span()));
  stats_.stream_bytes = out_->tell() - start_;
  QV_TRY(out_->finish());
  return stats_;
}

Result<StreamStats> write_legacy_stream(io::StreamBuffer &out,
                                        const StreamConfiguration &configuration, RamSource &ram,
                                        const LoadOrder &devices, const RamHook &hook) {
  QV_ASSIGN(LegacyWriter writer,
            LegacyWriter::begin(out, configuration, ram.blocks(), devices.before_ram));
  QV_TRY(writer.put_pages(ram, hook));
  return writer.finish(devices.after_ram);
}

}  // namespace qvmstate::vmstate
