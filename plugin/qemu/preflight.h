// Look before you stop: whether this VM, in its present state, can be saved by way of
// xen-save-devices-state, which inactivates the disks of a stopped VM.
//
// In the states refused here QEMU aborts, or `cont` does not bring the guest back; devices refused
// here have state that the command leaves out (formats: QEMU 7.2 to 11.1).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "plugin/qemu/qmp.h"
#include "qcow2/io/result.h"

namespace qvmstate::qemu {

struct Machine {
  std::string type;  ///< resolved, without "-machine"
  std::optional<uint32_t> target_page_bits;
  uint64_t page_bytes = 4096;
};

/// Run state, migration, block jobs: asked before the stop and again after it. Returns whether the
/// guest runs.
Result<bool> check_state(Qmp &qmp);

/// What the saved state is for: the capabilities of this QEMU must suit.
enum class Purpose {
  legacy_snapshot,      ///< loadvm of this QEMU
  mapped_ram_snapshot,  ///< the same, with the capability mapped-ram
  legacy_file,          ///< another QEMU's -incoming
  mapped_ram_file,
  deletion,  ///< nothing is loaded: all capabilities suit
};

/// Machine type, devices, migration capabilities, icount.
Result<Machine> check_machine(Qmp &qmp, pid_t pid, Purpose purpose);

/// By the rules for the machine type alone.
Result<Machine> check_machine_type(std::string_view type, std::string_view target);

}  // namespace qvmstate::qemu
