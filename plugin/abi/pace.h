// How far a call has got: told to the host now and then, who may cancel.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

#include "plugin/qvmstate.h"
#include "qcow2/io/result.h"

namespace qvmstate::abi {

/// Threads: one at a time follows; any cancels.
class Pace {
 public:
  Pace(const char *what, qvmstate_progress_fn progress, void *user)
      : what_(what), progress_(progress), user_(user) {}

  void cancel() { cancelled_ = true; }
  const std::atomic<bool> &cancelled() const { return cancelled_; }
  void begin(uint64_t ram_bytes_total) {
    total_ = ram_bytes_total;
    told_ = {};
  }
  /// ErrorCode::cancelled if it is.
  Result<void> check() const;
  /// The same, and tells the host if it is time to, or if all is done.
  Result<void> follow(uint64_t ram_bytes_done);

 private:
  const char *what_;
  qvmstate_progress_fn progress_;
  void *user_;
  std::atomic<bool> cancelled_ = false;
  uint64_t total_ = 0;
  std::chrono::steady_clock::time_point told_{};
};

}  // namespace qvmstate::abi
