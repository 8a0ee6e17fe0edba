// FULL sections without footers (machine types up to 2.3, or -global
// migration.send-section-footer=off): only the vmdescription behind the stream tells where each
// ends.
#pragma once

#include <cstddef>
#include <span>

#include "qcow2/io/result.h"
#include "vmstate/section_scan.h"

namespace qvmstate::vmstate {

/// Splits the sections from the start of `bytes` on, as far as they go; the description must lie
/// somewhere behind them in `bytes`.
Result<SectionRun> split_described_run(std::span<const std::byte> bytes);

}  // namespace qvmstate::vmstate
