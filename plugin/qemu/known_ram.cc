#include "plugin/qemu/known_ram.h"

#include <algorithm>
#include <utility>

#include "plugin/qemu/protectable_ram.h"
#include "vmstate/dirty_pages.h"

namespace qvmstate::qemu {
namespace {

/// With addresses in this process; 0 for what cannot be addressed, and is not protectable.
std::vector<HostRamBlock> blocks_of(const vmstate::RamSource &ram) {
  std::vector<HostRamBlock> blocks;
  for (size_t i = 0; i < ram.blocks().size(); ++i) {
    blocks.push_back({ram.blocks()[i], reinterpret_cast<uint64_t>(ram.view(i))});
  }
  return blocks;
}

std::vector<MemoryRange> ranges_of(const std::vector<HostRamBlock> &blocks) {
  std::vector<MemoryRange> ranges;
  ranges.reserve(blocks.size());
  for (const HostRamBlock &block : blocks) {
    ranges.push_back({*block.address, block.block.used_bytes});
  }
  return ranges;
}

void drop_groups(std::vector<std::optional<vmstate::Group>> &groups, uint64_t pages_per_group,
                 const vmstate::RamBlock &block, const std::vector<uint64_t> &changed) {
  const uint64_t *const words = changed.data();
  const vmstate::DirtyPages dirty({&words, 1});
  const uint64_t end = block.used_bytes / vmstate::aligned_page_bytes;
  for (uint64_t page = dirty.first_dirty(0, 0, end); page < end;) {
    const uint64_t group = page / pages_per_group;
    groups[group].reset();
    const uint64_t next = std::min(end, (group + 1) * pages_per_group);
    page = dirty.first_dirty(0, next, end);
  }
}

}  // namespace

Result<vmstate::KnownGroups> KnownRam::begin_save(const GuestRam &ram, uint64_t group_bytes) {
  vmstate::KnownGroups groups = std::exchange(groups_, {});
  auto done = drop_changed(ram, group_bytes, groups);
  if (!done) {
    forget();
    return tl::unexpected(std::move(done).error());
  }
  return groups;
}

void KnownRam::forget() {
  tracker_.reset();
  groups_.clear();
}

Result<void> KnownRam::drop_changed(const GuestRam &ram, uint64_t group_bytes,
                                    vmstate::KnownGroups &groups) {
  std::vector<HostRamBlock> blocks = blocks_of(*ram.source);
  QV_TRY(check_protectable(blocks, *ram.map));
  QV_TRY(check_not_merged(blocks));
  if (!tracker_ || blocks != blocks_) {
    forget();
    groups.clear();
    QV_ASSIGN(tracker_, DirtyTracker::begin(ranges_of(blocks)));
    blocks_ = std::move(blocks);
  }
  QV_ASSIGN(const auto changed, tracker_->next_changed());
  if (groups.empty() || group_bytes != group_bytes_) {
    groups = vmstate::nothing_known(ram.source->blocks(), group_bytes);
    group_bytes_ = group_bytes;
    return {};
  }
  for (size_t i = 0; i < groups.size(); ++i) {
    drop_groups(groups[i], vmstate::pages_per_group(group_bytes), blocks_[i].block, changed[i]);
  }
  return {};
}

}  // namespace qvmstate::qemu
