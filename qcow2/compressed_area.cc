#include "qcow2/compressed_area.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <utility>

#include "qcow2/entries.h"
#include "qcow2/io/backend.h"

namespace qvmstate::qcow2 {
namespace {

constexpr uint64_t take_bytes = 4 * mib;  // from the allocator at a time
constexpr size_t buffers = 4;             // one is filled while the others are written
constexpr uint64_t sector_bytes = 512;

}  // namespace

CompressedArea::CompressedArea(const Image &image, Allocator &allocator)
    : image_(image),
      allocator_(allocator),
      cluster_bytes_(image.geometry().cluster_bytes()),
      references_max_(std::max<uint64_t>(1, image.geometry().refcount_max() / 3)) {}

CompressedArea::~CompressedArea() {
  if (pool_) {
    (void)image_.file().drain();  // the buffers are being written; what fails was told or is late
  }
}

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
  QV_TRY(end_run());
  QV_ASSIGN(run_, allocator_.take_for_stream(std::max<uint64_t>(1, take_bytes / cluster_bytes_)));
  position_ = run_.first * cluster_bytes_;
  filled_ = position_;
  return {};
}

Result<void> CompressedArea::put(std::span<const std::byte> stored) {
  QV_TRY(fill_up_to(position_, nullptr));  // what was passed over
  QV_TRY(fill_up_to(position_ + stored.size(), stored.data()));
  use(position_, stored.size());
  position_ += stored.size();
  stored_bytes_ += stored.size();
  return {};
}

/// With what is at `from`, or zeros.
Result<void> CompressedArea::fill_up_to(uint64_t offset, const std::byte *from) {
  while (filled_ < offset) {
    if (buffer_ == nullptr) {
      QV_TRY(take_buffer());
    }
    const size_t bytes = std::min<uint64_t>(offset - filled_, buffer_->capacity - buffer_->used);
    std::byte *to = buffer_->data + buffer_->used;
    if (from == nullptr) {
      std::memset(to, 0, bytes);
    } else {
      std::memcpy(to, from, bytes);
      from += bytes;
    }
    buffer_->used += bytes;
    filled_ += bytes;
    if (buffer_->used == buffer_->capacity) {
      QV_TRY(flush());
    }
  }
  return {};
}

Result<void> CompressedArea::take_buffer() {
  if (!pool_) {
    QV_ASSIGN(pool_, io::BufferPool::create(buffers));
  }
  while ((buffer_ = pool_->take()) == nullptr) {
    QV_ASSIGN(const uint64_t index, image_.file().wait_any());
    pool_->part_landed(pool_->at(static_cast<unsigned>(index)));
  }
  return {};
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
  if (buffer_ == nullptr) {
    return {};
  }
  io::Buffer &full = *std::exchange(buffer_, nullptr);
  pool_->send_off(full, 1);
  return image_.file().start_write(std::span(full.data, full.used), HostOffset(filled_ - full.used),
                                   io::no_buffer, full.index);
}

Result<void> CompressedArea::end_run() {
  const uint64_t used = divide_up(position_, cluster_bytes_);
  if (run_.count > 0) {
    QV_TRY(fill_up_to(used * cluster_bytes_, nullptr));  // whole sectors, for O_DIRECT
    QV_TRY(flush());
    if (used < run_.end()) {
      allocator_.give_back({used, run_.end() - used});
    }
  }
  run_ = {};
  return {};
}

Result<void> CompressedArea::finish() {
  QV_TRY(end_run());
  QV_TRY(image_.file().drain());
  pool_.reset();
  return {};
}

}  // namespace qvmstate::qcow2
