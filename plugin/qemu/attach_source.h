// Guest RAM read out of another process, by process_vm_readv.
#pragma once

#include <sys/types.h>

#include <memory>
#include <span>
#include <vector>

#include "plugin/qemu/memory_map.h"
#include "plugin/qemu/ram_blocks.h"
#include "vmstate/ram_source.h"

namespace qvmstate::qemu {

class AttachSource : public vmstate::RamSource {
 public:
  /// Reads one byte of each block, so that a missing permission shows before the guest is stopped.
  static Result<std::unique_ptr<AttachSource>> open(pid_t pid, std::vector<HostRamBlock> blocks);

  std::span<const vmstate::RamBlock> blocks() const override { return blocks_; }
  const std::byte *view(size_t) const override { return nullptr; }
  Result<Presence> presence(size_t block, uint64_t offset) override {
    return map_.presence(block, offset);
  }
  Result<void> read_pages(size_t block, uint64_t offset, size_t count, size_t page_bytes,
                          std::byte *to, size_t stride) override;
  MemoryMap &map() { return map_; }

 private:
  AttachSource(pid_t pid, MemoryMap map) : pid_(pid), map_(std::move(map)) {}

  pid_t pid_;
  MemoryMap map_;
  std::vector<vmstate::RamBlock> blocks_;
  std::vector<uint64_t> addresses_;
};

/// Copies pages of a segment through the mapped file, which allocates nothing.
Result<void> read_pages_of_file(int file, uint64_t file_offset, size_t count, size_t page_bytes,
                                std::byte *to, size_t stride, const std::string &block);

}  // namespace qvmstate::qemu
