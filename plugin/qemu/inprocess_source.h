// Guest RAM as the plugin sees it: in its own address space.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "plugin/qemu/memory_map.h"
#include "plugin/qemu/ram_blocks.h"
#include "vmstate/ram_source.h"

namespace qvmstate::qemu {

class InProcessSource : public vmstate::RamSource {
 public:
  static Result<std::unique_ptr<InProcessSource>> open(std::vector<HostRamBlock> blocks);

  std::span<const vmstate::RamBlock> blocks() const override { return blocks_; }
  /// None for shared huge pages, which must be read through their file.
  const std::byte *view(size_t block) const override;
  Result<Presence> presence(size_t block, uint64_t offset) override {
    return map_.presence(block, offset);
  }
  Result<void> read_pages(size_t block, uint64_t offset, size_t count, size_t page_bytes,
                          std::byte *to, size_t stride) override;
  MemoryMap &map() { return map_; }

 private:
  explicit InProcessSource(MemoryMap map) : map_(std::move(map)) {}

  MemoryMap map_;
  std::vector<vmstate::RamBlock> blocks_;
  std::vector<const std::byte *> addresses_;
};

}  // namespace qvmstate::qemu
