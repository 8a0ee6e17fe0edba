// A save into the VM's images, as its steps see it: what all of them know, and what every way of
// saving does with images that are ours.
#pragma once

#include <cstdint>

#include "plugin/qemu/guest_ram.h"
#include "plugin/qemu/handover.h"
#include "plugin/qemu/known_ram.h"
#include "plugin/qemu/live_vm.h"
#include "plugin/qemu/operations.h"
#include "plugin/qemu/preflight.h"
#include "plugin/qemu/save_state.h"
#include "qcow2/image_edit.h"
#include "qcow2/suitability.h"

namespace qvmstate::qemu {

struct SaveContext {
  LiveVm &vm;
  const SaveOptions &options;
  const Observer &observer;
  const Machine &machine;
  size_t vmstate_disk;
  Seat seat;
  Clock::time_point begin;
  RamEstimate ram;  // shortly before the stop
  unsigned channels;
  SaveReport &report;
  KnownRam *known_ram;  // nullptr: attached
};

qcow2::Bitmaps bitmaps_of(const SaveOptions &options);

/// The images, locked and read; what an earlier save left in them is settled, and the new one can
/// be made.
Result<OwnedImages> own_images(SaveContext &context, const io::OpenOptions &options,
                               const ImageChannels &channels = {});

/// Dated now.
qcow2::NewSnapshot new_snapshot(const SaveOptions &options, uint64_t clock_nanos);

}  // namespace qvmstate::qemu
