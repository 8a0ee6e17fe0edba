// The save of a running VM: one path for the plugin and for attaching, which differ only in where
// RAM comes from and in the guardian.
#pragma once

#include <string>

#include "plugin/qemu/guest_ram.h"
#include "plugin/qemu/known_ram.h"
#include "plugin/qemu/operations.h"

namespace qvmstate::qemu {

/// `seat` plugin: this process is the QEMU at the other end of `qmp_path`, and `known_ram` what it
/// knows from the saves before.
Result<SaveReport> save(const std::string &qmp_path, const SaveOptions &options,
                        const Observer &observer, Seat seat, KnownRam *known_ram);

Result<DeleteReport> delete_snapshot(const std::string &qmp_path, const std::string &name,
                                     const Observer &observer, Seat seat);

}  // namespace qvmstate::qemu
