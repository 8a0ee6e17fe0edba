// Where a page gets its place: the mapped-ram layout, written in parallel.
//
// As the legacy stream, but the RAM section's block list holds the RAM itself: after each block's
// name and length a header, a bitmap of the pages that are there, and at the next multiple of 1 MiB
// the pages, each at its fixed offset. So they can be written in any order, by several channels,
// straight from guest memory where this process can address it, and again in a later round.
// Everything else is written at the end, the bitmaps from what the channels did. QEMU 9.0 loads it
// from a file, 10.2 as a snapshot.
//
// Threads: one at a time; write_pages() starts one for each channel but the first.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "qcow2/io/buffer_pool.h"
#include "qcow2/io/file.h"
#include "qcow2/io/placement.h"
#include "qcow2/io/result.h"
#include "vmstate/device_sections.h"
#include "vmstate/dirty_pages.h"
#include "vmstate/ram_source.h"
#include "vmstate/stream_parts.h"

namespace qvmstate::vmstate {

/// What one thread works with; none of it is shared with another channel. The file's asynchronous
/// side and the pool belong to the channel while write_pages() runs. The pool is needed for blocks
/// that the source cannot view(), and its buffers hold chunk_bytes() each.
struct RamChannel {
  io::File *file;
  RamSource *source;
  io::BufferPool *pool;
};

struct MappedWriteOptions {
  /// Of the stream in its file: offsets in it count from the start of the file.
  uint64_t start_bytes = 0;
  /// The bitmap says that every page is there. For placements where what is not written reads as
  /// zeros: QEMU 10.2 and 11.1 leave stale pages where a bit is clear, when a VM that is already
  /// paused loads a snapshot.
  bool all_pages_present = false;
  /// Hashes what is written, for StreamStats::checksum. For streams at the start of their file, and
  /// placements where what is not written reads as zeros, of RAM that does not change meanwhile. A
  /// later round makes it unknown.
  bool checksum = false;
  /// Transfers in flight in each channel.
  unsigned depth = 8;
  /// The VM runs while write_pages() does. Then zero pages between others are never written with
  /// them: they may not be zero any more by the time they are.
  bool ram_changes = false;
  /// Called by any channel, several at a time, when a part of a block is dealt with and its pages
  /// are in the file: their memory is not read again in this round.
  std::function<void(size_t block, uint64_t offset, uint64_t bytes)> on_landed = {};
};

/// Called by one channel at a time with the RAM bytes dealt with and the bytes given to the file so
/// far; an error (cancelled) stops all channels. May sleep to keep to a rate.
using ChannelHook = std::function<Result<void>(uint64_t ram_bytes_done, uint64_t bytes_queued)>;

class MappedRamWriter {
 public:
  /// Lays the stream out and takes these devices' bytes.
  static Result<MappedRamWriter> plan(const StreamConfiguration &configuration,
                                      std::span<const RamBlock> blocks,
                                      std::span<const DeviceSection> before_ram,
                                      const MappedWriteOptions &options);

  /// RAM is dealt with in chunks of this size: a multiple of what the placement likes.
  static uint64_t chunk_bytes(const io::FixedPlacement &placement);
  /// Where RAM ends in the file; only devices come after it.
  uint64_t pages_end_bytes() const { return tail_offset_; }

  /// Writes all pages that are not zero; or, in a later round, the pages of `dirty`, which
  /// supersede what was written of them. All sources have the blocks of plan(). When it returns,
  /// with an error too, nothing is in flight.
  Result<void> write_pages(std::span<const RamChannel> channels, io::FixedPlacement &placement,
                           const ChannelHook &hook, const DirtyPages *dirty = nullptr);

  /// Writes all the rest: after the last round, through `file`.
  Result<StreamStats> finish(io::File &file, io::FixedPlacement &placement,
                             std::span<const DeviceSection> after_ram);

 private:
  struct Block {
    RamBlock ram;
    uint64_t header_offset = 0;  ///< of its name in the block list
    uint64_t bitmap_offset = 0;
    uint64_t pages_offset = 0;
    uint64_t first_chunk = 0;  ///< of all blocks' chunks
    std::vector<uint64_t> present;
    /// With a checksum: what comes after the last whole MiB of the pages. It shares a piece with
    /// what follows the block.
    std::vector<std::byte> rest;
  };
  class Round;
  class Channel;

  MappedRamWriter() = default;
  void add_block_head(StreamPart &part, const Block &block) const;
  std::vector<uint64_t> bitmap_words(const Block &block) const;
  void hash_between(uint64_t begin, uint64_t end, std::span<const std::byte> rest,
                    std::span<const std::byte> text);

  StreamConfiguration configuration_;
  MappedWriteOptions options_;
  std::vector<Block> blocks_;
  std::vector<DeviceSection> before_ram_;
  std::optional<PieceDigests> digests_;
  StreamPart head_;
  uint64_t tail_offset_ = 0;
  StreamStats stats_;
};

}  // namespace qvmstate::vmstate
