// Work on a VM that stands still for it, and goes on afterwards whatever happens.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <string>

#include "plugin/qemu/guest_ram.h"
#include "plugin/qemu/handover.h"
#include "plugin/qemu/live_vm.h"
#include "qcow2/io/result.h"

namespace qvmstate::qemu {

inline double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

/// Given the device state.
using StoppedWork = std::function<Result<void>(std::span<const std::byte>)>;

/// Runs `work` between stop and give back, under the guardian; with HandoverKind::images the VM's
/// images are ours meanwhile. Returns the seconds that the VM stood. The first error is the one
/// reported; a failed give back is added to it.
Result<double> while_stopped(LiveVm &vm, const Observer &observer, const std::string &what,
                             Seat seat, HandoverKind kind, Clock::time_point begin,
                             const StoppedWork &work);

}  // namespace qvmstate::qemu
