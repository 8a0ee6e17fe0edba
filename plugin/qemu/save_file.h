// A save that goes to a plain file, as QEMU's `migrate file:` would have written it.
//
// The VM stands while it is written and goes on afterwards; its disks stay QEMU's all the time, and
// are not saved: whoever loads the file needs them as they were.
#pragma once

#include "plugin/qemu/guest_ram.h"
#include "plugin/qemu/live_vm.h"
#include "plugin/qemu/operations.h"
#include "plugin/qemu/save_target.h"
#include "qcow2/io/result.h"

namespace qvmstate::qemu {

Result<SaveReport> save_file(LiveVm &vm, const SaveOptions &options, GivenDescriptors &given,
                             const Observer &observer, Seat seat, Clock::time_point begin);

}  // namespace qvmstate::qemu
