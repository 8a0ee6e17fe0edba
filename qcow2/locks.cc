#include "qcow2/locks.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

namespace qvmstate::qcow2 {
namespace {

constexpr uint64_t holds_base = 100;     // byte 100+i: "I hold permission i"
constexpr uint64_t unshared_base = 200;  // byte 200+i: "I do not share permission i"

constexpr uint64_t writer_holds[] = {100, 101, 103, 201, 203};
constexpr uint64_t stable_reader_holds[] = {100, 201, 203};

// What another one's locks must not say: that it holds what we do not share, or does not share what
// we hold.
constexpr uint64_t writer_conflicts[] = {101, 103, 200, 201, 203};
constexpr uint64_t stable_reader_conflicts[] = {101, 103, 200};

std::span<const uint64_t> bytes_held(LockRole role) {
  return role == LockRole::writer ? std::span<const uint64_t>(writer_holds) : stable_reader_holds;
}

std::span<const uint64_t> bytes_in_conflict(LockRole role) {
  return role == LockRole::writer ? std::span<const uint64_t>(writer_conflicts)
                                  : stable_reader_conflicts;
}

int lock_operation(int descriptor, int command, uint64_t byte, struct flock &range) {
  range.l_whence = SEEK_SET;
  range.l_start = static_cast<off_t>(byte);
  range.l_len = 1;
  range.l_pid = 0;  // OFD locks require it
  int status;
  do {
    status = fcntl(descriptor, command, &range);
  } while (status != 0 && errno == EINTR);
  return status == 0 ? 0 : errno;
}

int set_lock(int descriptor, uint64_t byte, short type) {
  struct flock range = {};
  range.l_type = type;
  return lock_operation(descriptor, F_OFD_SETLK, byte, range);
}

std::string what_other_says(uint64_t byte) {
  static constexpr const char *permissions[] = {"consistent read", "write", "write-unchanged",
                                                "resize"};
  const bool unshared = byte >= unshared_base;
  const uint64_t permission = byte - (unshared ? unshared_base : holds_base);
  return std::string(unshared ? "it does not share the " : "it holds the ") +
         permissions[permission] + " permission, byte " + std::to_string(byte);
}

Result<void> lock_bytes(int descriptor, LockRole role, const std::string &image_name) {
  for (const uint64_t byte : bytes_held(role)) {
    const int error = set_lock(descriptor, byte, F_RDLCK);
    if (error == EAGAIN || error == EACCES) {
      return fail(ErrorCode::locked,
                  image_name +
                      ": is in use by another process (it has locked "
                      "byte " +
                      std::to_string(byte) + " for itself alone): stop it first",
                  error);
    }
    if (error != 0) {
      return fail_errno(error, image_name + ": cannot be locked");
    }
  }
  return {};
}

}  // namespace

Result<ImageLock> ImageLock::take(std::span<const int> descriptors, LockRole role,
                                  const std::string &image_name) {
  ImageLock lock;
  lock.role_ = role;
  for (const int descriptor : descriptors) {
    const int duplicate = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
    if (duplicate < 0) {
      return fail_errno(errno, image_name + ": cannot be locked");
    }
    const bool first = lock.descriptors_.empty();
    lock.descriptors_.push_back(duplicate);
    QV_TRY(lock_bytes(duplicate, role, image_name));
    if (!first) {
      continue;
    }
    // Probed before our other descriptors hold anything: to the first they would be others.
    for (const uint64_t byte : bytes_in_conflict(role)) {
      QV_ASSIGN(const bool conflict, is_locked_by_other(duplicate, byte));
      if (conflict) {
        return fail(ErrorCode::locked, image_name + ": is in use by another process (" +
                                           what_other_says(byte) + "): stop it first");
      }
    }
  }
  return lock;
}

ImageLock::ImageLock(ImageLock &&other) noexcept
    : descriptors_(std::exchange(other.descriptors_, {})), role_(other.role_) {}

ImageLock &ImageLock::operator=(ImageLock &&other) noexcept {
  if (this != &other) {
    release();
    descriptors_ = std::exchange(other.descriptors_, {});
    role_ = other.role_;
  }
  return *this;
}

ImageLock::~ImageLock() {
  release();
}

void ImageLock::release() {
  for (const int descriptor : descriptors_) {
    for (const uint64_t byte : bytes_held(role_)) {
      set_lock(descriptor, byte, F_UNLCK);
    }
    close(descriptor);
  }
  descriptors_.clear();
}

Result<bool> is_locked_by_other(int descriptor, uint64_t byte) {
  struct flock range = {};
  range.l_type = F_WRLCK;
  if (const int error = lock_operation(descriptor, F_OFD_GETLK, byte, range); error != 0) {
    return fail_errno(error, "cannot ask for locks on byte " + std::to_string(byte));
  }
  return range.l_type != F_UNLCK;
}

}  // namespace qvmstate::qcow2
