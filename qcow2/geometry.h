// The sizes that follow from a qcow2 header: clusters, tables, spans, limits.
//
// Format facts: QEMU docs/interop/qcow2.txt ("Header", "Host cluster management", "Cluster
// mapping").
#pragma once

#include <cstdint>

#include "qcow2/io/offsets.h"

namespace qvmstate::qcow2 {

struct Geometry {
  uint32_t cluster_bits = 16;   ///< 9 to 21
  uint32_t refcount_order = 4;  ///< refcounts are 2^order bits wide, 0 to 6
  bool extended_l2 = false;

  constexpr uint64_t cluster_bytes() const { return uint64_t{1} << cluster_bits; }
  constexpr uint64_t l2_entry_bytes() const { return extended_l2 ? 16 : 8; }
  constexpr uint64_t l2_entries() const { return cluster_bytes() / l2_entry_bytes(); }
  /// Guest bytes that one L1 entry (one L2 table) maps.
  constexpr uint64_t span_bytes() const { return l2_entries() * cluster_bytes(); }

  constexpr uint32_t refcount_bits() const { return 1U << refcount_order; }
  /// Clusters that one refcount block counts.
  constexpr uint64_t refcount_block_entries() const {
    return cluster_bytes() * 8 / refcount_bits();
  }
  /// The largest count an entry can hold.
  constexpr uint64_t refcount_max() const {
    return refcount_bits() == 64 ? UINT64_MAX : (uint64_t{1} << refcount_bits()) - 1;
  }

  constexpr uint64_t clusters_for(uint64_t bytes) const {
    return divide_up(bytes, cluster_bytes());
  }
  constexpr uint64_t cluster_of(HostOffset offset) const { return offset.value >> cluster_bits; }
  constexpr HostOffset host_offset(uint64_t cluster) const {
    return HostOffset(cluster << cluster_bits);
  }
  constexpr bool aligned(uint64_t offset) const { return (offset & (cluster_bytes() - 1)) == 0; }
  /// Host clusters that a table of `entries` 8-byte entries takes.
  constexpr uint64_t l1_clusters(uint64_t entries) const { return clusters_for(entries * 8); }

  /// The first L1 index past the virtual disk: vmstate byte 0 lies at vmstate_l1_index * span.
  constexpr uint64_t vmstate_l1_index(uint64_t disk_bytes) const {
    return divide_up(disk_bytes, span_bytes());
  }
};

}  // namespace qvmstate::qcow2
