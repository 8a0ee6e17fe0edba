// After a save whose process and guardian both died: the images go back to QEMU, a save over
// several images is finished or undone, and the guest runs if it ran.
//
// Whether it ran is written in the fd set that the save left in QEMU.
#include <algorithm>

#include "plugin/qemu/handover.h"
#include "plugin/qemu/live_vm.h"
#include "plugin/qemu/marks.h"
#include "plugin/qemu/operations.h"
#include "qcow2/image_set.h"

namespace qvmstate::qemu {
namespace {

constexpr milliseconds resume_patience{5000};

Result<void> recover_images(const LiveVm &vm, ResumeReport &report) {
  QV_ASSIGN(OwnedImages owned, OwnedImages::open(vm.disks, {}));
  QV_ASSIGN(const std::vector<std::string> done, qcow2::recover_set(owned.images()));
  report.actions.insert(report.actions.end(), done.begin(), done.end());
  return {};
}

}  // namespace

Result<ResumeReport> resume(const std::string &qmp_path) {
  ResumeReport report;
  QV_ASSIGN(LiveVm vm, connect_vm(qmp_path));
  QV_ASSIGN(const Json status, vm.qmp->execute("query-status"));
  const std::string state = text_at(status, "status");
  vm.running = flag_at(status, "running");
  if (state != "running" && state != "paused" && state != "prelaunch") {
    return fail(ErrorCode::bad_state, "the VM is in run state '" + state +
                                          "', which no interrupted save leaves; nothing was done");
  }
  QV_ASSIGN(const Marks marks, find_marks(*vm.qmp));
  QV_ASSIGN(vm.disks, find_disks(*vm.qmp, vm.pid));
  bool inactive = false;
  for (const Disk &disk : vm.disks) {
    QV_ASSIGN(const Holder holder, holder_of(disk));
    inactive = inactive || (!vm.running && (holder == Holder::inactive || !disk.active));
  }
  QV_ASSIGN(const WatchedImages watched, WatchedImages::open(vm.disks));
  const bool unfinished = qcow2::needs_recovery(watched.images());
  const bool run = vm.running || marks.was_running;

  if (unfinished && inactive) {
    report.was_interrupted = true;
    QV_TRY(recover_images(vm, report));
  } else if (unfinished) {
    report.was_interrupted = true;
    Handover handover(*vm.qmp, vm.disks, vm.running, HandoverKind::images);
    QV_TRY(handover.mark("resume"));
    QV_TRY(handover.stop());
    QV_TRY(handover.take());
    QV_TRY(recover_images(vm, report));
    QV_TRY(handover.give_back());
  }
  if (inactive || (marks.was_running && !vm.running)) {
    report.was_interrupted = true;
    QV_TRY(bring_back(*vm.qmp, vm.disks, run, can_set_active(*vm.qmp), resume_patience));
    if (inactive) {
      report.actions.push_back("QEMU has taken its disks back");
    }
    if (run) {
      report.actions.push_back("the guest runs again");
    }
  }
  forget_marks(*vm.qmp);
  QV_ASSIGN(const Json after, vm.qmp->execute("query-status"));
  report.running = flag_at(after, "running");
  return report;
}

}  // namespace qvmstate::qemu
