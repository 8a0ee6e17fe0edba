#include "vmstate/aligned_group.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "qcow2/io/endian.h"
#include "vmstate/section_scan.h"
#include "vmstate/stream_format.h"

namespace qvmstate::vmstate {
namespace {

// u64 page | flags, u8 encoding, u16 bytes of the difference.
constexpr uint64_t xbzrle_header_bytes = 8 + 1 + 2;
constexpr uint8_t xbzrle_encoding = 1;
// The difference: no byte unchanged (00), then so many given, a number in two bytes of seven bits
// each, the low ones first and marked by bit 7; a number below 128 would take one byte.
constexpr uint64_t run_header_bytes = 1 + 2;
constexpr uint64_t run_bytes_min = 128;
constexpr uint64_t difference_bytes_min = xbzrle_header_bytes + run_header_bytes + run_bytes_min;
constexpr uint64_t difference_bytes_max = xbzrle_header_bytes + aligned_page_bytes;

constexpr uint64_t named_zero_bytes(uint64_t name_bytes) {
  return 8 + 1 + name_bytes + 1;
}

std::byte *put_difference(std::byte *to, uint64_t bytes, uint64_t offset) {
  const uint64_t run = bytes - xbzrle_header_bytes - run_header_bytes;
  store_be<uint64_t>(to, offset | ram_xbzrle | ram_continue);
  to[8] = std::byte{xbzrle_encoding};
  store_be(to + 9, static_cast<uint16_t>(run_header_bytes + run));
  to[11] = std::byte{0};
  to[12] = static_cast<std::byte>((run & 0x7f) | 0x80);
  to[13] = static_cast<std::byte>(run >> 7);
  std::memset(to + 14, 0, run);
  return to + bytes;
}

}  // namespace

uint64_t pages_per_group(uint64_t group_bytes) {
  const uint64_t others = named_zero_bytes(section_idstr_bytes_max) + difference_bytes_min;
  return (group_bytes - others) / group_page_stride;
}

uint64_t groups_in(const RamBlock &block, uint64_t group_bytes) {
  return divide_up(block.used_bytes / aligned_page_bytes, pages_per_group(group_bytes));
}

KnownGroups nothing_known(std::span<const RamBlock> blocks, uint64_t group_bytes) {
  KnownGroups groups;
  groups.reserve(blocks.size());
  for (const RamBlock &block : blocks) {
    groups.emplace_back(groups_in(block, group_bytes));
  }
  return groups;
}

uint64_t filling_bytes_min(const RamBlock &block) {
  return named_zero_bytes(block.idstr.size()) + difference_bytes_min;
}

void put_filling(std::span<std::byte> to, const RamBlock &block, uint64_t page) {
  assert(to.size() >= filling_bytes_min(block));
  const uint64_t offset = page * aligned_page_bytes;
  std::byte *at = to.data();
  store_be<uint64_t>(at, offset | ram_zero);
  at[8] = static_cast<std::byte>(block.idstr.size());
  std::memcpy(at + 9, block.idstr.data(), block.idstr.size());
  at += named_zero_bytes(block.idstr.size());
  at[-1] = std::byte{0};
  for (uint64_t left = to.size() - (at - to.data()); left > 0;) {
    // The last one has to be a difference as well.
    const uint64_t bytes = left <= difference_bytes_max
                               ? left
                               : std::min(difference_bytes_max, left - difference_bytes_min);
    at = put_difference(at, bytes, offset);
    left -= bytes;
  }
}

std::byte *begin_group(std::span<std::byte> group, const GroupPlace &place) {
  const uint64_t page_bytes = place.pages * group_page_stride;
  const std::span<std::byte> filling = group.first(group.size() - page_bytes);
  put_filling(filling, *place.block, place.first_page);
  std::byte *const first = filling.data() + filling.size();
  for (uint64_t i = 0; i < place.pages; ++i) {
    store_be<uint64_t>(first + i * group_page_stride,
                       (place.first_page + i) * aligned_page_bytes | ram_page | ram_continue);
  }
  return first + 8;
}

}  // namespace qvmstate::vmstate
