#include "qcow2/allocator.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <limits>

#include "qcow2/refcount_block.h"

namespace qvmstate::qcow2 {
namespace {

// Free runs remembered; 16 bytes each. An image with more has the others reused by a later edit.
constexpr size_t free_runs_max = 65536;
// The stream takes free runs from this size on: smaller ones would break its 1 MiB writes apart.
constexpr uint64_t stream_run_bytes_min = 1 * mib;
constexpr uint64_t scan_piece_bytes = 256 * kib;
constexpr uint64_t zeros_bytes = 1 * mib;  // written at a time where no hole can be punched
constexpr uint64_t grow_step_bytes_max = 4 * gib;
constexpr uint64_t grow_step_bytes_beyond = 16 * mib;  // past what was expected
// L1 and L2 entries and refcount table entries have offset bits up to 55.
constexpr uint64_t host_bytes_max = uint64_t{1} << 56;

}  // namespace

Result<Allocator> Allocator::scan(const Image &image) {
  Allocator allocator(image);
  QV_ASSIGN(allocator.original_bytes_, image.file().size());
  allocator.grown_bytes_ = allocator.original_bytes_;
  allocator.device_ = image.file().backend().is_block_device();
  QV_TRY(allocator.scan_blocks());
  QV_TRY(allocator.check_own_tables());
  return allocator;
}

Result<uint64_t> Allocator::room_on_device(const Image &image) {
  Allocator allocator(image);
  QV_ASSIGN(const uint64_t device_bytes, image.file().size());
  QV_TRY(allocator.scan_blocks());
  const uint64_t used_bytes = allocator.tail_ << image.geometry().cluster_bits;
  return allocator.free_bytes_inside() + device_bytes - std::min(device_bytes, used_bytes);
}

void Allocator::note_free(uint64_t first, uint64_t count) {
  if (!free_.empty() && free_.back().end() == first) {
    free_.back().count += count;
    return;
  }
  if (free_.size() == free_runs_max) {
    // Keep the larger half, in order of position.
    std::vector<uint64_t> sizes;
    sizes.reserve(free_.size());
    for (const ClusterRun &run : free_) {
      sizes.push_back(run.count);
    }
    auto middle = sizes.begin() + static_cast<ptrdiff_t>(sizes.size() / 2);
    std::nth_element(sizes.begin(), middle, sizes.end());
    const uint64_t median = *middle;
    size_t kept_equal = 0;
    std::erase_if(free_, [&](const ClusterRun &run) {
      if (run.count == median) {
        return ++kept_equal > free_runs_max / 4;
      }
      return run.count < median;
    });
  }
  free_.push_back({first, count});
}

Result<void> Allocator::check_blocks_differ() const {
  std::vector<uint64_t> blocks = image_->refcount_table();
  std::ranges::sort(blocks);
  const auto twice = std::adjacent_find(blocks.begin(), blocks.end(),
                                        [](uint64_t a, uint64_t b) { return a == b && a != 0; });
  if (twice != blocks.end()) {
    return fail(ErrorCode::bad_image, image_->name() + ": the refcount block at offset " +
                                          std::to_string(*twice) +
                                          " is in the refcount table twice: the image is damaged; "
                                          "repair it with `qemu-img check -r all`");
  }
  return {};
}

Result<void> Allocator::scan_blocks() {
  QV_TRY(check_blocks_differ());
  const Geometry &geometry = image_->geometry();
  const uint64_t per_block = geometry.refcount_block_entries();
  const uint64_t piece_bytes = std::min(scan_piece_bytes, geometry.cluster_bytes());
  const uint64_t per_piece = piece_bytes * 8 / geometry.refcount_bits();
  std::vector<std::byte> piece(piece_bytes);
  const std::vector<std::byte> zeros(piece_bytes);
  // `free_` collects every free run met; what follows the last cluster in use is the tail instead.
  tail_ = 0;
  uint64_t free_from = 0;
  auto in_use = [&](uint64_t cluster) {
    if (cluster > free_from) {
      note_free(free_from, cluster - free_from);
    }
    free_from = cluster + 1;
  };
  const std::vector<uint64_t> &table = image_->refcount_table();
  for (uint64_t block = 0; block < table.size(); ++block) {
    if (table[block] == 0) {
      continue;
    }
    for (uint64_t at = 0; at < geometry.cluster_bytes(); at += piece_bytes) {
      QV_TRY(image_->file().read_at(piece, HostOffset(table[block] + at)));
      if (std::memcmp(piece.data(), zeros.data(), piece_bytes) == 0) {
        continue;
      }
      const uint64_t first = block * per_block + at * 8 / geometry.refcount_bits();
      for (uint64_t i = 0; i < per_piece; ++i) {
        if (refcount_get(piece, geometry.refcount_order, i) != 0) {
          in_use(first + i);
        }
      }
    }
  }
  tail_ = free_from;
  return {};
}

Result<void> Allocator::check_own_tables() const {
  const Header &header = image_->header();
  const Geometry &geometry = image_->geometry();
  QV_TRY(check_in_use("header", 0, 1));
  QV_TRY(check_in_use("L1 table", header.l1_offset.value, uint64_t{header.l1_entries} * 8));
  QV_TRY(check_in_use("snapshot table", header.snapshot_table_offset.value,
                      image_->snapshot_table_bytes()));
  QV_TRY(check_in_use("refcount table", header.refcount_table_offset.value,
                      uint64_t{header.refcount_table_clusters} * geometry.cluster_bytes()));
  for (const uint64_t block : image_->refcount_table()) {
    if (block != 0) {
      QV_TRY(check_in_use("refcount block", block, geometry.cluster_bytes()));
    }
  }
  return {};
}

Result<void> Allocator::check_in_use(const char *what, uint64_t offset, uint64_t bytes) const {
  const uint64_t first = offset >> image_->geometry().cluster_bits;
  const uint64_t end =
      (offset + bytes + image_->geometry().cluster_bytes() - 1) >> image_->geometry().cluster_bits;
  const auto after = std::ranges::upper_bound(free_, first, {}, &ClusterRun::first);
  const bool first_free = after != free_.begin() && first < std::prev(after)->end();
  const bool later_free = after != free_.end() && after->first < end;
  if (bytes > 0 && (first_free || later_free || end > tail_)) {
    return fail(ErrorCode::bad_image,
                image_->name() + ": the refcounts call the " + what +
                    " free: the image is damaged; repair it with `qemu-img check -r all`");
  }
  return {};
}

uint64_t Allocator::free_bytes_inside() const {
  uint64_t clusters = 0;
  for (const ClusterRun &run : free_) {
    clusters += run.count;
  }
  return clusters * image_->geometry().cluster_bytes();
}

Result<void> Allocator::grow_file(uint64_t end_cluster, Growth growth) {
  const uint64_t needed_bytes = end_cluster << image_->geometry().cluster_bits;
  if (needed_bytes <= grown_bytes_) {
    return {};
  }
  if (device_) {
    return fail(ErrorCode::no_space, image_->name() + ": the device is full: " +
                                         std::to_string(needed_bytes - grown_bytes_) +
                                         " bytes are missing");
  }
  io::File &file = image_->file();
  if (growth == Growth::sparse) {
    QV_TRY(file.resize(needed_bytes));
    grown_bytes_ = needed_bytes;
    return {};
  }
  const uint64_t ahead =
      expected_bytes_ > 0 ? std::min(expected_bytes_, grow_step_bytes_max) : grow_step_bytes_beyond;
  // What is in flight ends here: its ENOSPC must not be taken for one of reserving and forgotten.
  QV_TRY(file.size());
  for (const uint64_t step : {ahead, grow_step_bytes_beyond, uint64_t{0}}) {
    const uint64_t target = std::max(needed_bytes, grown_bytes_ + step);
    auto reserved = file.preallocate(HostOffset(grown_bytes_), target - grown_bytes_);
    if (!reserved) {
      if (reserved.error().code == ErrorCode::no_space && step != 0) {
        file.clear_error();
        continue;
      }
      return tl::unexpected(std::move(reserved).error());
    }
    if (!*reserved) {
      QV_TRY(file.resize(target));
    }
    expected_bytes_ -= std::min(expected_bytes_, target - grown_bytes_);
    grown_bytes_ = target;
    break;
  }
  return {};
}

Result<ClusterRun> Allocator::take_tail(uint64_t count, Growth growth) {
  const uint64_t clusters_max = host_bytes_max >> image_->geometry().cluster_bits;
  if (count > clusters_max || tail_ > clusters_max - count) {
    return fail(ErrorCode::no_space, image_->name() +
                                         ": the image would pass the largest size "
                                         "that qcow2 can address");
  }
  QV_TRY(grow_file(tail_ + count, growth));
  const ClusterRun run{tail_, count};
  tail_ += count;
  taken_.push_back(run);
  return run;
}

Result<ClusterRun> Allocator::take(uint64_t count) {
  assert(count > 0);
  while (free_cursor_ < free_.size() && free_[free_cursor_].count == 0) {
    ++free_cursor_;
  }
  for (size_t i = free_cursor_; i < free_.size(); ++i) {
    ClusterRun &run = free_[i];
    if (run.count >= count) {
      QV_TRY(grow_file(run.first + count, Growth::ahead));
      const ClusterRun got{run.first, count};
      run.first += count;
      run.count -= count;
      taken_.push_back(got);
      return got;
    }
  }
  return take_tail(count, Growth::ahead);
}

Result<ClusterRun> Allocator::take_for_stream(uint64_t count, Growth growth,
                                              uint64_t alignment_bytes) {
  assert(count > 0);
  const Geometry &geometry = image_->geometry();
  const uint64_t unit = std::max<uint64_t>(1, alignment_bytes / geometry.cluster_bytes());
  const uint64_t wanted = round_up(count, unit);
  const uint64_t run_min = std::max(unit, stream_run_bytes_min / geometry.cluster_bytes());

  // Takes the aligned part of a free run; what is left before and after it stays free.
  auto take_from = [&](size_t i, uint64_t least) -> Result<ClusterRun> {
    const ClusterRun run = free_[i];
    const uint64_t first = round_up(run.first, unit);
    const uint64_t end = round_down(run.end(), unit);
    if (first >= end || end - first < least) {
      return ClusterRun{};
    }
    const ClusterRun got{first, std::min(wanted, end - first)};
    QV_TRY(grow_file(got.end(), growth));
    free_[i] = {got.end(), run.end() - got.end()};
    if (got.first > run.first && free_.size() < 2 * free_runs_max) {
      free_.insert(free_.begin() + static_cast<ptrdiff_t>(i),
                   ClusterRun{run.first, got.first - run.first});
    }
    taken_.push_back(got);
    return got;
  };
  for (; stream_cursor_ < free_.size(); ++stream_cursor_) {
    QV_ASSIGN(const ClusterRun got, take_from(stream_cursor_, std::min(run_min, wanted)));
    if (got.count != 0) {
      return got;
    }
  }
  const uint64_t gap = round_up(tail_, unit) - tail_;
  if (gap != 0) {
    free_.push_back({tail_, gap});
    tail_ += gap;
  }
  if (growth == Growth::sparse) {
    QV_TRY(trim_file());  // what was reserved ahead for tables would be no hole
  }
  auto tail = take_tail(wanted, growth);
  if (tail || !device_ || tail.error().code != ErrorCode::no_space) {
    return tail;
  }
  for (size_t i = free_cursor_; i < free_.size(); ++i) {
    QV_ASSIGN(const ClusterRun got, take_from(i, unit));
    if (got.count != 0) {
      return got;
    }
  }
  return tail;
}

Result<void> Allocator::make_zero(const ClusterRun &run) {
  const uint32_t bits = image_->geometry().cluster_bits;
  const uint64_t first = run.first << bits;
  const uint64_t end = device_ ? run.end() << bits : std::min(run.end() << bits, original_bytes_);
  if (first >= end) {
    return {};
  }
  io::File &file = image_->file();
  QV_ASSIGN(const bool punched, file.punch_hole(HostOffset(first), end - first));
  if (punched) {
    return {};
  }
  const std::vector<std::byte> zeros(std::min(end - first, zeros_bytes));
  for (uint64_t at = first; at < end; at += zeros.size()) {
    QV_TRY(file.write_at(std::span(zeros).first(std::min<uint64_t>(zeros.size(), end - at)),
                         HostOffset(at)));
  }
  return {};
}

void Allocator::give_back(const ClusterRun &run) {
  if (run.end() == tail_) {
    tail_ = run.first;
  } else if (run.count > 0) {
    free_.push_back(run);
  }
}

Result<void> Allocator::trim_file() {
  if (device_) {
    return {};
  }
  const uint64_t used_bytes = tail_ << image_->geometry().cluster_bits;
  const uint64_t wanted = std::max(used_bytes, original_bytes_);
  if (grown_bytes_ != wanted) {
    QV_TRY(image_->file().resize(wanted));
    grown_bytes_ = wanted;
  }
  return {};
}

Result<void> Allocator::undo() {
  io::File &file = image_->file();
  if (!device_) {
    // Asked, because reserving that failed may have made the file longer.
    QV_ASSIGN(const uint64_t bytes, file.size());
    if (bytes > original_bytes_) {
      QV_TRY(file.resize(original_bytes_));
    }
    grown_bytes_ = original_bytes_;
  }
  const uint32_t bits = image_->geometry().cluster_bits;
  for (const ClusterRun &run : taken_) {
    const uint64_t first = run.first << bits;
    const uint64_t end = std::min(run.end() << bits, original_bytes_);
    if (first < end) {
      QV_TRY(file.punch_hole(HostOffset(first), end - first));
    }
  }
  taken_.clear();
  return {};
}

}  // namespace qvmstate::qcow2
