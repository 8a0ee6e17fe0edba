#include "plugin/qemu/stopped_vm.h"

#include <optional>

#include "plugin/qemu/guardian.h"
#include "plugin/qemu/preflight.h"

namespace qvmstate::qemu {

Result<double> while_stopped(LiveVm &vm, const Observer &observer, const std::string &what,
                             Seat seat, HandoverKind kind, Clock::time_point begin,
                             const StoppedWork &work) {
  std::optional<Guardian> guardian;
  if (seat == Seat::attached) {
    QV_ASSIGN(Guardian started, Guardian::start(*vm.qmp, vm.qmp_path, vm.disks, vm.running));
    guardian.emplace(std::move(started));
  }
  Handover handover(*vm.qmp, vm.disks, vm.running, kind);
  QV_TRY(handover.mark(what, vm.marks));
  QV_TRY(check_cancelled(observer));
  const auto stop_begin = Clock::now();
  auto work_on_it = [&]() -> Result<void> {
    QV_TRY(handover.stop());
    report_progress(observer, {"stopped", 0, 0, 0, seconds_between(begin, Clock::now())});
    QV_TRY(check_state(*vm.qmp));
    QV_TRY(handover.take());
    return work(handover.device_bytes());
  };
  Result<void> done = work_on_it();
  report_progress(observer, {"resuming", 0, 0, 0, seconds_between(begin, Clock::now())});
  auto back = handover.give_back();
  if (!back) {
    if (guardian) {
      guardian->hand_over();
    }
    if (done) {
      return tl::unexpected(back.error());
    }
    done.error().message += "; and giving the images back: " + back.error().message;
  }
  QV_TRY(done);
  return seconds_between(stop_begin, Clock::now());
}

}  // namespace qvmstate::qemu
