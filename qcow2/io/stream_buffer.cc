// Filling, flushing and reusing the buffers of a sequential stream.
//
// A buffer's transfers carry its index as their cookie. It returns to the pool when the last of
// them has ended.
#include "qcow2/io/stream_buffer.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <utility>

namespace qvmstate::io {

StreamBuffer::StreamBuffer(File &file, BufferPool &pool, Placement &placement, FlushHook hook,
                           DataHook data_hook)
    : file_(file),
      pool_(pool),
      placement_(placement),
      hook_(std::move(hook)),
      data_hook_(std::move(data_hook)),
      starts_(pool.count()) {
  assert(placement_.unit_bytes() > 0 && pool_.at(0).capacity % placement_.unit_bytes() == 0);
}

StreamBuffer::~StreamBuffer() {
  give_back_all();
}

Result<std::span<std::byte>> StreamBuffer::space() {
  assert(!finished_);
  QV_TRY(stopped());
  if (current_ == nullptr) {
    QV_ASSIGN(current_, free_buffer());
  }
  return std::span<std::byte>(current_->data + current_->used, current_->capacity - current_->used);
}

Result<void> StreamBuffer::advance(size_t bytes) {
  QV_TRY(stopped());
  assert(current_ != nullptr && bytes <= current_->capacity - current_->used);
  current_->used += bytes;
  position_ += bytes;
  if (current_->used == current_->capacity) {
    return flush_current();
  }
  return {};
}

Result<void> StreamBuffer::put(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    QV_ASSIGN(std::span<std::byte> room, space());
    const size_t count = std::min(room.size(), bytes.size());
    std::memcpy(room.data(), bytes.data(), count);
    QV_TRY(advance(count));
    bytes = bytes.subspan(count);
  }
  return stopped();
}

Result<void> StreamBuffer::skip(uint64_t bytes) {
  QV_TRY(stopped());
  if (current_ != nullptr && current_->used > 0) {
    assert(current_->used % placement_.unit_bytes() == 0);
    QV_TRY(flush_current());
  }
  position_ += bytes;
  flushed_ += bytes;
  return {};
}

uint64_t StreamBuffer::landed() const {
  uint64_t position = flushed_;
  for (unsigned i = 0; i < pool_.count(); ++i) {
    if (pool_.at(i).state == BufferState::in_flight) {
      position = std::min(position, starts_[i]);
    }
  }
  return position;
}

Result<void> StreamBuffer::finish() {
  assert(!finished_);
  QV_TRY(stopped());
  if (current_ != nullptr && current_->used > 0) {
    const size_t padded = round_up(current_->used, placement_.unit_bytes());
    std::memset(current_->data + current_->used, 0, padded - current_->used);
    current_->used = padded;
    QV_TRY(flush_current());
  }
  while (file_.pending() > 0) {
    QV_TRY(reap_one());
  }
  give_back_all();
  finished_ = true;
  return {};
}

Result<void> StreamBuffer::flush_current() {
  if (auto written = write_current(); !written) {
    return stop(std::move(written).error());
  }
  if (hook_) {
    if (auto wanted = hook_(flushed_); !wanted) {
      return stop(std::move(wanted).error());
    }
  }
  return {};
}

Result<void> StreamBuffer::write_current() {
  Buffer &buffer = *current_;
  if (data_hook_) {
    data_hook_({buffer.data, std::min<size_t>(buffer.used, position_ - flushed_)});
  }
  runs_.clear();
  QV_TRY(placement_.place(StreamOffset(flushed_), buffer.used, runs_));
  pool_.send_off(buffer, static_cast<unsigned>(runs_.size()));
  starts_[buffer.index] = flushed_;
  current_ = nullptr;
  flushed_ += buffer.used;
  size_t done = 0;
  for (const HostRun &run : runs_) {
    assert(run.bytes > 0 && run.bytes <= buffer.used - done);
    QV_TRY(file_.start_write({buffer.data + done, static_cast<size_t>(run.bytes)}, run.offset,
                             buffer.index, buffer.index));
    done += run.bytes;
  }
  assert(done == buffer.used);
  return {};
}

Result<Buffer *> StreamBuffer::free_buffer() {
  while (true) {
    if (Buffer *buffer = pool_.take(); buffer != nullptr) {
      return buffer;
    }
    QV_TRY(reap_one());
  }
}

Result<void> StreamBuffer::reap_one() {
  const Result<uint64_t> cookie = file_.wait_any();
  if (!cookie) {
    return stop(cookie.error());
  }
  pool_.part_landed(pool_.at(static_cast<unsigned>(*cookie)));
  return {};
}

Result<void> StreamBuffer::stopped() const {
  if (error_) {
    return tl::unexpected(*error_);
  }
  return {};
}

tl::unexpected<Error> StreamBuffer::stop(Error error) {
  error_ = std::move(error);
  give_back_all();
  return tl::unexpected(*error_);
}

void StreamBuffer::give_back_all() {
  if (file_.pending() > 0) {
    // Either an earlier error is being returned, or nobody asked for the result.
    (void)file_.drain();
  }
  current_ = nullptr;
  for (unsigned i = 0; i < pool_.count(); ++i) {
    if (pool_.at(i).state != BufferState::free) {
      pool_.give_back(pool_.at(i));
    }
  }
}

}  // namespace qvmstate::io
