// Transfers by a few threads with pread and pwrite.
#include "qcow2/io/thread_backend.h"

#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <system_error>
#include <utility>

#include "qcow2/io/signals.h"

namespace qvmstate::io {

namespace {

/// Enough to keep a disk busy with transfers of 1 MiB.
constexpr unsigned workers_max = 4;

}  // namespace

Result<std::unique_ptr<ThreadBackend>> ThreadBackend::create(Descriptors &&descriptors,
                                                             unsigned depth) {
  std::unique_ptr<ThreadBackend> backend(new ThreadBackend(std::move(descriptors), depth));
  QV_TRY(backend->start_workers());
  return backend;
}

ThreadBackend::ThreadBackend(Descriptors &&descriptors, unsigned depth)
    : DescriptorBackend(std::move(descriptors)), depth_(depth) {}

Result<void> ThreadBackend::start_workers() {
  const SignalsBlocked blocked;
  int failed_errno = 0;
  try {
    for (unsigned i = 0; i < std::min(depth_, workers_max); ++i) {
      workers_.emplace_back(&ThreadBackend::work, this);
    }
  } catch (const std::system_error &error) {
    failed_errno = error.code().value();
  }
  if (workers_.empty()) {
    return fail_errno(failed_errno, "cannot start a thread for file transfers");
  }
  return {};
}

ThreadBackend::~ThreadBackend() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  queue_changed_.notify_all();
  for (std::thread &worker : workers_) {
    worker.join();
  }
}

void ThreadBackend::register_buffers(std::span<const std::span<std::byte>>) {}

int ThreadBackend::start(const BackendOp &op) {
  assert(op.bytes > 0);
  if (in_flight_ == depth_) {
    return -EAGAIN;
  }
  {
    std::lock_guard lock(mutex_);
    queue_.push_back(op);
  }
  queue_changed_.notify_one();
  ++in_flight_;
  return 0;
}

BackendCompletion ThreadBackend::reap() {
  assert(in_flight_ > 0);
  std::unique_lock lock(mutex_);
  done_changed_.wait(lock, [this] { return !done_.empty(); });
  const BackendCompletion completion = done_.front();
  done_.pop_front();
  --in_flight_;
  return completion;
}

void ThreadBackend::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    queue_changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) {
      return;
    }
    const BackendOp op = queue_.front();
    queue_.pop_front();
    lock.unlock();
    const BackendCompletion completion = transfer(op);
    lock.lock();
    done_.push_back(completion);
    done_changed_.notify_one();
  }
}

BackendCompletion ThreadBackend::transfer(const BackendOp &op) const {
  const bool direct = descriptors_.takes_direct(op);
  if (!direct && op.kind == OpKind::read) {
    return {op.cookie, descriptors_.read(op.data, op.bytes, op.offset)};
  }
  const int descriptor = direct ? descriptors_.direct() : descriptors_.buffered();
  const auto offset = static_cast<off_t>(op.offset);
  const ssize_t result = op.kind == OpKind::read ? ::pread(descriptor, op.data, op.bytes, offset)
                                                 : ::pwrite(descriptor, op.data, op.bytes, offset);
  return {op.cookie, result < 0 ? -errno : result};
}

}  // namespace qvmstate::io
