#include "plugin/qemu/protectable_ram.h"

#include <cerrno>
#include <fstream>
#include <optional>

namespace qvmstate::qemu {

Result<void> check_protectable(std::span<const HostRamBlock> blocks, const MemoryMap &map) {
  for (size_t i = 0; i < blocks.size(); ++i) {
    const vmstate::RamBlock &block = blocks[i].block;
    for (uint64_t at = 0; at < block.used_bytes;) {
      const Segment &segment = map.segment_at(i, at);
      if (segment.kind != MemoryKind::private_anonymous) {
        const bool shared =
            segment.kind == MemoryKind::shared || segment.kind == MemoryKind::shared_huge;
        return fail(ErrorCode::not_supported,
                    "RAM block '" + block.idstr + "' is " +
                        (shared ? "shared memory, which other processes (vhost-user) write past "
                                  "any protection"
                                : "memory of a file or of hugetlbfs") +
                        "; write protection takes private anonymous memory only (-m without a "
                        "memory backend, or memory-backend-ram)");
      }
      at = segment.end;
    }
  }
  return {};
}

Result<void> check_not_merged(std::span<const HostRamBlock> blocks, const std::string &ksm_run) {
  std::string state;
  std::ifstream(ksm_run) >> state;
  if (state != "1") {
    return {};
  }
  std::ifstream file("/proc/self/smaps");
  if (!file) {
    return fail_errno(errno, "opening '/proc/self/smaps', to see whether RAM is merged (KSM)");
  }
  std::optional<Mapping> mapping;
  for (std::string line; std::getline(file, line);) {
    if (auto next = parse_maps_line(line)) {
      mapping = std::move(next);
    }
    if (!mapping || !line.starts_with("VmFlags:") || (line + ' ').find(" mg ") == line.npos) {
      continue;
    }
    for (const HostRamBlock &block : blocks) {
      if (*block.address < mapping->end &&
          mapping->start < *block.address + block.block.used_bytes) {
        return fail(ErrorCode::not_supported,
                    "RAM block '" + block.block.idstr +
                        "': the kernel merges equal pages of it (KSM), which takes their write "
                        "protection off; start QEMU with -machine mem-merge=off, or end KSM (echo "
                        "0 > " +
                        ksm_run + ")");
      }
    }
  }
  return {};
}

}  // namespace qvmstate::qemu
