#include "plugin/qemu/marks.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <array>
#include <cerrno>
#include <string_view>

#include "plugin/qemu/process_files.h"

namespace qvmstate::qemu {
namespace {

/// How the words begin; then "running NAME" or "paused NAME".
constexpr std::string_view prefix = "qvmstate: was ";
constexpr uint64_t lock_byte = 101;  // one that a writer holds

/// Whether the operation that left this mark lives.
Result<bool> is_locked(pid_t qemu, int number_in_qemu) {
  QV_ASSIGN(const Descriptor file, reopen(qemu, number_in_qemu, O_RDONLY, "mark of a save"));
  return qcow2::is_locked_by_other(file.get(), lock_byte);
}

Result<void> check_going_on(const Marks &marks, unsigned own) {
  if (marks.going_on > own) {
    return fail(ErrorCode::bad_state,
                "another save or delete on this VM is going on; wait for its end");
  }
  if (!marks.cannot_tell.empty()) {
    return fail(ErrorCode::permission,
                "cannot tell whether a save or delete on this VM is going on or was interrupted (" +
                    marks.cannot_tell +
                    "); wait for the end of what runs, or do this as root or as QEMU's user");
  }
  return {};
}

}  // namespace

Result<Mark> Mark::leave(Qmp &qmp, bool was_running, const std::string &what, unsigned own) {
  Mark mark;
  mark.file_ = Descriptor(::memfd_create("qvmstate-devices", MFD_CLOEXEC));
  if (!mark.file_) {
    return fail_errno(errno, "creating memory for the device state");
  }
  QV_ASSIGN(mark.lock_, qcow2::ImageLock::take(std::array{mark.file()}, qcow2::LockRole::writer,
                                               "memory for the device state"));
  // QEMU opens members of an fd set only with exactly their access mode.
  const Descriptor writable(::open(own_descriptor_path(mark.file()).c_str(), O_WRONLY | O_CLOEXEC));
  if (!writable) {
    return fail_errno(errno, "opening memory for the device state");
  }
  const std::string state = was_running ? "running" : "paused";
  QV_ASSIGN(const Json added,
            qmp.execute("add-fd", {{"opaque", std::string(prefix) + state + " " + what}},
                        command_limit, writable.get()));
  if (!at(added, "fdset-id").is_number()) {
    return fail(ErrorCode::peer, "QEMU took a descriptor, but named no fd set");
  }
  mark.fdset_ = number_at(added, "fdset-id");
  QV_ASSIGN(const Marks marks, find_marks(qmp));
  if (auto alone = check_going_on(marks, own + 1); !alone) {
    (void)qmp.execute("remove-fd", {{"fdset-id", mark.fdset_}});
    return tl::unexpected(alone.error());
  }
  return mark;
}

Result<Marks> find_marks(Qmp &qmp) {
  Marks marks;
  QV_ASSIGN(const Peer qemu, peer_of(qmp.socket()));
  QV_ASSIGN(const Json sets, qmp.execute("query-fdsets"));
  for (const Json &set : sets) {
    for (const Json &member : at(set, "fds")) {
      const std::string opaque = text_at(member, "opaque");
      if (!opaque.starts_with(prefix)) {
        continue;
      }
      const auto locked = is_locked(qemu.pid, static_cast<int>(number_at(member, "fd")));
      if (!locked) {
        marks.cannot_tell = locked.error().message;
      } else if (*locked) {
        ++marks.going_on;
      } else {
        marks.interrupted.push_back(number_at(set, "fdset-id"));
        marks.was_running =
            marks.was_running || opaque.starts_with(std::string(prefix) + "running ");
      }
      break;
    }
  }
  return marks;
}

Result<void> check_none_going_on(Qmp &qmp) {
  QV_ASSIGN(const Marks marks, find_marks(qmp));
  return check_going_on(marks, 0);
}

void forget_marks(Qmp &qmp) {
  if (const auto marks = find_marks(qmp)) {
    for (const uint64_t fdset : marks->interrupted) {
      // QEMU may have closed the set itself, which is as good.
      (void)qmp.execute("remove-fd", {{"fdset-id", fdset}});
    }
  }
}

}  // namespace qvmstate::qemu
