#include "plugin/qemu/userfaultfd.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <system_error>
#include <thread>
#include <vector>

#include "qcow2/io/offsets.h"

namespace qvmstate::qemu {
namespace {

constexpr uint64_t piece_bytes = 64 * mib;  // a multiple of a huge page
constexpr size_t threads_max = 8;

/// Of the whole kind: user-mode-only would make QEMU's system calls on protected RAM fail.
Result<Descriptor> open_whole() {
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
              "this QEMU may not use userfaultfd (" +
                  std::string(error == ENOSYS ? "not in this kernel, or forbidden by seccomp"
                                              : "no right to it") +
                  "), which write protection of its RAM needs; let its user read and write "
                  "/dev/userfaultfd, or set the sysctl vm.unprivileged_userfaultfd to 1",
              error);
}

}  // namespace

Result<Descriptor> open_userfaultfd(uint64_t features, const char *since) {
  QV_ASSIGN(Descriptor descriptor, open_whole());
  uffdio_api api = {UFFD_API, features, 0};
  if (::ioctl(descriptor.get(), UFFDIO_API, &api) != 0) {
    return fail(ErrorCode::not_supported,
                "the userfaultfd of this kernel cannot write-protect RAM in the way that is "
                "needed; use Linux " +
                    std::string(since) + " or later",
                errno);
  }
  return descriptor;
}

Result<void> register_ranges(int userfaultfd, std::span<const MemoryRange> ranges) {
  for (const MemoryRange &range : ranges) {
    uffdio_register request = {};
    request.range = {range.address, range.bytes};
    request.mode = UFFDIO_REGISTER_MODE_WP;
    if (::ioctl(userfaultfd, UFFDIO_REGISTER, &request) != 0) {
      return fail_errno(errno, errno == EBUSY
                                   ? "guest RAM is write-protected by something else in QEMU (a "
                                     "background snapshot?); registering it"
                                   : "registering guest RAM with userfaultfd");
    }
  }
  return {};
}

int for_pieces(std::span<const MemoryRange> ranges,
               const std::function<int(const MemoryRange &)> &work) {
  std::vector<MemoryRange> pieces;
  for (const MemoryRange &range : ranges) {
    const uint64_t end = range.address + range.bytes;
    for (uint64_t at = range.address; at < end;) {
      const uint64_t next = std::min(end, round_down(at, piece_bytes) + piece_bytes);
      pieces.push_back({at, next - at});
      at = next;
    }
  }
  std::atomic<size_t> next = 0;
  std::atomic<int> error = 0;
  const auto work_on_pieces = [&] {
    for (size_t i = next++; i < pieces.size() && error == 0; i = next++) {
      if (const int failed = work(pieces[i]); failed != 0) {
        error = failed;
      }
    }
  };
  const size_t count = std::min(
      {std::max<size_t>(1, std::thread::hardware_concurrency()), threads_max, pieces.size()});
  {
    std::vector<std::jthread> threads;
    try {
      for (size_t i = 1; i < count; ++i) {
        threads.emplace_back(work_on_pieces);
      }
    } catch (const std::system_error &) {  // with those that there are
    }
    work_on_pieces();
  }
  return error;
}

}  // namespace qvmstate::qemu
