// Transfers by a few threads with pread and pwrite, for systems that refuse io_uring.
//
// Threads: one at a time calls it; queue_, done_ and stopping_ are shared with the workers and
// guarded by mutex_.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "qcow2/io/backend.h"
#include "qcow2/io/descriptors.h"
#include "qcow2/io/result.h"

namespace qvmstate::io {

class ThreadBackend : public DescriptorBackend {
 public:
  static Result<std::unique_ptr<ThreadBackend>> create(Descriptors &&descriptors, unsigned depth);
  ~ThreadBackend() override;  ///< carries out what is queued first

  std::string name() const override { return "threads"; }
  void register_buffers(std::span<const std::span<std::byte>> buffers) override;
  int start(const BackendOp &op) override;
  BackendCompletion reap() override;

 private:
  ThreadBackend(Descriptors &&descriptors, unsigned depth);
  Result<void> start_workers();
  void work();
  BackendCompletion transfer(const BackendOp &op) const;

  unsigned depth_;
  unsigned in_flight_ = 0;
  std::mutex mutex_;
  std::condition_variable queue_changed_;
  std::condition_variable done_changed_;
  std::deque<BackendOp> queue_;
  std::deque<BackendCompletion> done_;
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace qvmstate::io
