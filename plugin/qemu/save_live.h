// The save of a VM that runs on while its RAM is copied.
//
// first handover   device state, snapshot of all disks with clusters reserved for the stream
//                  (qcow2/image_set.h), RAM write-protected (live_ram.h)
// meanwhile        the guest runs; the stream goes into the reserved clusters, past QEMU, which
//                  holds the image, and touches nothing else in it
// second handover  the reserved becomes the finished snapshot
//
// By the plugin only: who writes past the image's locks has to die with QEMU, which holds them.
#pragma once

#include "plugin/qemu/save_context.h"
#include "plugin/qemu/write_protection.h"

namespace qvmstate::qemu {

/// Before the stop: whether this VM can be saved live, with the vmstate on this disk.
Result<WriteProtection> check_live(LiveVm &vm, const Disk &disk, io::DirectMode direct, Seat seat);

Result<void> save_live(SaveContext &context, WriteProtection protection);

}  // namespace qvmstate::qemu
