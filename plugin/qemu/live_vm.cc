#include "plugin/qemu/live_vm.h"

#include <signal.h>

#include <cerrno>

#include "plugin/qemu/marks.h"
#include "plugin/qemu/preflight.h"

namespace qvmstate::qemu {

Result<LiveVm> connect_vm(const std::string &qmp_path) {
  LiveVm vm;
  vm.qmp_path = qmp_path;
  QV_ASSIGN(vm.qmp, Qmp::connect(qmp_path));
  QV_ASSIGN(const Peer peer, peer_of(vm.qmp->socket()));
  if (peer.pid <= 0) {
    return fail(ErrorCode::not_found,
                "QMP socket '" + qmp_path +
                    "': QEMU runs in a PID namespace that is not visible here (a container); run "
                    "qvmstate in that namespace or on the host");
  }
  if (::kill(peer.pid, 0) != 0 && errno == ESRCH) {
    return fail(ErrorCode::not_found,
                "QMP socket '" + qmp_path + "': process " + std::to_string(peer.pid) +
                    ", which opened it, is gone, so QEMU's process cannot be found; give QEMU a "
                    "second -qmp unix:PATH,server=on,wait=off");
  }
  vm.pid = peer.pid;
  QV_TRY(check_none_going_on(*vm.qmp));
  return vm;
}

Result<void> look_at(LiveVm &vm) {
  QV_ASSIGN(vm.running, check_state(*vm.qmp));
  QV_ASSIGN(vm.disks, find_disks(*vm.qmp, vm.pid));
  for (const Disk &disk : vm.disks) {
    QV_ASSIGN(const Holder holder, holder_of(disk));
    if (holder == Holder::running && disk.active) {
      continue;
    }
    if (holder == Holder::inactive && !vm.running) {
      return fail(ErrorCode::bad_state,
                  describe(disk) +
                      ": QEMU has let go of it, as an interrupted save or migration "
                      "leaves it; run `qvmstate resume` first");
    }
    return fail(ErrorCode::not_supported,
                describe(disk) +
                    ": QEMU does not hold the locks of the image (locking=off?), so nothing would "
                    "keep it from being used while it is written; start QEMU with locking=auto");
  }
  return {};
}

Result<void> check_cancelled(const Observer &observer) {
  if (observer.cancelled != nullptr && observer.cancelled->load()) {
    return fail(ErrorCode::cancelled, "cancelled; nothing was changed");
  }
  return {};
}

}  // namespace qvmstate::qemu
