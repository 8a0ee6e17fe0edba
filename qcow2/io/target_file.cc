// See target_file.h.
//
// A file without a name is made with O_TMPFILE: if this process is killed, the kernel drops it.
// Where the file system cannot do that, it has a hidden name from the beginning.
#include "qcow2/io/target_file.h"

#include <fcntl.h>
#include <linux/stat.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <climits>
#include <utility>

#include "qcow2/io/offsets.h"

namespace qvmstate::io {

namespace {

constexpr unsigned links_max = 40;  ///< symlinks one behind the other, as the kernel has it
constexpr unsigned name_attempts = 16;
constexpr mode_t new_mode = S_IRUSR | S_IWUSR;

/// A descriptor for the length of a function.
class Opened {
 public:
  explicit Opened(int number) : number_(number) {}
  Opened(const Opened &) = delete;
  Opened &operator=(const Opened &) = delete;
  ~Opened() {
    if (number_ >= 0) {
      ::close(number_);
    }
  }
  int get() const { return number_; }

 private:
  int number_;
};

bool is_same(const struct stat &first, const struct stat &second) {
  return first.st_dev == second.st_dev && first.st_ino == second.st_ino;
}

std::string folder_of(const std::string &path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, std::max<size_t>(slash, 1));
}

std::string joined(const std::string &folder, const std::string &name) {
  return folder + (folder.ends_with('/') ? "" : "/") + name;
}

/// The path of the file that symlinks at the end of `path` lead to, there or not.
Result<std::string> followed(std::string path, const std::string &name) {
  for (unsigned links = 0; links < links_max; ++links) {
    char target[PATH_MAX];
    const ssize_t bytes = ::readlink(path.c_str(), target, sizeof target);
    if (bytes < 0) {
      return path;  // No link, or not there: whoever opens it will say.
    }
    const std::string next(target, static_cast<size_t>(bytes));
    path = next.starts_with('/') ? next : joined(folder_of(path), next);
  }
  return fail_errno(ELOOP, name + ": cannot open");
}

/// In the folder of `path`, hidden, and free as far as chance goes.
std::string temporary_name(const std::string &path) {
  uint64_t random = 0;
  if (::getrandom(&random, sizeof random, 0) != sizeof random) {
    random = static_cast<uint64_t>(::getpid());
  }
  char suffix[24];
  std::snprintf(suffix, sizeof suffix, "%016llx", static_cast<unsigned long long>(random));
  return joined(folder_of(path), std::string(".qvmstate-") + suffix);
}

std::string self_path(int descriptor) {
  return "/proc/self/fd/" + std::to_string(descriptor);
}

/// What makes rename() over an existing file fail, after everything was written.
Result<void> check_replaceable(const std::string &path, const std::string &name) {
  const std::string remedy = "; give file:PATH,offset=0 to write into it";
  struct statx file = {};
  struct statx folder = {};
  if (::statx(AT_FDCWD, path.c_str(), 0, STATX_BASIC_STATS, &file) != 0 ||
      ::statx(AT_FDCWD, folder_of(path).c_str(), 0, STATX_BASIC_STATS, &folder) != 0) {
    return {};
  }
  if ((file.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0) {
    return fail(ErrorCode::not_supported,
                name + ": cannot be replaced: something is mounted there" + remedy);
  }
  if ((file.stx_attributes & (STATX_ATTR_IMMUTABLE | STATX_ATTR_APPEND)) != 0) {
    return fail(ErrorCode::permission, name +
                                           ": cannot be replaced: it is marked immutable or "
                                           "append-only (chattr -ia)");
  }
  const uid_t self = ::geteuid();
  if ((folder.stx_mode & S_ISVTX) != 0 && self != 0 && self != file.stx_uid &&
      self != folder.stx_uid) {
    return fail(ErrorCode::permission, name +
                                           ": cannot be replaced: it belongs to another user, in a "
                                           "folder where only the owner may (sticky bit)" +
                                           remedy);
  }
  return {};
}

/// Whoever locks a file uses it; a running QEMU locks the images of its disks.
Result<void> check_unlocked(const std::string &path, const std::string &name) {
  const Opened file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK));
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  if (file.get() < 0 || ::fcntl(file.get(), F_OFD_GETLK, &lock) != 0 || lock.l_type == F_UNLCK) {
    return {};
  }
  return fail(ErrorCode::locked, name +
                                     ": somebody holds a lock on it; is it the image of a running "
                                     "VM? give another file");
}

/// A mounted device, or one below device mapper or md, is not opened exclusively.
Result<void> check_unused(const std::string &path, const std::string &name) {
  const Opened device(::open(path.c_str(), O_RDONLY | O_EXCL | O_CLOEXEC));
  if (device.get() < 0 && errno == EBUSY) {
    return fail(ErrorCode::locked, name + ": the device is in use; is it mounted? give another");
  }
  return {};
}

}  // namespace

Result<std::unique_ptr<TargetFile>> TargetFile::open(const std::string &path,
                                                     std::optional<uint64_t> offset,
                                                     const TargetOptions &options) {
  const std::string &name = path;
  if (path.empty()) {
    return fail(ErrorCode::bad_argument, "file: without a path; give file:PATH");
  }
  if (offset.value_or(0) > INT64_MAX) {
    return fail(ErrorCode::bad_argument, name + ": the offset is larger than any file");
  }
  QV_ASSIGN(const std::string real_path, followed(path, name));
  struct stat status = {};
  const bool exists = ::stat(path.c_str(), &status) == 0;
  if (!exists && errno != ENOENT) {
    return fail_errno(errno, name + ": cannot open");
  }
  if (exists && !S_ISREG(status.st_mode) && !S_ISBLK(status.st_mode)) {
    return fail(
        ErrorCode::bad_argument,
        name + ": is neither a regular file nor a block device; a seekable target is required");
  }
  if (exists) {
    QV_TRY(check_unlocked(path, name));
  }
  if (exists && S_ISBLK(status.st_mode)) {
    QV_TRY(check_unused(path, name));
  }
  std::unique_ptr<TargetFile> target(new TargetFile(path, offset.value_or(0)));
  if (!offset && !(exists && S_ISBLK(status.st_mode))) {
    struct stat real = {};
    // Links below /proc lead to files that may have no name any more.
    if (exists && (::stat(real_path.c_str(), &real) != 0 || !is_same(status, real))) {
      return fail(ErrorCode::not_supported,
                  name +
                      ": cannot be replaced: the link leads to a file that has no name; give "
                      "file:PATH,offset=0 to write into it");
    }
    if (exists) {
      QV_TRY(check_replaceable(real_path, name));
    }
    QV_TRY(target->begin_replacing(real_path, options.direct));
  } else {
    QV_TRY(target->begin_in_place(exists ? path : real_path, options.direct));
  }
  QV_TRY(target->open_files(options));
  return target;
}

Result<std::unique_ptr<TargetFile>> TargetFile::adopt(std::span<const int> passed, uint64_t offset,
                                                      const TargetOptions &options,
                                                      const std::string &shown_name) {
  std::unique_ptr<TargetFile> target(new TargetFile(shown_name, offset));
  QV_ASSIGN(target->descriptors_, Descriptors::adopt(passed, true, options.direct, shown_name));
  if (offset > INT64_MAX) {
    return fail(ErrorCode::bad_argument, shown_name + ": the offset is larger than any file");
  }
  QV_TRY(target->cut_off());
  QV_TRY(target->open_files(options));
  return target;
}

Result<void> TargetFile::begin_replacing(const std::string &path, DirectMode direct) {
  replaces_ = true;
  final_path_ = path;
  const std::string folder = folder_of(path);
  {
    // Reopened through /proc, which may not be there.
    const Opened nameless(::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, new_mode));
    if (nameless.get() >= 0 && ::access(self_path(nameless.get()).c_str(), F_OK) == 0) {
      QV_ASSIGN(descriptors_, Descriptors::open(self_path(nameless.get()), true, direct, name_));
      return {};
    }
  }
  for (unsigned attempt = 0;; ++attempt) {
    const std::string temporary = temporary_name(path);
    const Opened made(
        ::open(temporary.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOCTTY, new_mode));
    if (made.get() >= 0) {
      temporary_path_ = temporary;
      break;
    }
    if (errno != EEXIST || attempt == name_attempts) {
      return fail_errno(errno, name_ + ": cannot make a new file in the folder '" + folder +
                                   "' (to write into an existing file, give file:PATH,offset=0)");
    }
  }
  QV_ASSIGN(descriptors_, Descriptors::open(temporary_path_, true, direct, name_));
  return {};
}

Result<void> TargetFile::begin_in_place(const std::string &path, DirectMode direct) {
  {
    const Opened made(::open(
        path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, new_mode));
    if (made.get() < 0 && errno != EEXIST) {
      return fail_errno(errno, name_ + ": cannot make the file");
    }
    if (made.get() >= 0) {
      made_.emplace();
      if (::fstat(made.get(), &*made_) != 0) {
        return fail_errno(errno, name_ + ": cannot ask what was made");
      }
      final_path_ = path;
    }
  }
  QV_ASSIGN(descriptors_, Descriptors::open(path, true, direct, name_));
  return cut_off();
}

/// In place: what lies behind the offset goes.
Result<void> TargetFile::cut_off() {
  if (descriptors_.is_block_device()) {
    return check_room(0);
  }
  struct stat status = {};
  if (::fstat(descriptors_.any(), &status) != 0) {
    return fail_errno(errno, name_ + ": cannot ask for the size");
  }
  if (::ftruncate(descriptors_.any(), static_cast<off_t>(offset_)) != 0) {
    return fail_errno(errno, name_ + ": cannot cut it off at " + std::to_string(offset_));
  }
  abort_bytes_ = std::min(offset_, static_cast<uint64_t>(status.st_size));
  return {};
}

Result<void> TargetFile::open_files(const TargetOptions &options) {
  OpenOptions each;
  each.writable = true;
  each.engine = options.engine;
  each.depth = options.depth;
  for (unsigned i = 0; i <= options.channels; ++i) {
    QV_ASSIGN(Descriptors duplicates, descriptors_.duplicate(name_));
    QV_ASSIGN(auto file, File::over(std::move(duplicates), each, name_));
    files_.push_back(std::move(file));
  }
  return {};
}

TargetFile::~TargetFile() {
  (void)abort();  // Nobody is left to be told.
}

File &TargetFile::channel(unsigned index) {
  assert(index < channels());
  return *files_[index + 1];
}

uint64_t TargetFile::bytes_written() const {
  uint64_t bytes = 0;
  for (const auto &file : files_) {
    bytes += file->bytes_written();
  }
  return bytes;
}

Result<void> TargetFile::check_room(uint64_t bytes) const {
  if (is_block_device()) {
    const off_t end = ::lseek(descriptors_.any(), 0, SEEK_END);
    if (end >= 0 &&
        (static_cast<uint64_t>(end) < offset_ || static_cast<uint64_t>(end) - offset_ < bytes)) {
      return fail(ErrorCode::no_space, name_ + ": the device has " + std::to_string(end) +
                                           " bytes, and " + std::to_string(bytes) +
                                           " bytes at offset " + std::to_string(offset_) +
                                           " do not fit");
    }
    return {};
  }
  struct statvfs space = {};
  if (::fstatvfs(descriptors_.any(), &space) != 0 || space.f_blocks == 0) {
    return {};  // some file systems (ramfs) do not tell
  }
  const uint64_t blocks = ::geteuid() == 0 ? space.f_bfree : space.f_bavail;
  if (blocks < divide_up(bytes, space.f_frsize)) {
    return fail(ErrorCode::no_space, name_ + ": the save may need " + std::to_string(bytes / mib) +
                                         " MiB, and the file system has " +
                                         std::to_string(blocks * space.f_frsize / mib) +
                                         " MiB; make room or choose "
                                         "another target");
  }
  return {};
}

Result<void> TargetFile::finish(uint64_t end_bytes) {
  assert(!is_over_ && end_bytes >= offset_);
  for (const auto &file : files_) {
    QV_TRY(file->drain());
  }
  if (!is_block_device() && ::ftruncate(descriptors_.any(), static_cast<off_t>(end_bytes)) != 0) {
    return fail_errno(errno, name_ + ": cannot end it at " + std::to_string(end_bytes) + " bytes");
  }
  if (replaces_) {
    struct stat old = {};
    if (::stat(final_path_.c_str(), &old) == 0 &&
        (::fchown(descriptors_.any(), old.st_uid, old.st_gid) != 0 ||
         ::fchmod(descriptors_.any(), old.st_mode & 0777) != 0)) {
      // Only its owner or root could give it to the same people. It stays ours alone.
      (void)::fchmod(descriptors_.any(), new_mode);
    }
  }
  if (::fsync(descriptors_.any()) != 0) {
    return fail_errno(errno, name_ + ": cannot flush to the disk");
  }
  if (replaces_) {
    QV_TRY(give_name());
  }
  is_over_ = true;
  return replaces_ || made_ ? sync_folder() : Result<void>();
}

Result<void> TargetFile::give_name() {
  const std::string what = name_ + ": cannot give the new file its name";
  for (unsigned attempt = 0; temporary_path_.empty(); ++attempt) {
    // A link cannot take the place of a file, a rename can.
    const std::string temporary = temporary_name(final_path_);
    if (::linkat(AT_FDCWD, self_path(descriptors_.any()).c_str(), AT_FDCWD, temporary.c_str(),
                 AT_SYMLINK_FOLLOW) == 0) {
      temporary_path_ = temporary;
    } else if (errno != EEXIST || attempt == name_attempts) {
      return fail_errno(errno, what);
    }
  }
  if (::rename(temporary_path_.c_str(), final_path_.c_str()) != 0) {
    return fail_errno(errno, what);
  }
  temporary_path_.clear();
  return {};
}

/// So that the name survives a power failure as well.
Result<void> TargetFile::sync_folder() const {
  const Opened folder(::open(folder_of(final_path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  // A folder that may be written to but not read cannot be opened, and some file systems do
  // not know the call.
  if (folder.get() >= 0 && ::fsync(folder.get()) != 0 && errno != EINVAL && errno != EROFS) {
    return fail_errno(errno,
                      name_ + ": the file is there, but the folder cannot be flushed to the disk");
  }
  return {};
}

Result<void> TargetFile::abort() {
  if (std::exchange(is_over_, true)) {
    return {};
  }
  for (const auto &file : files_) {
    (void)file->drain();  // A write in flight would make the file longer again.
  }
  int first_errno = 0;
  auto note = [&](int result) {
    first_errno = result != 0 && first_errno == 0 ? errno : first_errno;
  };
  if (!temporary_path_.empty()) {
    note(::unlink(temporary_path_.c_str()));
  }
  if (abort_bytes_) {
    note(::ftruncate(descriptors_.any(), static_cast<off_t>(*abort_bytes_)));
  }
  struct stat named = {};
  // Somebody may have put another file there.
  if (made_ && ::stat(final_path_.c_str(), &named) == 0 && is_same(*made_, named)) {
    note(::unlink(final_path_.c_str()));
  }
  if (first_errno != 0) {
    return fail_errno(first_errno, name_ + ": cannot remove what was written");
  }
  return {};
}

}  // namespace qvmstate::io
