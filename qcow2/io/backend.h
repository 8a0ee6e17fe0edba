// The seam between positioned file I/O and what performs it: io_uring, a few threads with
// pread/pwrite, or a fake that records, cuts and fails operations by a seed.
//
// A backend is honest and simple: it may transfer fewer bytes than asked, and it reports errno.
// Comparing lengths, resubmitting and stopping at the first error is File's work (file.h), done
// once for all backends.
//
// Threads: one thread at a time uses a backend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "qcow2/io/result.h"

namespace qvmstate::io {

enum class OpKind { read, write };

/// No index: the memory is not one of the registered buffers.
constexpr unsigned no_buffer = ~0U;

struct BackendOp {
  OpKind kind;
  std::byte *data;        ///< stays valid until the completion is reaped; not written to by `write`
  size_t bytes;           ///< > 0
  uint64_t offset;        ///< in the file
  unsigned buffer_index;  ///< of the registered buffer that `data` lies in, or no_buffer
  uint64_t cookie;        ///< comes back in the completion
};

/// Whether memory, offset and length are multiples of `alignment` (a power of two).
inline bool is_aligned(const BackendOp &op, uint32_t alignment) {
  return ((reinterpret_cast<uintptr_t>(op.data) | op.offset | op.bytes) & (alignment - 1)) == 0;
}

struct BackendCompletion {
  uint64_t cookie;
  int64_t result;  ///< bytes transferred (short is possible, 0 is end of file), or -errno
};

class Backend {
 public:
  virtual ~Backend() = default;
  Backend() = default;
  Backend(const Backend &) = delete;
  Backend &operator=(const Backend &) = delete;

  /// "io_uring", "threads" or "fake"; with O_DIRECT in use, direct() is true.
  virtual std::string name() const = 0;
  virtual bool direct() const = 0;
  /// Alignment of memory, offset and length that O_DIRECT transfers need here (1 without O_DIRECT).
  /// Other transfers are accepted as well and take the buffered descriptor.
  virtual uint32_t direct_alignment() const = 0;

  /// Tells the backend of memory that many transfers will use (io_uring: registered buffers).
  /// Called at most once, before the first start(); their memory stays mapped and
  /// unmoved as long as the backend lives. Failing to register is not an error.
  virtual void register_buffers(std::span<const std::span<std::byte>> buffers) = 0;

  /// Starts one transfer; 0 or -errno (-EAGAIN: reap first). Never blocks for long.
  virtual int start(const BackendOp &op) = 0;
  /// Waits for one transfer to end. Precondition: at least one is in flight.
  virtual BackendCompletion reap() = 0;

  // Synchronous operations; each returns a count of bytes, or 0, or -errno.
  virtual int64_t read_some(void *data, size_t bytes, uint64_t offset) = 0;
  virtual int64_t write_some(const void *data, size_t bytes, uint64_t offset) = 0;
  virtual int sync() = 0;                  ///< fdatasync or stronger
  virtual int64_t size() = 0;              ///< block devices: their size
  virtual int resize(uint64_t bytes) = 0;  ///< ftruncate; -ENOTSUP on a device
  virtual int preallocate(uint64_t offset, uint64_t bytes) = 0;  ///< -EOPNOTSUPP where unknown
  virtual int punch_hole(uint64_t offset, uint64_t bytes) = 0;   ///< reads as zeros afterwards
  virtual bool is_block_device() const = 0;
  /// The descriptors in use (for locks); empty for fakes.
  virtual std::vector<int> descriptors() const = 0;
};

}  // namespace qvmstate::io
