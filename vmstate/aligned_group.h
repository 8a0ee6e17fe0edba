// A group of the layout stream-aligned: a fixed run of pages of one RAM block as records of a
// legacy stream, in exactly as many bytes as a cluster has, or 64 KiB if that is more.
//
//   ZERO    the group's first page, with the block's name
//   XBZRLE  the same page, as long as what is left over; several where one is too short
//   PAGE    each page of the group, with CONTINUE
//
// Nothing in it hangs on where in the stream it lies, or on what comes before it: so a later state
// whose pages are the same has the same bytes, and can share the clusters. What fills it up is
// overwritten by the PAGE record of its page, and loads in every QEMU, whatever its capabilities
// (tried: 7.2, 10.0, 11.1). The ZERO record gives the differences a page to be applied to, for
// readers that refuse them otherwise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "qcow2/io/offsets.h"
#include "vmstate/ram_source.h"
#include "vmstate/state_checksum.h"

namespace qvmstate::vmstate {

constexpr uint64_t aligned_page_bytes = 4096;  ///< the one size of pages that is written so
constexpr uint64_t group_bytes_min = 64 * kib;

/// Pages of a group, but of the last one of a block: 15 in 64 KiB.
uint64_t pages_per_group(uint64_t group_bytes);
/// How many a block has.
uint64_t groups_in(const RamBlock &block, uint64_t group_bytes);

/// What the pages of a group are.
struct Group {
  enum class Kind : uint8_t { untouched, zero, data };
  Kind kind = Kind::untouched;
  Digest digest = {};  ///< of data: of the group's bytes
};

/// What is known of the groups of some blocks: of each block its groups; nullopt: nothing.
using KnownGroups = std::vector<std::vector<std::optional<Group>>>;
KnownGroups nothing_known(std::span<const RamBlock> blocks, uint64_t group_bytes);

struct GroupPlace {
  const RamBlock *block = nullptr;
  uint64_t first_page = 0;
  uint64_t pages = 0;
};

/// How far apart the pages of a group lie in it.
constexpr uint64_t group_page_stride = 8 + aligned_page_bytes;

/// Puts all of a group but the bytes of its pages. Returns where those of the first one go.
std::byte *begin_group(std::span<std::byte> group, const GroupPlace &place);

/// The least that put_filling() can fill for a block.
uint64_t filling_bytes_min(const RamBlock &block);
/// Fills `to` with records, which make zeros of a page that has a record again later.
void put_filling(std::span<std::byte> to, const RamBlock &block, uint64_t page);

}  // namespace qvmstate::vmstate
