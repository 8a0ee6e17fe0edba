#include "qcow2/vmstate_area.h"

#include <algorithm>
#include <cassert>

#include "qcow2/limits.h"

namespace qvmstate::qcow2 {
namespace {

// Zeros are flagged in units of at least this, so that small clusters do not break writes apart.
constexpr uint64_t zero_unit_bytes_min = 64 * kib;
// Taken at a time, so that units for a purpose lie beside each other. What is left over at the end
// stays as free clusters in the image, holes of the file.
constexpr uint64_t arena_bytes_max = 64 * mib;
constexpr uint64_t arena_parts = 16;  // of what is expected
// The largest page that a host of QEMU's has; whole pages of the page cache are ours or QEMU's.
constexpr uint64_t reserved_unit_bytes = 64 * kib;

}  // namespace

void find_host_runs(std::span<const AreaRun> area, const Geometry &geometry,
                    const io::StreamRange &range, std::vector<io::HostRun> &runs) {
  const uint64_t first = range.from.value / geometry.cluster_bytes();
  auto run = std::prev(std::ranges::upper_bound(area, first, {}, &AreaRun::stream_first));
  uint64_t at = range.from.value;
  const uint64_t end = at + range.bytes;
  for (; at < end; ++run) {
    assert(run != area.end());
    const uint64_t run_start = run->stream_first * geometry.cluster_bytes();
    const uint64_t part = std::min(end, run->stream_end() * geometry.cluster_bytes()) - at;
    runs.push_back({geometry.host_offset(run->host_first) + (at - run_start), part});
    at += part;
  }
}

uint64_t VmstateArea::bytes_max(const Header &header) {
  const Geometry &geometry = header.geometry;
  const uint64_t entries = l1_bytes_max / 8;
  const uint64_t first = geometry.vmstate_l1_index(header.disk_bytes);
  return first >= entries ? 0 : (entries - first) * geometry.span_bytes();
}

Result<void> VmstateArea::check_fits(uint64_t stream_bytes) const {
  const uint64_t most = bytes_max(image_.header());
  if (stream_bytes > most) {
    return fail(ErrorCode::no_space, image_.name() + ": the vmstate does not fit: with " +
                                         std::to_string(image_.geometry().cluster_bytes()) +
                                         "-byte clusters and this disk size an L1 table can map " +
                                         std::to_string(most) +
                                         " bytes of it; use an image with larger clusters");
  }
  return {};
}

void VmstateArea::note(const AreaRun &run) {
  auto after = std::ranges::upper_bound(runs_, run.stream_first, {}, &AreaRun::stream_first);
  if (after != runs_.begin()) {
    AreaRun &before = *std::prev(after);
    if (before.stream_end() == run.stream_first && before.shared == run.shared &&
        before.host_first + before.count == run.host_first) {
      before.count += run.count;
      return;
    }
  }
  runs_.insert(after, run);
}

Result<void> VmstateArea::place(StreamOffset from, uint64_t bytes, std::vector<io::HostRun> &runs) {
  assert(from.value == placed_bytes_);
  QV_TRY(check_fits(placed_bytes_ + bytes));
  const Geometry &geometry = image_.geometry();
  const uint64_t wanted_clusters = geometry.clusters_for(placed_bytes_ + bytes);
  while (clusters_ < wanted_clusters) {
    QV_ASSIGN(const ClusterRun run, allocator_.take_for_stream(wanted_clusters - clusters_));
    note({clusters_, run.first, run.count});
    clusters_ += run.count;
  }
  find_host_runs(runs_, geometry, {from, bytes}, runs);
  placed_bytes_ += bytes;
  return {};
}

bool VmstateArea::can_share(StreamOffset base_from, uint64_t bytes) const {
  const Geometry &geometry = image_.geometry();
  assert(geometry.aligned(base_from.value) && geometry.aligned(bytes));
  const uint64_t first = base_from.value >> geometry.cluster_bits;
  const uint64_t count = bytes >> geometry.cluster_bits;
  if (first > base_.size() || count > base_.size() - first) {
    return false;
  }
  return std::ranges::find(base_.begin() + static_cast<ptrdiff_t>(first),
                           base_.begin() + static_cast<ptrdiff_t>(first + count),
                           uint64_t{0}) == base_.begin() + static_cast<ptrdiff_t>(first + count);
}

Result<void> VmstateArea::share(StreamOffset base_from, uint64_t bytes) {
  const Geometry &geometry = image_.geometry();
  assert(can_share(base_from, bytes));
  assert(clusters_ << geometry.cluster_bits == placed_bytes_);
  QV_TRY(check_fits(placed_bytes_ + bytes));
  const uint64_t first = base_from.value >> geometry.cluster_bits;
  for (uint64_t i = 0; i < bytes >> geometry.cluster_bits; ++i) {
    note({clusters_, std::exchange(base_[first + i], 0), 1, true});
    clusters_ += 1;
  }
  placed_bytes_ += bytes;
  return {};
}

uint64_t VmstateArea::place_unit_bytes() const {
  return std::max(zero_unit_bytes_min, image_.geometry().cluster_bytes());
}

/// Clusters for one purpose, from those taken ahead.
Result<ClusterRun> VmstateArea::take_from_arena(uint64_t count, Fill fill) {
  ClusterRun &arena = fill == Fill::whole ? whole_arena_ : zeroed_arena_;
  if (arena.count == 0) {
    const uint64_t wanted_bytes =
        std::clamp(expected_bytes_ / arena_parts, place_unit_bytes(), arena_bytes_max);
    const uint64_t ahead =
        round_up(wanted_bytes, place_unit_bytes()) >> image_.geometry().cluster_bits;
    auto taken = allocator_.take_for_stream(std::max(ahead, count), Growth::sparse);
    if (!taken && taken.error().code == ErrorCode::no_space) {
      // There may be room for what is needed, if not for more.
      image_.file().clear_error();
      taken = allocator_.take_for_stream(count, Growth::sparse);
    }
    QV_TRY(taken);
    arena = *taken;
    if (fill == Fill::part) {
      QV_TRY(allocator_.make_zero(arena));
    }
  }
  const ClusterRun got{arena.first, std::min(arena.count, count)};
  arena.first += got.count;
  arena.count -= got.count;
  return got;
}

Result<void> VmstateArea::take_fixed(uint64_t first, uint64_t count, Fill fill) {
  while (count > 0) {
    QV_ASSIGN(const ClusterRun got, take_from_arena(count, fill));
    note({first, got.first, got.count});
    first += got.count;
    count -= got.count;
    clusters_ = std::max(clusters_, first);
  }
  return {};
}

/// Of the clusters [first, end) those that have no place yet.
Result<void> VmstateArea::take_missing(uint64_t first, uint64_t end, Fill fill) {
  while (first < end) {
    // Looked up anew each time: taking changes runs_.
    const auto after = std::ranges::upper_bound(runs_, first, {}, &AreaRun::stream_first);
    if (after != runs_.begin() && std::prev(after)->stream_end() > first) {
      first = std::prev(after)->stream_end();
      continue;
    }
    const uint64_t gap_end = after == runs_.end() ? end : std::min(end, after->stream_first);
    QV_TRY(take_fixed(first, gap_end - first, fill));
    first = gap_end;
  }
  return {};
}

Result<void> VmstateArea::place_at(std::span<const io::StreamRange> ranges,
                                   std::vector<io::HostRun> &runs) {
  const Geometry &geometry = image_.geometry();
  const uint64_t unit = place_unit_bytes();
  for (const io::StreamRange &range : ranges) {
    const uint64_t begin = range.from.value;
    const uint64_t end = begin + range.bytes;
    // Whole units, and what stands out on either side of them.
    const uint64_t outer_begin = round_down(begin, unit);
    const uint64_t outer_end = round_up(end, unit);
    QV_TRY(check_fits(outer_end));
    const uint64_t whole_begin = std::min(round_up(begin, unit), outer_end);
    const uint64_t whole_end = std::max(round_down(end, unit), whole_begin);
    auto take = [&](uint64_t from, uint64_t to, Fill fill) {
      return take_missing(from >> geometry.cluster_bits, to >> geometry.cluster_bits, fill);
    };
    QV_TRY(take(outer_begin, whole_begin, Fill::part));
    QV_TRY(take(whole_begin, whole_end, Fill::whole));
    QV_TRY(take(whole_end, outer_end, Fill::part));
    find_host_runs(runs_, geometry, range, runs);
  }
  return {};
}

Result<void> VmstateArea::finish_fixed(uint64_t stream_bytes) {
  QV_TRY(check_fits(stream_bytes));
  const Geometry &geometry = image_.geometry();
  clusters_ = std::max(clusters_, geometry.clusters_for(stream_bytes));
  if (image_.header().version < 3) {
    // A cluster that cannot be flagged zero has to be there, and empty.
    expected_bytes_ = arena_bytes_max * arena_parts;
    QV_TRY(take_missing(0, clusters_, Fill::part));
  }
  // The one that lies last first: then it shortens the file again.
  const bool zeroed_last = zeroed_arena_.first > whole_arena_.first;
  for (ClusterRun *arena : {zeroed_last ? &zeroed_arena_ : &whole_arena_,
                            zeroed_last ? &whole_arena_ : &zeroed_arena_}) {
    allocator_.give_back(*arena);
    *arena = {};
  }
  return {};
}

Result<void> VmstateArea::reserve(uint64_t bytes) {
  const uint64_t reserved_bytes = round_up(bytes, reserved_unit_bytes);
  QV_TRY(check_fits(reserved_bytes));
  const uint64_t wanted = image_.geometry().clusters_for(reserved_bytes);
  while (clusters_ < wanted) {
    QV_ASSIGN(const ClusterRun run,
              allocator_.take_for_stream(wanted - clusters_, Growth::sparse, reserved_unit_bytes));
    note({clusters_, run.first, run.count});
    clusters_ += run.count;
  }
  return {};
}

Result<void> ReservedArea::place(StreamOffset from, uint64_t bytes,
                                 std::vector<io::HostRun> &runs) {
  const uint64_t reserved_bytes =
      runs_.empty() ? 0 : runs_.back().stream_end() * geometry_.cluster_bytes();
  if (from.value + bytes > reserved_bytes) {
    return fail(ErrorCode::no_space, image_name_ + ": the stream is longer than the " +
                                         std::to_string(reserved_bytes) +
                                         " bytes that were reserved for it");
  }
  find_host_runs(runs_, geometry_, {from, bytes}, runs);
  return guard_ ? guard_() : Result<void>();
}

}  // namespace qvmstate::qcow2
