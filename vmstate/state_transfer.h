// Writes a stored VM state anew: in the layout that is wanted, or its bytes as they are.
#pragma once

#include <cstdint>
#include <functional>

#include "qcow2/io/file.h"
#include "qcow2/io/placement.h"
#include "qcow2/io/result.h"
#include "vmstate/stored_state.h"
#include "vmstate/stream_parts.h"

namespace qvmstate::vmstate {

struct TransferTarget {
  io::File *file = nullptr;
  io::Placement *sequential = nullptr;  ///< for a legacy stream
  io::FixedPlacement *fixed = nullptr;  ///< for a mapped-ram stream
  uint64_t start_bytes = 0;             ///< of the stream in a plain file
  bool all_pages_present = false;       ///< see MappedWriteOptions
  bool checksum = false;                ///< of the stream, for StreamStats::checksum
};

/// Called now and then; an error (cancelled) stops it.
using TransferHook = std::function<Result<void>()>;

/// Everything is written when it returns, nothing is in flight after an error.
Result<StreamStats> write_state_anew(const StoredState &state, Layout layout,
                                     const TransferTarget &target, const TransferHook &hook);

/// Whether a copy of the stream is as good as writing it anew in this layout.
bool can_be_copied(const StreamSummary &stream, Layout layout);

/// The `bytes` from `start` on, for targets of a sequential stream.
Result<StreamStats> copy_stream(StreamSource &source, StreamOffset start, uint64_t bytes,
                                const TransferTarget &target, const TransferHook &hook);

}  // namespace qvmstate::vmstate
