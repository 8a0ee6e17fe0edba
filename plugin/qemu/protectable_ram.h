// Whether guest RAM is of a kind in which write protection sees every write.
//
// Threads: any.
#pragma once

#include <span>
#include <string>

#include "plugin/qemu/memory_map.h"
#include "plugin/qemu/ram_blocks.h"
#include "qcow2/io/result.h"

namespace qvmstate::qemu {

/// Private anonymous memory is. The map is of these blocks.
Result<void> check_protectable(std::span<const HostRamBlock> blocks, const MemoryMap &map);

/// Whether KSM leaves them alone: it maps the pages that it merges anew, without their protection.
/// Where it runs this takes long (48 ms with 8 GiB in small pages).
Result<void> check_not_merged(std::span<const HostRamBlock> blocks,
                              const std::string &ksm_run = "/sys/kernel/mm/ksm/run");

}  // namespace qvmstate::qemu
