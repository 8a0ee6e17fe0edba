#include "vmstate/aligned_writer.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cerrno>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "qcow2/io/endian.h"
#include "vmstate/aligned_group.h"
#include "vmstate/page_scan.h"
#include "vmstate/stream_format.h"

namespace qvmstate::vmstate {
namespace {

constexpr uint64_t hook_interval_bytes = 4 * mib;
constexpr uint64_t kept_alignment_bytes = 4096;
constexpr size_t zero_record_bytes = 8 + 1;
constexpr size_t zero_records_at_once = 512;
constexpr uint64_t groups_at_once = 1024;  // looked at before those that changed are written

/// Makes groups of RAM. Threads: one at a time.
class GroupReader {
 public:
  GroupReader(RamSource &ram, uint64_t group_bytes) : ram_(&ram), scratch_(group_bytes) {}

  /// `bytes` are the group if it has data.
  Result<Group> read(size_t block, const GroupPlace &place, std::span<std::byte> bytes) {
    QV_TRY(find_run(block, place.first_page * aligned_page_bytes));
    if (!run_touched_ && run_end_ >= (place.first_page + place.pages) * aligned_page_bytes) {
      return Group();
    }
    std::byte *const data = begin_group(bytes, place);
    QV_TRY(read_pages(block, place, data));
    if (are_zero(data, place.pages)) {
      return Group{Group::Kind::zero, {}};
    }
    digest_.add(bytes);
    return Group{Group::Kind::data, digest_.finish()};
  }
  Result<Group> look_at(size_t block, const GroupPlace &place) {
    return read(block, place, scratch_);
  }
  uint64_t copied_bytes() const { return copied_bytes_; }

 private:
  /// What presence() says of the page at `offset`, and how far it holds.
  Result<void> find_run(size_t block, uint64_t offset) {
    if (block == run_block_ && offset >= run_begin_ && offset < run_end_) {
      return {};
    }
    QV_ASSIGN(const RamSource::Presence presence, ram_->presence(block, offset));
    if (presence.bytes == 0) {
      return fail(ErrorCode::bad_argument, "vmstate stream: RAM block \"" +
                                               ram_->blocks()[block].idstr +
                                               "\": its source names an empty range");
    }
    run_block_ = block;
    run_touched_ = presence.touched;
    run_begin_ = offset;
    run_end_ = offset + presence.bytes;
    return {};
  }

  Result<void> read_pages(size_t block, const GroupPlace &place, std::byte *to) {
    const std::byte *const memory = ram_->view(block);
    const uint64_t end = place.first_page + place.pages;
    for (uint64_t page = place.first_page; page < end;) {
      const uint64_t offset = page * aligned_page_bytes;
      QV_TRY(find_run(block, offset));
      const uint64_t count = std::min(end - page, (run_end_ - offset) / aligned_page_bytes);
      if (run_touched_ && memory == nullptr) {
        QV_TRY(ram_->read_pages(block, offset, count, aligned_page_bytes, to, group_page_stride));
      }
      for (uint64_t i = 0; i < count && (!run_touched_ || memory != nullptr); ++i) {
        std::byte *const one = to + i * group_page_stride;
        if (run_touched_) {
          std::memcpy(one, memory + offset + i * aligned_page_bytes, aligned_page_bytes);
        } else {
          std::memset(one, 0, aligned_page_bytes);
        }
      }
      copied_bytes_ += run_touched_ ? count * aligned_page_bytes : 0;
      to += count * group_page_stride;
      page += count;
    }
    return {};
  }

  static bool are_zero(const std::byte *data, uint64_t pages) {
    for (uint64_t i = 0; i < pages; ++i) {
      if (!is_zero(data + i * group_page_stride, aligned_page_bytes)) {
        return false;
      }
    }
    return true;
  }

  RamSource *ram_;
  std::vector<std::byte> scratch_;
  PieceDigest digest_;
  size_t run_block_ = SIZE_MAX;
  bool run_touched_ = false;
  uint64_t run_begin_ = 0;  // in the block
  uint64_t run_end_ = 0;
  uint64_t copied_bytes_ = 0;
};

class AlignedWriter {
 public:
  AlignedWriter(io::StreamBuffer &out, const StreamConfiguration &configuration, RamSource &ram,
                const LoadOrder &devices, const AlignedOptions &options, const RamHook &hook)
      : out_(out),
        configuration_(configuration),
        ram_(ram),
        devices_(devices),
        group_bytes_(options.group_bytes),
        pages_per_group_(pages_per_group(options.group_bytes)),
        base_(options.base),
        groups_(options.groups != nullptr ? *options.groups : own_groups_),
        hook_(hook),
        digest_(options.group_bytes),
        scratch_(options.group_bytes) {
    readers_.emplace_back(ram, options.group_bytes);
    for (RamSource *again : options.ram_again) {
      readers_.emplace_back(*again, options.group_bytes);
    }
    if (options.groups == nullptr) {
      own_groups_ = nothing_known(ram.blocks(), options.group_bytes);
    }
  }

  Result<StreamStats> write() {
    stats_.ram_bytes = total_bytes(ram_.blocks());
    QV_TRY(put_head());
    for (size_t block = 0; block < ram_.blocks().size(); ++block) {
      QV_TRY(put_groups(block));
    }
    QV_TRY(hook_ ? hook_(stats_.ram_bytes) : Result<void>());
    QV_TRY(put_shared());
    for (size_t block = 0; block < ram_.blocks().size(); ++block) {
      QV_TRY(put_zero_pages(block));
    }
    QV_TRY(put_tail());
    QV_TRY(put_kept_digests());
    QV_TRY(out_.finish());
    for (const GroupReader &reader : readers_) {
      stats_.copied_bytes += reader.copied_bytes();
    }
    return stats_;
  }

 private:
  Result<void> put(std::span<const std::byte> bytes) {
    digest_.add(bytes);
    return out_.put(bytes);
  }

  /// Up to the first group.
  Result<void> put_head() {
    StreamPart head;
    add_stream_head(head, configuration_, {}, devices_.before_ram);
    add_ram_start(head, stats_.ram_bytes);
    for (const RamBlock &block : ram_.blocks()) {
      head.add_short_text(block.idstr);
      head.add(block.used_bytes);
    }
    add_ram_body_end(head);
    add_ram_continuation(head, section_part);
    const RamBlock &first = ram_.blocks().front();
    const uint64_t end = round_up(head.span().size() + filling_bytes_min(first), group_bytes_);
    std::vector<std::byte> filling(end - head.span().size());
    put_filling(filling, first, 0);
    QV_TRY(put(head.span()));
    return put(filling);
  }

  Result<void> put_groups(size_t block) {
    const uint64_t groups = groups_[block].size();
    assert(groups == groups_in(ram_.blocks()[block], group_bytes_));
    for (uint64_t begin = 0; begin < groups; begin += groups_at_once) {
      const uint64_t end = std::min(groups, begin + groups_at_once);
      QV_TRY(look_at(block, begin, end));
      for (uint64_t i = begin; i < end; ++i) {
        QV_TRY(put_group(block, i));
        QV_TRY(report(place_of(block, i).pages));
      }
    }
    return {};
  }

  GroupPlace place_of(size_t block, uint64_t group) const {
    const RamBlock &described = ram_.blocks()[block];
    const uint64_t first = group * pages_per_group_;
    const uint64_t pages = described.used_bytes / aligned_page_bytes;
    return {&described, first, std::min(pages_per_group_, pages - first)};
  }

  /// What groups are of which that is not known, found out by as many threads as there are readers.
  /// Those that turn out to be others than in the base are read once more, to be written. Where the
  /// most are known, the others are likely to have changed, and are only read then.
  Result<void> look_at(size_t block, uint64_t begin, uint64_t end) {
    std::vector<std::optional<Group>> &groups = groups_[block];
    looked_at_.clear();
    for (uint64_t i = begin; i < end; ++i) {
      if (!groups[i]) {
        looked_at_.push_back(i);
      }
    }
    if (base_ == nullptr || looked_at_.size() < (end - begin) / 2) {
      looked_at_.clear();
      return {};
    }
    const size_t share = divide_up(looked_at_.size(), readers_.size());
    std::vector<Result<void>> results(readers_.size());
    const auto look = [&](size_t reader) -> Result<void> {
      const size_t last = std::min(looked_at_.size(), (reader + 1) * share);
      for (size_t i = reader * share; i < last; ++i) {
        QV_ASSIGN(groups[looked_at_[i]],
                  readers_[reader].look_at(block, place_of(block, looked_at_[i])));
      }
      return {};
    };
    const auto run = [&](size_t reader) {
      try {
        results[reader] = look(reader);
      } catch (const std::bad_alloc &) {
        results[reader] = fail_errno(ENOMEM, "looking for what has changed");
      }
    };
    {
      std::vector<std::jthread> threads;
      for (size_t i = 1; i < readers_.size(); ++i) {
        try {
          threads.emplace_back(run, i);
        } catch (const std::system_error &) {
          run(i);  // slower, but done
        }
      }
      run(0);
    }
    for (Result<void> &result : results) {
      QV_TRY(result);
    }
    stats_.read_groups += static_cast<uint64_t>(std::ranges::count_if(
        looked_at_, [&](uint64_t i) { return groups[i]->kind != Group::Kind::untouched; }));
    return {};
  }

  Result<void> put_group(size_t block, uint64_t number) {
    const GroupPlace place = place_of(block, number);
    std::optional<Group> &group = groups_[block][number];
    const bool looked_at = std::ranges::binary_search(looked_at_, number);
    if (group && can_leave_out(*group)) {
      stats_.known_groups += looked_at ? 0 : 1;
      count(group->kind, place.pages);
      return {};
    }
    // Where it goes if it is written, so that it need not be copied there.
    QV_ASSIGN(const std::span<std::byte> room, out_.space());
    const bool in_place = room.size() >= group_bytes_;
    const std::span<std::byte> bytes = in_place ? room.first(group_bytes_) : std::span(scratch_);
    QV_ASSIGN(group, readers_[0].read(block, place, bytes));
    stats_.read_groups += looked_at || group->kind == Group::Kind::untouched ? 0 : 1;
    count(group->kind, place.pages);
    if (can_leave_out(*group)) {
      return {};
    }
    stats_.written_groups += 1;
    digest_.add_piece(group->digest);
    return in_place ? out_.advance(group_bytes_) : out_.put(bytes);
  }

  /// It is no data, or stands in the base, whose clusters are shared then.
  bool can_leave_out(const Group &group) {
    if (group.kind != Group::Kind::data) {
      return true;
    }
    if (base_ == nullptr || !base_->share(group.digest)) {
      return false;
    }
    shared_.push_back(group.digest);
    return true;
  }

  void count(Group::Kind kind, uint64_t pages) {
    (kind == Group::Kind::data   ? stats_.data_pages
     : kind == Group::Kind::zero ? stats_.zero_pages
                                 : stats_.untouched_pages) += pages;
  }

  Result<void> put_shared() {
    stats_.shared_groups = shared_.size();
    for (const Digest &digest : shared_) {
      digest_.add_piece(digest);
    }
    if (shared_.empty()) {
      return {};
    }
    QV_TRY(out_.skip(shared_.size() * group_bytes_));
    return base_->place();
  }

  Result<void> put_zero_pages(size_t block) {
    const RamBlock &described = ram_.blocks()[block];
    const uint64_t pages = described.used_bytes / aligned_page_bytes;
    StreamPart records;
    bool named = false;
    for (uint64_t page = 0; page < pages; ++page) {
      if (groups_[block][page / pages_per_group_]->kind == Group::Kind::data) {
        continue;
      }
      records.add(page * aligned_page_bytes | ram_zero | (named ? ram_continue : 0));
      if (!named) {
        records.add_short_text(described.idstr);
        named = true;
      }
      records.add(uint8_t{0});
      if (records.span().size() >= zero_records_at_once * zero_record_bytes) {
        QV_TRY(put(records.span()));
        records = {};
      }
    }
    return put(records.span());
  }

  Result<void> put_tail() {
    StreamPart tail;
    add_ram_body_end(tail);
    add_ram_continuation(tail, section_end);
    add_ram_body_end(tail);
    add_stream_tail(tail, configuration_, devices_);
    QV_TRY(put(tail.span()));
    stats_.stream_bytes = digest_.bytes();
    assert(out_.tell() == stats_.stream_bytes);
    return {};
  }

  Result<void> put_kept_digests() {
    stats_.checksum = digest_.finish();
    const uint64_t offset = round_up(stats_.stream_bytes, kept_alignment_bytes);
    stats_.checksum->kept_offset = offset;
    const std::array<std::byte, kept_alignment_bytes> zeros = {};
    QV_TRY(out_.put(std::span(zeros).first(offset - stats_.stream_bytes)));
    return out_.put(std::as_bytes(digest_.digests()));
  }

  Result<void> report(uint64_t pages) {
    done_bytes_ += pages * aligned_page_bytes;
    if (hook_ && done_bytes_ - reported_bytes_ >= hook_interval_bytes) {
      reported_bytes_ = done_bytes_;
      return hook_(done_bytes_);
    }
    return {};
  }

  io::StreamBuffer &out_;
  const StreamConfiguration &configuration_;
  RamSource &ram_;
  const LoadOrder &devices_;
  const uint64_t group_bytes_;
  const uint64_t pages_per_group_;
  BaseState *const base_;
  KnownGroups own_groups_;
  KnownGroups &groups_;
  const RamHook &hook_;
  StreamStats stats_;
  StreamDigest digest_;  // of the stream
  std::vector<GroupReader> readers_;
  std::vector<std::byte> scratch_;   // a group
  std::vector<uint64_t> looked_at_;  // groups of the block that is being written
  std::vector<Digest> shared_;
  uint64_t done_bytes_ = 0;
  uint64_t reported_bytes_ = 0;
};

}  // namespace

Result<StreamStats> write_aligned_stream(io::StreamBuffer &out,
                                         const StreamConfiguration &configuration, RamSource &ram,
                                         const LoadOrder &devices, const AlignedOptions &options,
                                         const RamHook &hook) {
  assert(out.tell() == 0);
  QV_TRY(check_stream_arguments(configuration, ram.blocks()));
  if (configuration.page_bytes != aligned_page_bytes) {
    return fail(ErrorCode::not_supported,
                "vmstate stream: the layout stream-aligned is for pages of 4096 bytes, and these "
                "have " +
                    std::to_string(configuration.page_bytes) + "; use --layout legacy");
  }
  return AlignedWriter(out, configuration, ram, devices, options, hook).write();
}

}  // namespace qvmstate::vmstate
