// One anonymous mapping, cut into buffers.
#include "qcow2/io/buffer_pool.h"

#include <sys/mman.h>

#include <cassert>
#include <cerrno>
#include <cstdint>
#include <string>
#include <utility>

namespace qvmstate::io {

Result<BufferPool> BufferPool::create(size_t count, size_t bytes) {
  if (count < buffer_count_min || bytes == 0 || bytes % buffer_alignment != 0) {
    return fail(ErrorCode::bad_argument,
                "cannot allocate " + std::to_string(count) + " buffers of " +
                    std::to_string(bytes) + " bytes: at least " + std::to_string(buffer_count_min) +
                    " are needed, and their size is a multiple" + " of " +
                    std::to_string(buffer_alignment));
  }
  const std::string what = "cannot allocate " + std::to_string(count) + " buffers of " +
                           std::to_string(bytes) + " bytes";
  if (bytes > SIZE_MAX / count) {
    return fail_errno(ENOMEM, what);
  }
  BufferPool pool;
  pool.total_bytes_ = count * bytes;
  void *memory = ::mmap(nullptr, pool.total_bytes_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    return fail_errno(errno, what);
  }
  pool.base_ = static_cast<std::byte *>(memory);
  pool.buffers_.resize(count);
  for (size_t i = 0; i < count; ++i) {
    pool.buffers_[i].data = pool.base_ + i * bytes;
    pool.buffers_[i].capacity = bytes;
    pool.buffers_[i].index = static_cast<unsigned>(i);
  }
  return pool;
}

BufferPool::BufferPool(BufferPool &&other) noexcept
    : base_(std::exchange(other.base_, nullptr)),
      total_bytes_(std::exchange(other.total_bytes_, 0)),
      buffers_(std::move(other.buffers_)) {}

BufferPool &BufferPool::operator=(BufferPool &&other) noexcept {
  std::swap(base_, other.base_);
  std::swap(total_bytes_, other.total_bytes_);
  std::swap(buffers_, other.buffers_);
  return *this;
}

BufferPool::~BufferPool() {
  if (base_ != nullptr) {
    ::munmap(base_, total_bytes_);
  }
}

Buffer *BufferPool::take() {
  for (Buffer &buffer : buffers_) {
    if (buffer.state == BufferState::free) {
      buffer.state = BufferState::filling;
      buffer.used = 0;
      return &buffer;
    }
  }
  return nullptr;
}

void BufferPool::send_off(Buffer &buffer, unsigned parts) {
  assert(buffer.state == BufferState::filling && parts > 0);
  buffer.state = BufferState::in_flight;
  buffer.parts_in_flight = parts;
}

void BufferPool::part_landed(Buffer &buffer) {
  assert(buffer.state == BufferState::in_flight && buffer.parts_in_flight > 0);
  if (--buffer.parts_in_flight == 0) {
    give_back(buffer);
  }
}

void BufferPool::give_back(Buffer &buffer) {
  assert(buffer.state != BufferState::free);
  buffer.state = BufferState::free;
  buffer.parts_in_flight = 0;
}

std::vector<std::span<std::byte>> BufferPool::memory() const {
  std::vector<std::span<std::byte>> spans;
  spans.reserve(buffers_.size());
  for (const Buffer &buffer : buffers_) {
    spans.emplace_back(buffer.data, buffer.capacity);
  }
  return spans;
}

}  // namespace qvmstate::io
