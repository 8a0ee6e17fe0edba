// Copies a stream into compressed clusters, which several threads compress.
#pragma once

#include <cstdint>

#include "qcow2/compressed_area.h"
#include "qcow2/image.h"
#include "qcow2/io/result.h"
#include "vmstate/state_checksum.h"
#include "vmstate/state_transfer.h"
#include "vmstate/stream_source.h"

namespace qvmstate::vmstate {

constexpr unsigned compress_threads_max = 64;

struct CompressedCopy {
  StateChecksum checksum;
  uint64_t stored_bytes = 0;
};

/// The first `bytes` of the source, compressed as the image's header says. Memory: 1 MiB a thread
/// or, where clusters are larger than 64 KiB, 12 clusters a thread.
Result<CompressedCopy> copy_compressed(StreamSource &source, uint64_t bytes,
                                       const qcow2::Header &header, qcow2::CompressedArea &area,
                                       unsigned threads, const TransferHook &hook);

}  // namespace qvmstate::vmstate
