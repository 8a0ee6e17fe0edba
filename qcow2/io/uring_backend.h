// Transfers through io_uring, with registered files and, where the kernel lets us, registered
// buffers.
//
// Threads: one at a time.
#pragma once

#include <liburing.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "qcow2/io/backend.h"
#include "qcow2/io/descriptors.h"
#include "qcow2/io/result.h"

namespace qvmstate::io {

class UringBackend : public DescriptorBackend {
 public:
  /// Takes the descriptors over. Where the kernel refuses a ring, the error says what is behind it,
  /// and `descriptors` is left as it was.
  static Result<std::unique_ptr<UringBackend>> create(Descriptors &descriptors, unsigned depth);
  ~UringBackend() override;

  std::string name() const override { return "io_uring"; }
  void register_buffers(std::span<const std::span<std::byte>> buffers) override;
  int start(const BackendOp &op) override;
  BackendCompletion reap() override;

 private:
  UringBackend(Descriptors &&descriptors, const io_uring &ring, unsigned depth);
  io_uring_sqe *free_entry();
  int submit();
  bool is_registered(const BackendOp &op) const;

  io_uring ring_;
  unsigned depth_;
  unsigned in_flight_ = 0;
  bool files_registered_ = false;
  std::vector<std::span<std::byte>> registered_;
  std::deque<BackendCompletion> done_;  ///< without the ring, not reaped yet
};

}  // namespace qvmstate::io
