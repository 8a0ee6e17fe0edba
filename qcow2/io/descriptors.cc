// Opening a file buffered and with O_DIRECT, or taking over descriptors of it; synchronous system
// calls on it.
//
// Which alignment O_DIRECT needs is said by statx (STATX_DIOALIGN, Linux 6.1, not all file systems;
// statx(2)). Where it says nothing, a read is tried.
#include "qcow2/io/descriptors.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/kcmp.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <optional>
#include <utility>

namespace qvmstate::io {

namespace {

constexpr uint32_t probed_alignment_max = 4096;
constexpr size_t bounce_bytes_max = 256 * 1024;

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

tl::unexpected<Error> no_direct(const std::string &name) {
  return fail(ErrorCode::not_supported,
              name +
                  ": cannot open with O_DIRECT: its file system does not allow it; use"
                  " --direct off or --direct auto",
              EINVAL);
}

std::string self_path(int descriptor) {
  return "/proc/self/fd/" + std::to_string(descriptor);
}

// What was passed, and what is wrong with it.

struct Passed {
  int number = -1;
  int flags = 0;
  struct stat status = {};

  bool is_direct() const { return (flags & O_DIRECT) != 0; }
};

/// Closes what it holds, each number once.
class PassedSet {
 public:
  PassedSet() = default;
  PassedSet(const PassedSet &) = delete;
  PassedSet &operator=(const PassedSet &) = delete;
  ~PassedSet() {
    for (const Passed &one : all) {
      if (one.number >= 0) {
        ::close(one.number);
      }
    }
  }
  std::vector<Passed> all;
};

std::string numbers(const std::vector<Passed> &passed) {
  return "descriptors " + std::to_string(passed[0].number) + " and " +
         std::to_string(passed[1].number);
}

tl::unexpected<Error> refuse(const std::string &name, const std::string &why, int sys_errno = 0) {
  return fail(ErrorCode::bad_argument, name + ": " + why, sys_errno);
}

const char *kind_of(const struct stat &status) {
  switch (status.st_mode & S_IFMT) {
    case S_IFIFO:
      return "a pipe";
    case S_IFSOCK:
      return "a socket";
    case S_IFDIR:
      return "a directory";
    case S_IFCHR:
      return "a character device";
    case S_IFLNK:
      return "a symlink";
    default:
      return "no file";
  }
}

std::string access_mode(int flags) {
  switch (flags & O_ACCMODE) {
    case O_RDONLY:
      return "O_RDONLY";
    case O_WRONLY:
      return "O_WRONLY";
    default:
      return "O_RDWR";
  }
}

/// "'/path' (device 8:1, inode 12)"
std::string identity(const Passed &passed) {
  char target[4096];
  const ssize_t bytes = ::readlink(self_path(passed.number).c_str(), target, sizeof target);
  const std::string path =
      bytes > 0 ? "'" + std::string(target, static_cast<size_t>(bytes)) + "' " : std::string();
  return path + "(device " + std::to_string(major(passed.status.st_dev)) + ":" +
         std::to_string(minor(passed.status.st_dev)) + ", inode " +
         std::to_string(passed.status.st_ino) + ")";
}

/// Whether two numbers are one open file description; false also where the kernel does not say
/// (no CONFIG_KCMP, a seccomp filter).
bool are_duplicates(int first, int second) {
  const pid_t self = ::getpid();
  return ::syscall(SYS_kcmp, self, self, KCMP_FILE, first, second) == 0;
}

/// Opens nothing: whatever is not open is left alone, because another thread may get its number.
Result<void> take(std::span<const int> numbers_passed, PassedSet &set, const std::string &name) {
  int missing = 0;
  bool is_missing = false;
  bool is_twice = false;
  int twice = 0;
  for (const int number : numbers_passed) {
    Passed passed;
    passed.number = number;
    passed.flags = ::fcntl(number, F_GETFL);
    if (passed.flags < 0) {
      is_missing = true;
      missing = number;
    } else if (std::ranges::any_of(set.all,
                                   [&](const Passed &one) { return one.number == number; })) {
      is_twice = true;
      twice = number;
    } else {
      set.all.push_back(passed);
    }
  }
  if (is_missing) {
    return refuse(name, "descriptor " + std::to_string(missing) + " is not open (EBADF)", EBADF);
  }
  if (is_twice) {
    return refuse(name, "descriptor " + std::to_string(twice) +
                            " was passed twice; open the file twice, once with O_DIRECT and once "
                            "without");
  }
  return {};
}

Result<void> check_one(Passed &passed, bool writable, const std::string &name) {
  const std::string shown = "descriptor " + std::to_string(passed.number);
  if (::fstat(passed.number, &passed.status) != 0) {
    return fail_errno(errno, name + ": " + shown + ": cannot ask what it is");
  }
  if (!S_ISREG(passed.status.st_mode) && !S_ISBLK(passed.status.st_mode)) {
    return refuse(name, shown + " is " + kind_of(passed.status) +
                            "; a seekable target is required: a regular file or a block device");
  }
  if ((passed.flags & O_PATH) != 0) {
    return refuse(name, shown + " was opened with O_PATH, which allows no reading and no writing");
  }
  const int access = passed.flags & O_ACCMODE;
  if (access == (writable ? O_RDONLY : O_WRONLY)) {
    return refuse(name, shown + " was opened " + access_mode(passed.flags) + "; " +
                            (writable ? "writing needs O_WRONLY" : "reading needs O_RDONLY") +
                            " or O_RDWR");
  }
  if ((passed.flags & O_APPEND) != 0) {
    return refuse(name, shown +
                            " was opened with O_APPEND, which puts every write at the end of the "
                            "file; open it without");
  }
  return {};
}

Result<void> check_pair(const std::vector<Passed> &passed, const std::string &name) {
  const Passed &first = passed[0];
  const Passed &second = passed[1];
  if (first.status.st_dev != second.status.st_dev || first.status.st_ino != second.status.st_ino) {
    return refuse(name, numbers(passed) + " are different files: " + identity(first) + " and " +
                            identity(second));
  }
  // O_DIRECT belongs to the open file description: different flags are different ones.
  if (first.is_direct() != second.is_direct()) {
    return {};
  }
  if (are_duplicates(first.number, second.number)) {
    return refuse(name, numbers(passed) +
                            " are duplicates of one open file description; open the file twice, "
                            "once with O_DIRECT and once without");
  }
  return refuse(name, (first.is_direct() ? "both " : "neither of ") + numbers(passed) + " " +
                          (first.is_direct() ? "have" : "has") +
                          " O_DIRECT; exactly one must have it");
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
    return no_direct(name);
  }
  return {};
}

Result<Descriptors> Descriptors::adopt(std::span<const int> passed, bool writable, DirectMode mode,
                                       const std::string &name) {
  PassedSet set;
  QV_TRY(take(passed, set, name));
  const size_t count_min = writable ? 2 : 1;
  if (set.all.size() < count_min || set.all.size() > 2) {
    return refuse(name, std::to_string(set.all.size()) +
                            (set.all.size() == 1 ? " descriptor was" : " descriptors were") +
                            " passed; " +
                            (writable ? "writing needs two, one with O_DIRECT and one without"
                                      : "reading needs one or two, of two one with O_DIRECT"));
  }
  for (Passed &one : set.all) {
    QV_TRY(check_one(one, writable, name));
  }
  if (set.all.size() == 2) {
    QV_TRY(check_pair(set.all, name));
  }
  Descriptors descriptors;
  descriptors.is_block_device_ = S_ISBLK(set.all[0].status.st_mode);
  for (Passed &one : set.all) {
    // Passed through exec or by a QEMU that does not care; ours are never inherited.
    ::fcntl(one.number, F_SETFD, FD_CLOEXEC);
    (one.is_direct() ? descriptors.direct_ : descriptors.buffered_) = std::exchange(one.number, -1);
  }
  QV_TRY(descriptors.adopt_direct(mode, name));
  return descriptors;
}

/// What O_DIRECT is worth here.
Result<void> Descriptors::adopt_direct(DirectMode mode, const std::string &name) {
  uint32_t alignment = 0;
  if (direct_ >= 0) {
    if (const auto reported = reported_alignment(direct_)) {
      alignment = *reported;
    } else if ((::fcntl(direct_, F_GETFL) & O_ACCMODE) == O_WRONLY) {
      alignment = probed_alignment_max;  // It cannot be read from: what every disk in use accepts.
    } else {
      const int64_t bytes = device_or_file_size(direct_, is_block_device_);
      alignment = probed_alignment(direct_, bytes < 0 ? 0 : static_cast<uint64_t>(bytes));
    }
  }
  if (alignment == 0 && mode == DirectMode::on) {
    if (direct_ < 0) {
      return refuse(name, "descriptor " + std::to_string(buffered_) +
                              " has no O_DIRECT; pass one that has, or use --direct off or "
                              "--direct auto");
    }
    return no_direct(name);
  }
  direct_alignment_ = std::max(alignment, 1U);
  if (direct_ >= 0 && buffered_ < 0) {
    adopt_only_direct();
  }
  if (direct_ >= 0 && buffered_ >= 0 && (alignment == 0 || mode == DirectMode::off)) {
    ::close(std::exchange(direct_, -1));
    direct_alignment_ = 1;
  }
  return {};
}

/// For reading: looks for a buffered descriptor beside the direct one.
void Descriptors::adopt_only_direct() {
  if (direct_alignment_ == 1) {
    // O_DIRECT is a word without meaning to this file system, which reads through the page cache.
    std::swap(direct_, buffered_);
    return;
  }
  // The kernel asks for permission anew, which whoever passed the descriptor may have and we not.
  const int opened = ::open(self_path(direct_).c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY);
  struct stat first;
  struct stat second;
  if (opened >= 0 && ::fstat(opened, &first) == 0 && ::fstat(direct_, &second) == 0 &&
      first.st_dev == second.st_dev && first.st_ino == second.st_ino) {
    buffered_ = opened;
  } else if (opened >= 0) {
    ::close(opened);
  }
}

Result<Descriptors> Descriptors::duplicate(const std::string &name) const {
  Descriptors other;
  other.direct_alignment_ = direct_alignment_;
  other.is_block_device_ = is_block_device_;
  for (const auto &[from, to] :
       {std::pair(buffered_, &other.buffered_), std::pair(direct_, &other.direct_)}) {
    if (from < 0) {
      continue;
    }
    *to = ::fcntl(from, F_DUPFD_CLOEXEC, 0);
    if (*to < 0) {
      return fail_errno(errno, name + ": cannot duplicate descriptor " + std::to_string(from));
    }
  }
  return other;
}

int64_t Descriptors::read(void *data, size_t bytes, uint64_t offset) const {
  if (buffered_ < 0) {
    return read_bounced(static_cast<std::byte *>(data), bytes, offset);
  }
  const ssize_t result = ::pread(buffered_, data, bytes, static_cast<off_t>(offset));
  return result < 0 ? -errno : result;
}

/// May read less than asked, as pread() may.
int64_t Descriptors::read_bounced(std::byte *data, size_t bytes, uint64_t offset) const {
  const uint64_t begin = round_down(offset, direct_alignment_);
  const size_t skipped = static_cast<size_t>(offset - begin);
  const size_t wanted = std::min(bytes, bounce_bytes_max - skipped);
  const size_t whole = round_up(skipped + wanted, direct_alignment_);
  const std::unique_ptr<std::byte, void (*)(void *)> memory(
      static_cast<std::byte *>(
          std::aligned_alloc(std::max(direct_alignment_, probed_alignment_max),
                             round_up(whole, std::max(direct_alignment_, probed_alignment_max)))),
      std::free);
  if (!memory) {
    return -ENOMEM;
  }
  const ssize_t result = ::pread(direct_, memory.get(), whole, static_cast<off_t>(begin));
  if (result < 0) {
    return -errno;
  }
  const size_t got = static_cast<size_t>(result);
  const size_t useful = got > skipped ? std::min(got - skipped, wanted) : 0;
  std::copy_n(memory.get() + skipped, useful, data);
  return static_cast<int64_t>(useful);
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

bool Descriptors::on_fuse() const {
  struct statfs status = {};
  return ::fstatfs(any(), &status) == 0 && status.f_type == FUSE_SUPER_MAGIC;
}

bool Descriptors::takes_direct(const BackendOp &op) const {
  return direct_ >= 0 && is_aligned(op, direct_alignment_);
}

int64_t DescriptorBackend::read_some(void *data, size_t bytes, uint64_t offset) {
  return descriptors_.read(data, bytes, offset);
}

int64_t DescriptorBackend::write_some(const void *data, size_t bytes, uint64_t offset) {
  const ssize_t result = ::pwrite(descriptors_.buffered(), data, bytes, static_cast<off_t>(offset));
  return result < 0 ? -errno : result;
}

int DescriptorBackend::sync() {
  return ::fsync(descriptors_.any()) == 0 ? 0 : -errno;
}

int64_t DescriptorBackend::size() {
  return device_or_file_size(descriptors_.any(), descriptors_.is_block_device());
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
  std::vector<int> present;
  for (const int descriptor : {descriptors_.buffered(), descriptors_.direct()}) {
    if (descriptor >= 0) {
      present.push_back(descriptor);
    }
  }
  return present;
}

}  // namespace qvmstate::io
