#include "plugin/qemu/process_files.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/syscall.h>

#include <cerrno>
#include <climits>
#include <cstdlib>
#include <memory>

namespace qvmstate::qemu {

Result<std::vector<OpenFile>> open_files(pid_t pid) {
  const std::string folder = "/proc/" + std::to_string(pid) + "/fd";
  std::unique_ptr<DIR, int (*)(DIR *)> entries(::opendir(folder.c_str()), ::closedir);
  if (!entries && errno == ENOENT && ::access("/proc/self/fd", F_OK) != 0) {
    return fail(ErrorCode::not_found,
                "there is no /proc here, which a save needs; mount it (also in QEMU's chroot, for "
                "the plugin)");
  }
  if (!entries) {
    return fail_errno(errno, "listing the open files of QEMU (process " + std::to_string(pid) +
                                 "); run as root or as QEMU's user");
  }
  std::vector<OpenFile> files;
  while (const dirent *entry = ::readdir(entries.get())) {
    char *end = nullptr;
    const long number = std::strtol(entry->d_name, &end, 10);
    struct stat status;
    if (end == entry->d_name || *end != 0 ||
        ::fstatat(::dirfd(entries.get()), entry->d_name, &status, 0) != 0) {
      continue;  // "." and "..", or closed meanwhile
    }
    if (!S_ISREG(status.st_mode) && !S_ISBLK(status.st_mode)) {
      continue;
    }
    char target[PATH_MAX];
    const ssize_t bytes =
        ::readlinkat(::dirfd(entries.get()), entry->d_name, target, sizeof target);
    files.push_back({static_cast<int>(number),
                     std::string(target, bytes > 0 ? static_cast<size_t>(bytes) : 0), status.st_dev,
                     status.st_ino, status.st_nlink, status.st_mode});
  }
  return files;
}

bool stat_as(pid_t pid, const std::string &name, struct stat &status) {
  const std::string process = "/proc/" + std::to_string(pid);
  // RESOLVE_IN_ROOT keeps absolute symlinks and ".." inside the root of the process.
  auto resolve = [](const std::string &root, const std::string &path) {
    const Descriptor folder(::open(root.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
    if (!folder) {
      return Descriptor();
    }
    open_how how = {};
    how.flags = O_PATH | O_CLOEXEC;
    how.resolve = RESOLVE_IN_ROOT;
    return Descriptor(
        static_cast<int>(::syscall(SYS_openat2, folder.get(), path.c_str(), &how, sizeof how)));
  };
  std::string path = name;
  if (!name.starts_with('/')) {
    // The link of cwd is shown relative to our root; inside a chroot it is cut to the part below.
    char cwd[PATH_MAX];
    char root[PATH_MAX];
    const ssize_t cwd_bytes = ::readlink((process + "/cwd").c_str(), cwd, sizeof cwd);
    const ssize_t root_bytes = ::readlink((process + "/root").c_str(), root, sizeof root);
    if (cwd_bytes <= 0 || root_bytes <= 0) {
      return false;
    }
    std::string folder(cwd, static_cast<size_t>(cwd_bytes));
    const std::string above(root, static_cast<size_t>(root_bytes));
    if (above != "/" && folder.starts_with(above)) {
      folder.erase(0, above.size());
    }
    path = folder + "/" + name;
  }
  const Descriptor file = resolve(process + "/root", path);
  return file && ::fstat(file.get(), &status) == 0;
}

Result<Descriptor> reopen(pid_t pid, int number, int flags, const std::string &shown_name) {
  const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(number);
  Descriptor file(::open(path.c_str(), flags | O_CLOEXEC));
  if (!file) {
    return fail_errno(errno, "'" + shown_name + "': opening the file that QEMU has open");
  }
  return file;
}

std::string own_descriptor_path(int number) {
  return "/proc/self/fd/" + std::to_string(number);
}

}  // namespace qvmstate::qemu
