// Opening a file buffered and with O_DIRECT; synchronous system calls on it.
//
// Which alignment O_DIRECT needs is said by statx (STATX_DIOALIGN, Linux 6.1, not all file systems;
// statx(2)). Where it says nothing, a read is tried.
#include "qcow2/io/descriptors.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <utility>

namespace qvmstate::io {

namespace {

constexpr uint32_t probed_alignment_max = 4096;

/// What statx says: 0 for "no O_DIRECT", nullopt if it says nothing.
std::optional<uint32_t> reported_alignment(int descriptor) {
  struct statx status = {};
  if (::statx(descriptor, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) != 0 ||
      (status.stx_mask & STATX_DIOALIGN) == 0) {
    return std::nullopt;
  }
  if (status.stx_dio_mem_align == 0 || status.stx_dio_offset_align == 0) {
    return 0;
  }
  return std::max(status.stx_dio_mem_align, status.stx_dio_offset_align);
}

/// The least alignment with which a read from the O_DIRECT descriptor works; 0 if none does.
uint32_t probed_alignment(int descriptor, uint64_t file_bytes) {
  if (file_bytes < 2 * probed_alignment_max) {
    return probed_alignment_max;  // Too short to try: what every disk in use accepts.
  }
  alignas(probed_alignment_max) std::byte memory[2 * probed_alignment_max];
  for (uint32_t alignment : {512U, probed_alignment_max}) {
    // Memory and offset are aligned to `alignment` and to nothing larger.
    if (::pread(descriptor, memory + alignment, alignment, alignment) == alignment) {
      return alignment;
    }
  }
  return 0;
}

int64_t device_or_file_size(int descriptor, bool is_block_device) {
  if (is_block_device) {
    uint64_t bytes = 0;
    return ::ioctl(descriptor, BLKGETSIZE64, &bytes) == 0 ? static_cast<int64_t>(bytes) : -errno;
  }
  struct stat status;
  return ::fstat(descriptor, &status) == 0 ? status.st_size : -errno;
}

Result<void> check_kind(const struct stat &status, const std::string &name) {
  if (S_ISREG(status.st_mode) || S_ISBLK(status.st_mode)) {
    return {};
  }
  return fail(ErrorCode::bad_argument,
              name + ": cannot open: it is neither a regular file nor a block device");
}

}  // namespace

Result<Descriptors> Descriptors::open(const std::string &path, bool writable, DirectMode mode,
                                      const std::string &name) {
  const std::string what =
      name + (writable ? ": cannot open for reading and writing" : ": cannot open for reading");
  // Asked before opening, because opening a FIFO would wait for its other end.
  struct stat status;
  if (::stat(path.c_str(), &status) != 0) {
    return fail_errno(errno, what);
  }
  QV_TRY(check_kind(status, name));

  const int flags = (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NOCTTY;
  Descriptors descriptors;
  descriptors.buffered_ = ::open(path.c_str(), flags);
  if (descriptors.buffered_ < 0 || ::fstat(descriptors.buffered_, &status) != 0) {
    return fail_errno(errno, what);
  }
  QV_TRY(check_kind(status, name));
  descriptors.is_block_device_ = S_ISBLK(status.st_mode);
  if (mode != DirectMode::off) {
    QV_TRY(descriptors.open_direct(path, flags, mode, name));
  }
  return descriptors;
}

Result<void> Descriptors::open_direct(const std::string &path, int flags, DirectMode mode,
                                      const std::string &name) {
  std::optional<uint32_t> alignment = reported_alignment(buffered_);
  int opened = -1;
  if (alignment != 0U) {
    opened = ::open(path.c_str(), flags | O_DIRECT);
    if (opened < 0 && errno != EINVAL) {
      return fail_errno(errno, name + ": cannot open with O_DIRECT");
    }
  }
  if (opened >= 0) {
    direct_ = opened;
    struct stat first;
    struct stat second;
    if (::fstat(buffered_, &first) != 0 || ::fstat(direct_, &second) != 0 ||
        first.st_dev != second.st_dev || first.st_ino != second.st_ino) {
      return fail(ErrorCode::io, name + ": cannot open: another file took its place meanwhile");
    }
    if (!alignment) {
      const int64_t bytes = device_or_file_size(direct_, is_block_device_);
      alignment = probed_alignment(direct_, bytes < 0 ? 0 : static_cast<uint64_t>(bytes));
    }
    if (*alignment != 0) {
      direct_alignment_ = *alignment;
      return {};
    }
    ::close(std::exchange(direct_, -1));
  }
  if (mode == DirectMode::on) {
    return fail(ErrorCode::not_supported,
                name +
                    ": cannot open with O_DIRECT: its file system does not allow it; use"
                    " --direct off or --direct auto",
                EINVAL);
  }
  return {};
}

Descriptors::Descriptors(Descriptors &&other) noexcept
    : buffered_(std::exchange(other.buffered_, -1)),
      direct_(std::exchange(other.direct_, -1)),
      direct_alignment_(other.direct_alignment_),
      is_block_device_(other.is_block_device_) {}

Descriptors &Descriptors::operator=(Descriptors &&other) noexcept {
  std::swap(buffered_, other.buffered_);
  std::swap(direct_, other.direct_);
  std::swap(direct_alignment_, other.direct_alignment_);
  std::swap(is_block_device_, other.is_block_device_);
  return *this;
}

Descriptors::~Descriptors() {
  for (int descriptor : {direct_, buffered_}) {
    if (descriptor >= 0) {
      ::close(descriptor);
    }
  }
}

bool Descriptors::takes_direct(const BackendOp &op) const {
  return direct_ >= 0 && is_aligned(op, direct_alignment_);
}

int64_t DescriptorBackend::read_some(void *data, size_t bytes, uint64_t offset) {
  const ssize_t result = ::pread(descriptors_.buffered(), data, bytes, static_cast<off_t>(offset));
  return result < 0 ? -errno : result;
}

int64_t DescriptorBackend::write_some(const void *data, size_t bytes, uint64_t offset) {
  const ssize_t result = ::pwrite(descriptors_.buffered(), data, bytes, static_cast<off_t>(offset));
  return result < 0 ? -errno : result;
}

int DescriptorBackend::sync() {
  return ::fsync(descriptors_.buffered()) == 0 ? 0 : -errno;
}

int64_t DescriptorBackend::size() {
  return device_or_file_size(descriptors_.buffered(), descriptors_.is_block_device());
}

int DescriptorBackend::resize(uint64_t bytes) {
  if (descriptors_.is_block_device()) {
    return -ENOTSUP;
  }
  return ::ftruncate(descriptors_.buffered(), static_cast<off_t>(bytes)) == 0 ? 0 : -errno;
}

int DescriptorBackend::preallocate(uint64_t offset, uint64_t bytes) {
  // Mode 0 extends the file as well: extending O_DIRECT writes run one at a time in most file
  // systems.
  return ::fallocate(descriptors_.buffered(), 0, static_cast<off_t>(offset),
                     static_cast<off_t>(bytes)) == 0
             ? 0
             : -errno;
}

int DescriptorBackend::punch_hole(uint64_t offset, uint64_t bytes) {
  // On block devices too, where BLKDISCARD would not promise zeros.
  if (::fallocate(descriptors_.buffered(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  static_cast<off_t>(offset), static_cast<off_t>(bytes)) == 0) {
    return 0;
  }
  // A device answers EINVAL to a range that is no multiple of its sectors.
  return errno == EINVAL && descriptors_.is_block_device() ? -EOPNOTSUPP : -errno;
}

std::vector<int> DescriptorBackend::descriptors() const {
  std::vector<int> both = {descriptors_.buffered()};
  if (descriptors_.direct() >= 0) {
    both.push_back(descriptors_.direct());
  }
  return both;
}

}  // namespace qvmstate::io
