// L1 and L2 entries: what a 64-bit (or, extended, 128-bit) entry says.
//
// Format: QEMU docs/interop/qcow2.txt, "Cluster mapping", "Extended L2 Entries".
#pragma once

#include <cstdint>

#include "qcow2/geometry.h"
#include "qcow2/io/offsets.h"
#include "qcow2/limits.h"

namespace qvmstate::qcow2 {

constexpr uint64_t entry_copied = uint64_t{1} << 63;      // refcount is exactly one (active tables)
constexpr uint64_t entry_compressed = uint64_t{1} << 62;  // L2 only
constexpr uint64_t entry_zero = 1;                        // L2 only, v3, not with extended L2
constexpr uint64_t l1_reserved_mask = 0x7f000000000001ff;
constexpr uint64_t l2_reserved_mask = 0x3f000000000001fe;

enum class ClusterKind {
  unallocated,     ///< reads from the backing file, or zeros
  zero,            ///< reads as zeros, no host cluster
  zero_allocated,  ///< reads as zeros, holds a host cluster
  data,            ///< host cluster
  compressed,      ///< bytes somewhere in one or more host clusters
};

constexpr ClusterKind cluster_kind(uint64_t entry, const Geometry &geometry) {
  if (entry & entry_compressed) {
    return ClusterKind::compressed;
  }
  const bool allocated = (entry & host_offset_mask) != 0;
  if (!geometry.extended_l2 && (entry & entry_zero)) {
    return allocated ? ClusterKind::zero_allocated : ClusterKind::zero;
  }
  return allocated ? ClusterKind::data : ClusterKind::unallocated;
}

/// The bytes of a compressed cluster: [offset, offset + bytes) of the file; the last sector may be
/// shared with the next one.
struct CompressedRange {
  HostOffset offset;
  uint64_t bytes = 0;
};
constexpr CompressedRange compressed_range(uint64_t entry, const Geometry &geometry) {
  const uint32_t offset_bits = 70 - geometry.cluster_bits;
  const uint64_t offset = entry & ((uint64_t{1} << offset_bits) - 1);
  const uint64_t sectors =
      (entry & (entry_compressed - 1)) >> offset_bits;  // additional 512-byte sectors
  return {HostOffset(offset), (sectors + 1) * 512 - (offset & 511)};
}

}  // namespace qvmstate::qcow2
