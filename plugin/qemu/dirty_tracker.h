// Which pages of this process's memory were written, as the kernel tells it; nobody waits for it.
//
// userfaultfd in its asynchronous mode protects pages, and the kernel takes the protection off a
// page at the first write, whoever writes through the page tables: vCPUs under TCG and KVM, threads
// of QEMU, system calls. The PAGEMAP_SCAN ioctl tells which pages have lost it. (Linux 6.7 and
// later, Documentation/admin-guide/mm/pagemap.rst.)
//
// Told is what certainly has not changed: pages that are there, in memory or swapped out, and still
// protected. Holes are not: where memory was given back (MADV_DONTNEED, as a balloon does it) page
// and protection are gone together, and a scan for what was written shows nothing. They are not
// protected either, which would fill page tables with marks; what is touched later has none.
// Whatever else makes a page lose its protection makes it count as changed.
//
// Not seen is DMA into pages that a device has pinned. QEMU drains its disk requests when the guest
// is stopped, so none of them is in flight when pages are protected, and what begins later goes
// through the page tables; devices that pin all of RAM (vfio, vdpa) are refused (preflight.h).
//
// The price: the guest's first write to a page takes a fault, and to a huge page splits it.
//
// Threads: one at a time.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "plugin/qemu/descriptor.h"
#include "plugin/qemu/userfaultfd.h"
#include "qcow2/io/result.h"

namespace qvmstate::qemu {

class DirtyTracker {
 public:
  /// Refuses where the kernel does not allow it. The ranges do not overlap.
  static Result<DirtyTracker> begin(std::vector<MemoryRange> ranges);

  /// The pages of each range that were written since the last call, or may have been: bit n % 64 of
  /// words[n / 64]; the first time, all. A write that comes meanwhile is told now or the next time.
  Result<std::vector<std::vector<uint64_t>>> next_changed();

 private:
  DirtyTracker(Descriptor userfaultfd, Descriptor pagemap, std::vector<MemoryRange> ranges)
      : userfaultfd_(std::move(userfaultfd)),
        pagemap_(std::move(pagemap)),
        ranges_(std::move(ranges)) {}

  Descriptor userfaultfd_;  // the protection lasts as long as it
  Descriptor pagemap_;
  std::vector<MemoryRange> ranges_;
};

}  // namespace qvmstate::qemu
