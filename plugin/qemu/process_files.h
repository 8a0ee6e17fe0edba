// The open files of a process, as /proc shows them, and names as that process sees them.
//
// A name that QEMU reports is true in QEMU's root, mount namespace and working directory, not in
// ours; it is resolved under /proc/PID/root and /proc/PID/cwd and compared by device and inode with
// the descriptors that the process really has.
#pragma once

#include <sys/stat.h>
#include <sys/types.h>

#include <string>
#include <vector>

#include "plugin/qemu/descriptor.h"
#include "qcow2/io/result.h"

namespace qvmstate::qemu {

struct OpenFile {
  int number = -1;
  std::string target;  ///< of the link, "/path" or "/path (deleted)"; as seen from our root
  dev_t device = 0;
  ino_t inode = 0;
  nlink_t links = 0;
  mode_t mode = 0;
};

/// Regular files and block devices that the process has open.
Result<std::vector<OpenFile>> open_files(pid_t pid);

/// fstatat as the process would see `name` (its root, its working directory, symlinks inside its
/// root). False: no such file there.
bool stat_as(pid_t pid, const std::string &name, struct stat &status);

/// Opens the file behind descriptor `number` of the process anew, with `flags` | O_CLOEXEC.
Result<Descriptor> reopen(pid_t pid, int number, int flags, const std::string &shown_name);

/// "/proc/self/fd/N"
std::string own_descriptor_path(int number);

}  // namespace qvmstate::qemu
