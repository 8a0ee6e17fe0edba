#include "plugin/qemu/write_protection.h"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>

namespace qvmstate::qemu {
namespace {

// Not in the headers of Linux before 6.4 (include/uapi/linux/userfaultfd.h).
constexpr uint64_t feature_wp_unpopulated = uint64_t{1} << 13;
constexpr uint64_t features =
    UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_EVENT_REMOVE | feature_wp_unpopulated;

/// 0, or an errno. EAGAIN: memory is being taken away, and its event is not read yet.
int set_protection(int descriptor, const MemoryRange &range, uint64_t mode) {
  uffdio_writeprotect request = {{range.address, range.bytes}, mode};
  while (::ioctl(descriptor, UFFDIO_WRITEPROTECT, &request) != 0) {
    if (errno != EINTR) {
      return errno;
    }
  }
  return 0;
}

}  // namespace

Result<WriteProtection> WriteProtection::open() {
  QV_ASSIGN(Descriptor descriptor, open_userfaultfd(features, "6.4"));
  return WriteProtection(std::move(descriptor));
}

Result<void> WriteProtection::protect(std::span<const MemoryRange> ranges) {
  QV_TRY(register_ranges(descriptor_.get(), ranges));
  const int error = for_pieces(ranges, [&](const MemoryRange &piece) {
    int failed = EAGAIN;
    while (failed == EAGAIN) {  // another thread reads the events
      failed = set_protection(descriptor_.get(), piece, UFFDIO_WRITEPROTECT_MODE_WP);
    }
    return failed;
  });
  return error == 0 ? Result<void>() : fail_errno(error, "write-protecting guest RAM");
}

Result<bool> WriteProtection::release(const MemoryRange &range) {
  const int failed = set_protection(descriptor_.get(), range, 0);
  if (failed != 0 && failed != EAGAIN) {
    return fail_errno(failed, "releasing guest RAM");
  }
  return failed == 0;
}

Result<std::optional<WriteProtection::Event>> WriteProtection::next_event() {
  uffd_msg message;
  const ssize_t bytes = ::read(descriptor_.get(), &message, sizeof message);
  if (bytes < 0) {
    if (errno == EAGAIN || errno == EINTR) {
      return std::nullopt;
    }
    return fail_errno(errno, "reading the writes to guest RAM");
  }
  if (message.event == UFFD_EVENT_REMOVE) {
    return Event{Event::Kind::removal,
                 {message.arg.remove.start, message.arg.remove.end - message.arg.remove.start}};
  }
  return Event{Event::Kind::write, {message.arg.pagefault.address & ~uint64_t{4095}, 4096}};
}

}  // namespace qvmstate::qemu
