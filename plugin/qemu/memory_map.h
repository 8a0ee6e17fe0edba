// What kind of memory a RAM block is made of, and which of its pages were never touched.
//
// The rule depends on the mapping, because asking wrongly loses data or makes memory grow:
// - private anonymous: the pagemap of the process says present or swapped; neither: never touched.
// - shared (memfd, file, /dev/zero): the pagemap lies, as another process may have written and
//   page-out leaves no trace there; SEEK_DATA and SEEK_HOLE of the file say it. A hole must not be
//   read through the mapping, which would allocate it.
// - private mapping of a file: always read.
// - huge pages, private: the pagemap (they are never swapped). Shared: no rule works, so always
//   read, and through the file, which does not allocate.
//
// Threads: one at a time.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "plugin/qemu/descriptor.h"
#include "plugin/qemu/ram_blocks.h"
#include "qcow2/io/result.h"
#include "vmstate/ram_source.h"

namespace qvmstate::qemu {

/// One line of /proc/PID/maps.
struct Mapping {
  uint64_t start = 0;
  uint64_t end = 0;
  bool shared = false;
  uint64_t file_offset = 0;
  uint64_t device_major = 0;
  uint64_t device_minor = 0;
  uint64_t inode = 0;  ///< 0: anonymous
  std::string path;
};
std::optional<Mapping> parse_maps_line(std::string_view line);

enum class MemoryKind { private_anonymous, private_file, private_huge, shared, shared_huge };

/// A part of a block within one mapping.
struct Segment {
  uint64_t start = 0;  ///< byte in the block
  uint64_t end = 0;
  MemoryKind kind = MemoryKind::private_anonymous;
  uint64_t address = 0;      ///< of `start`
  uint64_t file_offset = 0;  ///< of `start`, for the shared kinds
  int file = -1;             ///< index into the map's files; -1: none could be opened
};

class MemoryMap {
 public:
  /// Reads the mappings under the blocks. All blocks have addresses.
  static Result<MemoryMap> read(pid_t pid, const std::vector<HostRamBlock> &blocks);
  /// Lines for the user; empty as a rule.
  const std::vector<std::string> &warnings() const { return warnings_; }

  Result<vmstate::RamSource::Presence> presence(size_t block, uint64_t offset);
  const Segment &segment_at(size_t block, uint64_t offset) const;
  int descriptor(const Segment &segment) const { return files_[segment.file].get(); }
  bool has_shared_huge_pages(size_t block) const;
  /// Bytes of all blocks that may hold data, for estimates.
  Result<uint64_t> touched_bytes();

 private:
  MemoryMap() = default;
  Result<vmstate::RamSource::Presence> pagemap_presence(const Segment &segment, uint64_t offset);
  Result<vmstate::RamSource::Presence> file_presence(const Segment &segment, uint64_t offset);

  Descriptor pagemap_;
  std::vector<Descriptor> files_;
  std::vector<uint64_t> block_bytes_;
  std::vector<std::vector<Segment>> segments_;
  std::vector<std::string> warnings_;
  std::vector<uint64_t> entries_;  // of the pagemap, from page entries_first_ on
  uint64_t entries_first_ = 0;
};

}  // namespace qvmstate::qemu
