// A file as the layers above see it: exact positioned reads and writes, and asynchronous writes and
// reads with a bounded number in flight.
//
// Promises, the same over every backend:
// - A transfer is complete only when every byte of it was transferred. A short one is resubmitted
//   for the rest; one that makes no progress (0 bytes, twice) is an error. EINTR and EAGAIN are
//   tried again.
// - The first error wins: after it no transfer is started, those in flight are waited for, and
//   every later call returns that same error until clear_error(). Only a synchronous read or size()
//   that fails, which harms nothing, is an error of that call alone.
// - Buffered and O_DIRECT transfers never run at the same time: synchronous calls first wait for
//   what is in flight, and so does an asynchronous one that is not aligned among aligned ones.
//   (Both touching one page of the page cache would let a stale page overwrite what O_DIRECT
//   wrote.)
//
// Threads: one thread at a time uses a File. Ownership: a File owns its backend, which owns
// its descriptors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "qcow2/io/backend.h"
#include "qcow2/io/offsets.h"
#include "qcow2/io/result.h"

namespace qvmstate::io {

/// Whether transfers bypass the page cache. `automatic`: where statx or a probe says that the file
/// can, and buffered otherwise; `on`: refused where it cannot.
enum class DirectMode { automatic, on, off };

/// What runs the transfers. `automatic`: io_uring, or threads where the kernel refuses it (seccomp,
/// the io_uring_disabled sysctl, ENOSYS), and on FUSE: there io_uring with O_DIRECT wrote the rest
/// of a write that was cut short to the wrong place, and called it complete (seen on Linux 6.18;
/// not with pwrite).
enum class Engine { automatic, uring, threads };

struct OpenOptions {
  bool writable = false;
  DirectMode direct = DirectMode::automatic;
  Engine engine = Engine::automatic;
  unsigned depth = 8;  ///< transfers in flight, 1 to limits (file.cc)
};

class Descriptors;

class File {
 public:
  /// Opens `path` (a regular file or block device; "/proc/PID/fd/N" works and reopens that file).
  /// `shown_name` is what error messages call it; empty: the path.
  static Result<std::unique_ptr<File>> open(const std::string &path, const OpenOptions &options,
                                            std::string shown_name = {});
  /// Over descriptors that somebody else opened (`options.writable`: to write); they belong to the
  /// File, and are closed also when they are refused. Descriptors::adopt says what they must be.
  static Result<std::unique_ptr<File>> adopt(std::span<const int> passed,
                                             const OpenOptions &options, std::string shown_name);
  /// Over descriptors that are open. Only `engine` and `depth` of the options count.
  static Result<std::unique_ptr<File>> over(Descriptors &&descriptors, const OpenOptions &options,
                                            std::string shown_name);
  /// For fakes and decorators.
  File(std::unique_ptr<Backend> backend, std::string name, unsigned depth);
  ~File();
  File(const File &) = delete;
  File &operator=(const File &) = delete;

  const std::string &name() const { return name_; }
  Backend &backend() { return *backend_; }
  /// The descriptors behind the file, for locks: all of them must hold the locks (a transfer of a
  /// killed process may outlive it in the kernel; the lock of its descriptor does too). Empty for
  /// the fake.
  std::vector<int> descriptors() const;

  // Exact, synchronous.
  [[nodiscard]] Result<void> read_at(std::span<std::byte> to, HostOffset offset);
  /// Reads up to the end of the file; bytes past it read as zeros. For qcow2 clusters that the file
  /// ends in.
  [[nodiscard]] Result<void> read_or_zero_at(std::span<std::byte> to, HostOffset offset);
  [[nodiscard]] Result<void> write_at(std::span<const std::byte> from, HostOffset offset);
  [[nodiscard]] Result<void> sync();
  [[nodiscard]] Result<uint64_t> size();
  [[nodiscard]] Result<void> resize(uint64_t bytes);
  /// Reserves space so that later writes there are fast and cannot fail with ENOSPC. False where
  /// the file system cannot; that is no error. ENOSPC is.
  [[nodiscard]] Result<bool> preallocate(HostOffset offset, uint64_t bytes);
  /// Makes a range read as zeros and gives its space back. False where unsupported.
  [[nodiscard]] Result<bool> punch_hole(HostOffset offset, uint64_t bytes);

  // Asynchronous. `data` stays untouched and alive until `cookie` came back.
  /// Starts a transfer; while `depth` are in flight it first waits for one (whose cookie the next
  /// wait_any() returns).
  [[nodiscard]] Result<void> start_write(std::span<const std::byte> data, HostOffset offset,
                                         unsigned buffer_index, uint64_t cookie);
  [[nodiscard]] Result<void> start_read(std::span<std::byte> data, HostOffset offset,
                                        unsigned buffer_index, uint64_t cookie);
  /// Waits for the next finished transfer and returns its cookie. Precondition: pending() > 0.
  [[nodiscard]] Result<uint64_t> wait_any();
  /// Transfers started whose cookie was not returned yet.
  size_t pending() const;
  /// Waits until nothing is in flight, forgetting cookies; returns the first error, if any.
  [[nodiscard]] Result<void> drain();
  /// Forgets the first error, so that clean-up (truncate, punch) can go on.
  void clear_error();

  uint64_t bytes_written() const;  ///< by completed transfers, since opening

 private:
  struct State;
  Result<size_t> read_available(std::span<std::byte> to, uint64_t offset);
  Result<bool> optional_operation(const char *verb, HostOffset offset, uint64_t bytes,
                                  const std::function<int()> &operation);

  std::unique_ptr<Backend> backend_;
  std::string name_;
  std::unique_ptr<State> state_;
};

}  // namespace qvmstate::io
