// Reads the RAM of a mapped-ram stream in parallel, in chunks, at the speed of the disk.
//
// Each channel is a thread with a source of its own. Channels take portions of blocks in turn;
// within one, pages that are stored are read asynchronously, several chunks ahead, where the source
// knows their place in its file, and what is zero is told in long runs without reading it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "qcow2/io/buffer_pool.h"
#include "qcow2/io/offsets.h"
#include "qcow2/io/result.h"
#include "vmstate/stream_reader.h"
#include "vmstate/stream_source.h"

namespace qvmstate::vmstate {

constexpr unsigned mapped_channels_max = 64;  ///< more than disks or memory can use
/// The most that comes in one piece with data.
constexpr uint64_t mapped_chunk_bytes = io::buffer_bytes_default;
/// What a channel takes at a time, and the longest run of zeros that comes in one piece.
constexpr uint64_t mapped_portion_bytes = 32 * mib;

/// Opens a source for one channel. Called once for each, before any thread starts.
using SourceOpener = std::function<Result<std::unique_ptr<StreamSource>>()>;

/// Called concurrently, by at most one thread for each channel. Every byte of every chosen block
/// comes exactly once, in ascending order from each channel (over all blocks). `data` stands at an
/// address that is a multiple of the page size, or is empty for zeros; valid during the call.
/// Offsets and lengths are multiples of the page size. An error stops all channels.
using ChunkHook =
    std::function<Result<void>(size_t channel, size_t block, uint64_t offset,
                               std::span<const std::byte> data_or_empty, uint64_t bytes)>;

struct MappedReadOptions {
  unsigned channels = 1;                         ///< 1 to mapped_channels_max
  std::vector<size_t> blocks = {};               ///< these only, ascending; empty: all
  const std::atomic<bool> *cancelled = nullptr;  ///< set by anybody at any time
};

/// Returns once all channels have ended; the first error of any of them wins. Memory: at most
/// 128 MiB of buffers. Precondition: `summary` is what read_stream() said of these sources, in the
/// layout mapped_ram.
Result<void> read_mapped_ram(const StreamSummary &summary, const SourceOpener &open_source,
                             const ChunkHook &hook, const MappedReadOptions &options = {});

}  // namespace qvmstate::vmstate
