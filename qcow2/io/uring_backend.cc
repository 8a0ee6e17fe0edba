// Transfers through io_uring (io_uring_setup(2), io_uring_enter(2)).
#include "qcow2/io/uring_backend.h"

#include <sys/uio.h>
#include <unistd.h>

#include <cassert>
#include <cerrno>
#include <fstream>
#include <utility>

namespace qvmstate::io {

namespace {

/// Marks the completion of an entry that was neutralised; File's cookies are small.
constexpr uint64_t ignored_cookie = ~0ULL;

// Places in the table of registered files.
constexpr int buffered_slot = 0;
constexpr int direct_slot = 1;

std::string refusal_cause(int sys_errno) {
  int disabled = 0;
  std::ifstream("/proc/sys/kernel/io_uring_disabled") >> disabled;
  if (sys_errno == EPERM && disabled != 0) {
    return "forbidden by the sysctl kernel.io_uring_disabled, which is " + std::to_string(disabled);
  }
  switch (sys_errno) {
    case EPERM:
    case EACCES:
      return "forbidden, probably by a seccomp filter (containers have one)";
    case ENOSYS:
      return "the kernel has no io_uring, or a seccomp filter hides it";
    case ENOMEM:
      return "no memory for the ring; the limit on locked memory (ulimit -l) may be too low";
    default:
      return "io_uring_setup failed";
  }
}

tl::unexpected<Error> refused(int sys_errno) {
  return fail_errno(sys_errno, "cannot use io_uring; let threads do the transfers instead: " +
                                   refusal_cause(sys_errno));
}

/// Plain read and write came with Linux 5.6, five releases after the ring itself.
bool has_operations(io_uring &ring) {
  io_uring_probe *probe = ::io_uring_get_probe_ring(&ring);
  if (probe == nullptr) {
    return false;
  }
  const bool has_all = ::io_uring_opcode_supported(probe, IORING_OP_READ) != 0 &&
                       ::io_uring_opcode_supported(probe, IORING_OP_WRITE) != 0;
  ::io_uring_free_probe(probe);
  return has_all;
}

}  // namespace

Result<std::unique_ptr<UringBackend>> UringBackend::create(Descriptors &descriptors,
                                                           unsigned depth) {
  io_uring ring = {};
  // Completions wait until this thread enters the kernel, instead of interrupting it (Linux 5.19).
  int result = ::io_uring_queue_init(depth, &ring, IORING_SETUP_COOP_TASKRUN);
  if (result == -EINVAL) {
    result = ::io_uring_queue_init(depth, &ring, 0);
  }
  if (result < 0) {
    return refused(-result);
  }
  if (!has_operations(ring)) {
    ::io_uring_queue_exit(&ring);
    return refused(ENOSYS);
  }
  return std::unique_ptr<UringBackend>(new UringBackend(std::move(descriptors), ring, depth));
}

UringBackend::UringBackend(Descriptors &&descriptors, const io_uring &ring, unsigned depth)
    : DescriptorBackend(std::move(descriptors)), ring_(ring), depth_(depth) {
  // A place whose descriptor is absent (-1) stays empty.
  const int files[] = {descriptors_.buffered(), descriptors_.direct()};
  static_assert(buffered_slot == 0 && direct_slot == 1);
  files_registered_ = ::io_uring_register_files(&ring_, files, 2) == 0;
}

UringBackend::~UringBackend() {
  while (in_flight_ > 0) {
    UringBackend::reap();
  }
  // Taking a ring down ends in the background; only by unregistering is the last reference to the
  // open files, and with it their locks, sure to be gone when the descriptors are closed.
  if (files_registered_) {
    ::io_uring_unregister_files(&ring_);
  }
  if (!registered_.empty()) {
    ::io_uring_unregister_buffers(&ring_);
  }
  ::io_uring_queue_exit(&ring_);
}

void UringBackend::register_buffers(std::span<const std::span<std::byte>> buffers) {
  assert(registered_.empty() && in_flight_ == 0);
  std::vector<iovec> vectors;
  for (std::span<std::byte> buffer : buffers) {
    vectors.push_back({buffer.data(), buffer.size()});
  }
  // Fails where the limit on locked memory is too low; transfers then pin their pages one by one.
  if (::io_uring_register_buffers(&ring_, vectors.data(), static_cast<unsigned>(vectors.size())) ==
      0) {
    registered_.assign(buffers.begin(), buffers.end());
  }
}

bool UringBackend::is_registered(const BackendOp &op) const {
  if (op.buffer_index >= registered_.size()) {
    return false;
  }
  const std::span<std::byte> buffer = registered_[op.buffer_index];
  return op.data >= buffer.data() && op.data + op.bytes <= buffer.data() + buffer.size();
}

io_uring_sqe *UringBackend::free_entry() {
  io_uring_sqe *entry = ::io_uring_get_sqe(&ring_);
  if (entry == nullptr) {  // Full of entries that the kernel did not take yet.
    ::io_uring_submit(&ring_);
    entry = ::io_uring_get_sqe(&ring_);
  }
  return entry;
}

/// 0 when the kernel has taken all entries, else -errno.
int UringBackend::submit() {
  int result = 0;
  do {
    result = ::io_uring_submit(&ring_);
  } while (result == -EINTR || (result > 0 && ::io_uring_sq_ready(&ring_) > 0));
  if (::io_uring_sq_ready(&ring_) == 0) {
    return 0;
  }
  return result < 0 ? result : -EAGAIN;
}

int UringBackend::start(const BackendOp &op) {
  assert(op.bytes > 0 && op.cookie != ignored_cookie);
  if (descriptors_.buffered() < 0 && !descriptors_.takes_direct(op) && op.kind == OpKind::read) {
    // Rare, so it is done at once, through a buffer.
    if (in_flight_ == depth_) {
      return -EAGAIN;
    }
    done_.push_back({op.cookie, descriptors_.read(op.data, op.bytes, op.offset)});
    ++in_flight_;
    return 0;
  }
  io_uring_sqe *entry = in_flight_ < depth_ ? free_entry() : nullptr;
  if (entry == nullptr) {
    return -EAGAIN;
  }
  const bool direct = descriptors_.takes_direct(op);
  int file = direct ? descriptors_.direct() : descriptors_.buffered();
  if (files_registered_) {
    file = direct ? direct_slot : buffered_slot;
  }
  const auto bytes = static_cast<unsigned>(op.bytes);
  assert(bytes == op.bytes);
  if (is_registered(op)) {
    const int index = static_cast<int>(op.buffer_index);
    if (op.kind == OpKind::read) {
      ::io_uring_prep_read_fixed(entry, file, op.data, bytes, op.offset, index);
    } else {
      ::io_uring_prep_write_fixed(entry, file, op.data, bytes, op.offset, index);
    }
  } else if (op.kind == OpKind::read) {
    ::io_uring_prep_read(entry, file, op.data, bytes, op.offset);
  } else {
    ::io_uring_prep_write(entry, file, op.data, bytes, op.offset);
  }
  if (files_registered_) {
    ::io_uring_sqe_set_flags(entry, IOSQE_FIXED_FILE);
  }
  ::io_uring_sqe_set_data64(entry, op.cookie);

  if (const int result = submit(); result < 0) {
    // The entry stays in the ring and goes out with the next submission, when the caller's memory
    // may be gone: it must not mean anything any more.
    ::io_uring_prep_nop(entry);
    ::io_uring_sqe_set_data64(entry, ignored_cookie);
    return result;
  }
  ++in_flight_;
  return 0;
}

BackendCompletion UringBackend::reap() {
  assert(in_flight_ > 0);
  if (!done_.empty()) {
    const BackendCompletion completion = done_.front();
    done_.pop_front();
    --in_flight_;
    return completion;
  }
  while (true) {
    io_uring_cqe *entry = nullptr;
    const int result = ::io_uring_wait_cqe(&ring_, &entry);
    if (result < 0) {
      // The memory of a transfer in flight must not be given up, whatever waiting says.
      if (result != -EINTR) {
        ::usleep(100);
      }
      continue;
    }
    const BackendCompletion completion = {::io_uring_cqe_get_data64(entry), entry->res};
    ::io_uring_cqe_seen(&ring_, entry);
    if (completion.cookie != ignored_cookie) {
      --in_flight_;
      return completion;
    }
  }
}

}  // namespace qvmstate::io
