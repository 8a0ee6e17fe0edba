// QEMU-compatible image locks: OFD byte locks on the image file.
//
// Byte 100+i says "I hold permission i", byte 200+i "I do not share permission i" (0 consistent
// read, 1 write, 2 write-unchanged, 3 resize). All are read locks, so that any reader can take
// them; who wants a permission probes with F_OFD_GETLK for a write lock. Facts: QEMU
// block/file-posix.c.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "qcow2/io/result.h"

namespace qvmstate::qcow2 {

enum class LockRole {
  writer,         ///< holds 100,101,103,201,203; conflicts with everybody but live readers
  stable_reader,  ///< holds 100,201,203; readers share, writers are kept out
};

/// Locks held by the open files behind descriptors of one image (through duplicates of them); the
/// kernel drops them with the last reference to each open file. release() or the destructor drops
/// them earlier, for every process that shares the open file.
class ImageLock {
 public:
  ImageLock() = default;
  /// Takes the locks on every descriptor (all of one file, each its own open file description), or
  /// none. Conflict: ErrorCode::locked, with the name of the image and what the other holds. No
  /// descriptors (a fake file): nothing to lock.
  static Result<ImageLock> take(std::span<const int> descriptors, LockRole role,
                                const std::string &image_name);
  ImageLock(ImageLock &&) noexcept;
  ImageLock &operator=(ImageLock &&) noexcept;
  ~ImageLock();
  void release();

 private:
  std::vector<int> descriptors_;
  LockRole role_ = LockRole::writer;
};

/// Whether somebody else (another open file description) holds a lock on byte `byte`.
Result<bool> is_locked_by_other(int descriptor, uint64_t byte);

}  // namespace qvmstate::qcow2
