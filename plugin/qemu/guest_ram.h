// The RAM of a VM, wherever it is read from.
#pragma once

#include <memory>
#include <vector>

#include "plugin/qemu/live_vm.h"
#include "plugin/qemu/memory_map.h"
#include "qcow2/io/result.h"
#include "vmstate/ram_source.h"

namespace qvmstate::qemu {

/// Where we sit: inside the QEMU that is saved, or outside.
enum class Seat { plugin, attached };

/// For the plugin: the QMP socket must be that of this process.
Result<void> check_seat(const LiveVm &vm, Seat seat);

struct GuestRam {
  std::unique_ptr<vmstate::RamSource> source;
  MemoryMap *map = nullptr;  ///< of the source
};

/// The same RAM `count` times, for as many threads.
Result<std::vector<GuestRam>> open_ram(LiveVm &vm, Seat seat, unsigned count = 1);

}  // namespace qvmstate::qemu
