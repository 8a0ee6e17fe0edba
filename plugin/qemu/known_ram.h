// What a process knows of its guest's RAM from one save in the layout stream-aligned to the next:
// what each group is, and, by dirty_tracker.h, which groups are still that.
//
// It holds for the RAM, not for a snapshot: any base will do, and it does not matter whether the
// snapshot still exists that was saved then. Loads write through the page tables, so they are seen.
//
// Takes 18 bytes a group: 0.3 MiB a GiB. Only a save that was committed leaves anything known.
//
// Threads: one at a time.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "plugin/qemu/dirty_tracker.h"
#include "plugin/qemu/guest_ram.h"
#include "plugin/qemu/ram_blocks.h"
#include "qcow2/io/result.h"
#include "vmstate/aligned_group.h"

namespace qvmstate::qemu {

class KnownRam {
 public:
  /// The guest stands, from here to the end of the save. What is known of its groups; an error says
  /// why nothing can be. From now on writes are noted for the next time.
  Result<vmstate::KnownGroups> begin_save(const GuestRam &ram, uint64_t group_bytes);
  /// The save was committed, and found out what all groups are.
  void end_save(vmstate::KnownGroups groups) { groups_ = std::move(groups); }
  /// Nothing is known any more, and RAM is nobody's: of a userfaultfd, that is.
  void forget();

 private:
  Result<void> drop_changed(const GuestRam &ram, uint64_t group_bytes,
                            vmstate::KnownGroups &groups);

  std::optional<DirtyTracker> tracker_;
  std::vector<HostRamBlock> blocks_;  // that it has
  uint64_t group_bytes_ = 0;
  vmstate::KnownGroups groups_;  // none: nothing is known
};

}  // namespace qvmstate::qemu
