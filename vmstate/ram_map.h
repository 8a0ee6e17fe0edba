// Where guest-physical memory lies in the RAM blocks of a stream.
//
// A stream says which blocks there are, not where the board puts them: that follows from the
// machine type, or the user says it. Known are i440fx, q35, microvm and arm virt with one block of
// main memory. What the stream cannot tell: --machine max-ram-below-4g, and where DIMMs and the
// blocks of several NUMA nodes lie. Source of the facts: QEMU hw/i386/pc_piix.c, pc_q35.c, pc.c,
// microvm.c, hw/arm/virt.c.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "qcow2/io/result.h"
#include "vmstate/stream_reader.h"

namespace qvmstate::vmstate {

/// A part of a block and its guest-physical address.
struct RamPiece {
  size_t block = 0;
  uint64_t block_offset = 0;
  uint64_t bytes = 0;
  uint64_t address = 0;
};

/// What a user says of a block, by name.
struct RamPlace {
  std::string idstr;
  uint64_t address = 0;
  std::optional<uint64_t> bytes = {};  ///< default: to the end of the block
  uint64_t block_offset = 0;
};

/// Reads "BLOCK=ADDRESS[,BYTES[,OFFSET]]", numbers in decimal or with 0x.
Result<RamPlace> parse_ram_place(const std::string &text);

/// Whether the machine is the "virt" of arm; other targets have one too.
bool is_arm_virt(const StreamSummary &stream);

// Pieces come in ascending order of addresses, do not overlap, and begin and end at multiples of
// the stream's page size. Of the stream its machine type, blocks and page size are asked.

/// By the machine type; not_supported where that does not tell, with the remedy.
Result<std::vector<RamPiece>> ram_of_machine(const StreamSummary &stream);
/// By the user's word.
Result<std::vector<RamPiece>> ram_of_places(const StreamSummary &stream,
                                            std::span<const RamPlace> places);

}  // namespace qvmstate::vmstate
