#include "plugin/qemu/fd_sets.h"

#include <fcntl.h>
#include <sys/syscall.h>

#include <cerrno>

namespace qvmstate::qemu {
namespace {

Result<Descriptor> fetch(pid_t pid, const Descriptor &process, int number,
                         const std::string &shown) {
  const std::string what = shown + ": fetching descriptor " + std::to_string(number) + " of QEMU";
  if (pid == ::getpid()) {
    Descriptor copy(::fcntl(number, F_DUPFD_CLOEXEC, 0));
    if (!copy) {
      return fail_errno(errno, what);
    }
    return copy;
  }
  Descriptor copy(static_cast<int>(::syscall(SYS_pidfd_getfd, process.get(), number, 0)));
  if (!copy) {
    const std::string remedy =
        errno == EPERM ? " (run as root or as QEMU's user, where ptrace allows it)"
        : errno == ENOSYS
            ? " (it needs Linux 5.6; pass the descriptors to this command: --fd and --direct-fd)"
            : "";
    return fail_errno(errno, what + remedy);
  }
  return copy;
}

/// The set of that number, or json_missing; `known` gets the numbers of all.
const Json &find_set(const Json &sets, uint64_t number, std::string &known) {
  const Json *found = &json_missing;
  for (const Json &set : sets) {
    const Json &id = at(set, "fdset-id");
    if (!id.is_number_integer()) {
      continue;
    }
    known += (known.empty() ? "" : ", ") + id.dump();
    if (number_at(set, "fdset-id", UINT64_MAX) == number) {
      found = &set;
    }
  }
  return *found;
}

}  // namespace

Result<std::vector<Descriptor>> descriptors_of_fd_set(Qmp &qmp, pid_t pid, uint64_t number,
                                                      FdSetUse use) {
  const std::string shown = "/dev/fdset/" + std::to_string(number);
  QV_ASSIGN(const Json sets, qmp.execute("query-fdsets"));
  if (!sets.is_array()) {
    return fail(ErrorCode::peer, "QEMU answered 'query-fdsets' with no list");
  }
  std::string known;
  const Json &set = find_set(sets, number, known);
  if (!set.is_object()) {
    return fail(ErrorCode::not_found,
                shown + ": QEMU has no such fd set; " +
                    (known.empty() ? "there are none" : "there are " + known) +
                    " (QEMU drops a set when the last monitor closes; add it by add-fd on one that "
                    "stays open)");
  }
  const Json &list = at(set, "fds");
  const size_t count = list.is_array() ? list.size() : 0;
  const bool writing = use == FdSetUse::writing;
  if (writing ? count != 2 : count != 1 && count != 2) {
    return fail(ErrorCode::bad_argument,
                shown + ": the fd set has " + std::to_string(count) +
                    (count == 1 ? " descriptor" : " descriptors") + "; " +
                    (writing ? "writing needs 2, one with O_DIRECT and one without"
                             : "reading needs 1, or 2 of which one has O_DIRECT"));
  }
  Descriptor process;
  if (pid != ::getpid()) {
    process = Descriptor(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
    if (!process) {
      return fail_errno(errno, shown + ": reaching QEMU (process " + std::to_string(pid) + ")");
    }
  }
  std::vector<Descriptor> fetched;
  for (const Json &entry : list) {
    const uint64_t theirs = number_at(entry, "fd", UINT64_MAX);
    if (theirs > INT32_MAX) {
      return fail(ErrorCode::peer, shown + ": QEMU names no descriptor in its fd set");
    }
    QV_ASSIGN(Descriptor copy, fetch(pid, process, static_cast<int>(theirs), shown));
    fetched.push_back(std::move(copy));
  }
  return fetched;
}

}  // namespace qvmstate::qemu
