#include "plugin/qemu/write_protection.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <thread>
#include <vector>

namespace qvmstate::qemu {
namespace {

// Not in the headers of Linux before 6.4 (include/uapi/linux/userfaultfd.h).
constexpr uint64_t feature_wp_unpopulated = uint64_t{1} << 13;
constexpr uint64_t features =
    UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_EVENT_REMOVE | feature_wp_unpopulated;

constexpr uint64_t piece_bytes = uint64_t{64} << 20;  // protected by one thread at a time
constexpr unsigned threads_max = 8;

/// Of the whole kind: user-mode-only would make QEMU's system calls on protected RAM fail.
Result<Descriptor> open_userfaultfd() {
  Descriptor descriptor(static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK)));
  if (descriptor) {
    return descriptor;
  }
  const int error = errno;
  if (const Descriptor device(::open("/dev/userfaultfd", O_RDWR | O_CLOEXEC)); device) {
    descriptor = Descriptor(::ioctl(device.get(), USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK));
    if (descriptor) {
      return descriptor;
    }
  }
  return fail(ErrorCode::permission,
              "--live needs userfaultfd, which this QEMU may not use (" +
                  std::string(error == ENOSYS ? "not in this kernel, or forbidden by seccomp"
                                              : "no right to it") +
                  "); let QEMU's user read and write /dev/userfaultfd, or set the sysctl "
                  "vm.unprivileged_userfaultfd to 1, or save without --live",
              error);
}

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
  QV_ASSIGN(Descriptor descriptor, open_userfaultfd());
  uffdio_api api = {UFFD_API, features, 0};
  if (::ioctl(descriptor.get(), UFFDIO_API, &api) != 0) {
    return fail(ErrorCode::not_supported,
                "--live needs Linux 6.4 or later, whose userfaultfd also protects memory that was "
                "never touched; save without --live",
                errno);
  }
  return WriteProtection(std::move(descriptor));
}

Result<void> WriteProtection::protect(std::span<const MemoryRange> ranges) {
  std::vector<MemoryRange> pieces;
  for (const MemoryRange &range : ranges) {
    uffdio_register request = {};
    request.range = {range.address, range.bytes};
    request.mode = UFFDIO_REGISTER_MODE_WP;
    if (::ioctl(descriptor_.get(), UFFDIO_REGISTER, &request) != 0) {
      return fail_errno(errno, errno == EBUSY
                                   ? "guest RAM is write-protected by something else in QEMU (a "
                                     "background snapshot?); registering it"
                                   : "registering guest RAM with userfaultfd");
    }
    for (uint64_t at = 0; at < range.bytes; at += piece_bytes) {
      pieces.push_back({range.address + at, std::min(piece_bytes, range.bytes - at)});
    }
  }
  std::atomic<size_t> next = 0;
  std::atomic<int> error = 0;
  auto work = [&] {
    for (size_t i = next++; i < pieces.size() && error == 0; i = next++) {
      int failed = EAGAIN;
      while (failed == EAGAIN) {  // another thread reads the events
        failed = set_protection(descriptor_.get(), pieces[i], UFFDIO_WRITEPROTECT_MODE_WP);
      }
      if (failed != 0) {
        error = failed;
      }
    }
  };
  const unsigned count =
      std::min<unsigned>({std::max(1U, std::thread::hardware_concurrency()), threads_max,
                          static_cast<unsigned>(std::min<size_t>(pieces.size(), threads_max))});
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < count; ++i) {
    threads.emplace_back(work);
  }
  work();
  for (std::thread &thread : threads) {
    thread.join();
  }
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
