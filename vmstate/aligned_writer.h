// The layout stream-aligned: a legacy stream, loaded by every QEMU, of which a later one can share
// what has not changed.
//
// File header; configuration section; device sections that are loaded before RAM; "ram" START
// (block list); "ram" PART: records that fill up to a multiple of the group's size, the groups that
// are written, those that are shared with the base, a ZERO record for each page of the groups that
// are zeros (which are not written as groups); "ram" END; the other device sections; EOF;
// vmdescription. Behind the stream, from a multiple of 4096 bytes on, the digests of its pieces
// (state_checksum.h); a group is a piece. Pages of a block make a group by their number alone.
//
// Threads: one calls; those that it starts have ended when it returns.
#pragma once

#include <cstdint>
#include <vector>

#include "qcow2/io/result.h"
#include "qcow2/io/stream_buffer.h"
#include "vmstate/aligned_group.h"
#include "vmstate/base_state.h"
#include "vmstate/ram_source.h"
#include "vmstate/stream_parts.h"

namespace qvmstate::vmstate {

struct AlignedOptions {
  uint64_t group_bytes = 0;   ///< aligned_group.h
  BaseState *base = nullptr;  ///< what can be shared, if anything
  /// Of all blocks. What is known before is believed, and read only where it has to be written; in
  /// the end all is known.
  KnownGroups *groups = nullptr;
  /// The same RAM once more for each further thread that looks for what is other than in the base.
  std::vector<RamSource *> ram_again = {};
};

/// All of it, with the pages of stopped RAM. Finishes the stream's buffer, which is at its begin,
/// and of whose bytes the checksum of the result is.
Result<StreamStats> write_aligned_stream(io::StreamBuffer &out,
                                         const StreamConfiguration &configuration, RamSource &ram,
                                         const LoadOrder &devices, const AlignedOptions &options,
                                         const RamHook &hook);

}  // namespace qvmstate::vmstate
