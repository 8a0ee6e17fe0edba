// What the two users of userfaultfd share: write_protection.h, which makes writers wait, and
// dirty_tracker.h, which lets them go on.
//
// A range of memory belongs to one userfaultfd at a time, in the whole process: QEMU's own
// background snapshot cannot begin while one of ours has guest RAM, nor the other way round.
//
// Threads: any, for different descriptors.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "plugin/qemu/descriptor.h"
#include "qcow2/io/result.h"

namespace qvmstate::qemu {

struct MemoryRange {
  uint64_t address = 0;  ///< multiples of 4096
  uint64_t bytes = 0;
};

/// With these features, of which the newest is in every kernel from `since` on; refuses, with what
/// to do, where they cannot be had.
Result<Descriptor> open_userfaultfd(uint64_t features, const char *since);

/// Memory that can be write-protected from here on, until the descriptor is closed.
Result<void> register_ranges(int userfaultfd, std::span<const MemoryRange> ranges);

/// Calls `work` for all of the ranges, in pieces that do not cut huge pages apart, from several
/// threads. An errno that it returns ends that, and is returned; else 0.
int for_pieces(std::span<const MemoryRange> ranges,
               const std::function<int(const MemoryRange &)> &work);

}  // namespace qvmstate::qemu
