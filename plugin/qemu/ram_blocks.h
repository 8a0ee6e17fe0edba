// The RAM blocks of a QEMU that migrate, and where in its memory they lie.
//
// Names and sizes come from `info ramblock`. Its HVA column (since 8.0) gives the addresses; 7.2
// has none, and only the plugin, inside the process, can ask QEMU's exported functions there.
// A block without a name is not registered for migration and is left out.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "plugin/qemu/qmp.h"
#include "qcow2/io/result.h"
#include "vmstate/ram_source.h"

namespace qvmstate::qemu {

struct HostRamBlock {
  vmstate::RamBlock block;
  std::optional<uint64_t> address;
  bool operator==(const HostRamBlock &) const = default;
};

/// Parses the output of `info ramblock`. Blocks without a name are left out.
Result<std::vector<HostRamBlock>> parse_info_ramblock(std::string_view output);

/// From outside: refuses a QEMU that shows no addresses.
Result<std::vector<HostRamBlock>> ram_blocks_from_outside(Qmp &qmp);

/// From inside the QEMU process that `qmp` talks to: addresses from QEMU's own functions where the
/// monitor shows none, and then both must agree on names and sizes.
Result<std::vector<HostRamBlock>> ram_blocks_from_inside(Qmp &qmp);

}  // namespace qvmstate::qemu
