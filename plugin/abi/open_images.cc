#include "plugin/abi/open_images.h"

#include <cerrno>
#include <mutex>

namespace qvmstate::abi {
namespace {

// A list that allocates nothing: the library may be unloaded, or used while the process exits.
constinit std::mutex mutex;
constinit OpenImage *first = nullptr;

}  // namespace

OpenImage::~OpenImage() {
  if (!entered_) {
    return;
  }
  const std::lock_guard lock(mutex);
  OpenImage **link = &first;
  while (*link != this) {
    link = &(*link)->next_;
  }
  *link = next_;
}

bool OpenImage::is_same_file(const OpenImage &other) const {
  if (S_ISBLK(status_.st_mode) && S_ISBLK(other.status_.st_mode)) {
    return status_.st_rdev == other.status_.st_rdev;
  }
  return status_.st_dev == other.status_.st_dev && status_.st_ino == other.status_.st_ino;
}

Outcome<void> OpenImage::enter(int descriptor, bool writable, const std::string &image_name) {
  if (::fstat(descriptor, &status_) != 0) {
    return fail_errno(errno, image_name + ": cannot be looked at");
  }
  writable_ = writable;
  const std::lock_guard lock(mutex);
  for (const OpenImage *other = first; other != nullptr; other = other->next_) {
    if (is_same_file(*other) && (writable_ || other->writable_)) {
      return refuse(QVMSTATE_LOCKED,
                    image_name + ": is open in another session of this process; close that first");
    }
  }
  next_ = first;
  first = this;
  entered_ = true;
  return {};
}

}  // namespace qvmstate::abi
