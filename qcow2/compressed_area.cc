#include "qcow2/compressed_area.h"

#include <algorithm>
#include <cassert>

#include "qcow2/entries.h"

namespace qvmstate::qcow2 {
namespace {

constexpr uint64_t take_bytes = 4 * mib;     // from the allocator at a time
constexpr uint64_t pending_bytes = 1 * mib;  // written at a time
constexpr uint64_t sector_bytes = 512;

}  // namespace

CompressedArea::CompressedArea(const Image &image, Allocator &allocator)
    : image_(image),
      allocator_(allocator),
      cluster_bytes_(image.geometry().cluster_bytes()),
      references_max_(std::max<uint64_t>(1, image.geometry().refcount_max() / 3)) {}

Result<void> CompressedArea::add_zeros() {
  entries_.push_back(entry_zero);
  return {};
}

Result<void> CompressedArea::add_plain(std::span<const std::byte> cluster) {
  assert(cluster.size() == cluster_bytes_);
  position_ = round_up(position_, cluster_bytes_);
  QV_TRY(make_room(cluster_bytes_));
  entries_.push_back(position_);
  return put(cluster);
}

Result<void> CompressedArea::add_compressed(std::span<const std::byte> stored) {
  assert(!stored.empty() && stored.size() < cluster_bytes_);
  const bool begun = position_ % cluster_bytes_ != 0;
  if (begun && !uses_.empty() && uses_.back().cluster == position_ / cluster_bytes_ &&
      uses_.back().references >= references_max_) {
    position_ = round_up(position_, cluster_bytes_);
  }
  QV_TRY(make_room(stored.size()));
  const uint64_t sectors =
      (position_ + stored.size() - 1) / sector_bytes - position_ / sector_bytes;
  const uint32_t offset_bits = 70 - image_.geometry().cluster_bits;
  entries_.push_back(entry_compressed | sectors << offset_bits | position_);
  return put(stored);
}

/// So that `bytes` fit in one piece at position_.
Result<void> CompressedArea::make_room(uint64_t bytes) {
  const uint64_t end = run_.end() * cluster_bytes_;
  if (run_.count > 0 && position_ <= end && bytes <= end - position_) {
    return {};
  }
  QV_TRY(finish());
  QV_ASSIGN(run_, allocator_.take_for_stream(std::max<uint64_t>(1, take_bytes / cluster_bytes_)));
  position_ = run_.first * cluster_bytes_;
  pending_offset_ = position_;
  return {};
}

Result<void> CompressedArea::put(std::span<const std::byte> bytes) {
  // What was passed over is written as zeros.
  pending_.resize(position_ - pending_offset_);
  pending_.insert(pending_.end(), bytes.begin(), bytes.end());
  use(position_, bytes.size());
  position_ += bytes.size();
  stored_bytes_ += bytes.size();
  return pending_.size() >= pending_bytes ? flush() : Result<void>();
}

void CompressedArea::use(uint64_t first_byte, uint64_t bytes) {
  const uint64_t last = (first_byte + bytes - 1) / cluster_bytes_;
  for (uint64_t cluster = first_byte / cluster_bytes_; cluster <= last; ++cluster) {
    if (!uses_.empty() && uses_.back().cluster == cluster) {
      uses_.back().references += 1;
    } else {
      uses_.push_back({cluster, 1});
    }
  }
}

Result<void> CompressedArea::flush() {
  if (!pending_.empty()) {
    QV_TRY(image_.file().write_at(pending_, HostOffset(pending_offset_)));
  }
  pending_.clear();
  pending_offset_ = position_;
  return {};
}

Result<void> CompressedArea::finish() {
  QV_TRY(flush());
  const uint64_t used = divide_up(position_, cluster_bytes_);
  if (run_.count > 0 && used < run_.end()) {
    allocator_.give_back({used, run_.end() - used});
  }
  run_ = {};
  return {};
}

}  // namespace qvmstate::qcow2
