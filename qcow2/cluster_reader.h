// Reads guest data through an L1 table: the vmstate or the disk of any snapshot, or the active
// disk.
//
// Backing files are not followed: unallocated clusters are reported by the kind, and read as zeros.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "qcow2/entries.h"
#include "qcow2/image.h"
#include "qcow2/io/offsets.h"
#include "qcow2/io/result.h"

namespace qvmstate::qcow2 {

class ClusterReader {
 public:
  /// The table may have any size limits.h allows; it is read entry by entry.
  ClusterReader(const Image &image, HostOffset l1_offset, uint32_t l1_entries);

  /// Reads guest bytes. Zero and unallocated clusters read as zeros, compressed ones
  /// are inflated; past the table's end is an error, and so are encrypted images and those with an
  /// external data file.
  Result<void> read(GuestOffset offset, std::span<std::byte> to);
  /// The kind of the cluster (with extended L2 entries: subcluster) that holds `offset`, and how
  /// many bytes from there on have that kind (bounded by one L2 table).
  struct Extent {
    ClusterKind kind;
    uint64_t bytes;
  };
  Result<Extent> extent_at(GuestOffset offset);
  /// Guest bytes of one kind and, for data, where in the file they lie in one piece (perhaps past
  /// its end, where zeros are to be read); of compressed ones, at most a cluster.
  struct Run {
    ClusterKind kind;
    uint64_t bytes;
    HostOffset host;
    uint64_t entry;  ///< of the cluster that the run starts in
  };
  /// From `offset` on, at most `bytes_max` (> 0). Refuses what read() refuses.
  Result<Run> run_at(GuestOffset offset, uint64_t bytes_max);

 private:
  Result<void> check_readable() const;
  /// Refuse tables that name more clusters than the file has (limits.h).
  Result<void> check_l1() const;
  Result<void> check_l2() const;
  Result<void> check_named(const char *table, uint64_t clusters, uint64_t expanded_bytes) const;
  Result<void> load_l2(GuestOffset offset);
  Result<Run> unit_at(GuestOffset offset) const;
  Result<Run> merged_run_at(GuestOffset offset, uint64_t bytes_max, bool in_one_piece);
  Result<void> inflate_cluster(uint64_t entry);

  const Image *image_;
  HostOffset l1_offset_;
  uint32_t l1_entries_;
  bool l1_checked_ = false;
  int64_t cached_l1_index_ = -1;
  bool cached_present_ = false;
  std::vector<std::byte> cached_l2_;
  uint64_t inflated_entry_ = 0;  ///< the compressed cluster that inflated_ holds; 0: none
  std::vector<std::byte> inflated_;
};

/// Reads the vmstate of a snapshot by stream offset (its area starts past the snapshot's own disk
/// size).
class VmstateReader {
 public:
  VmstateReader(const Image &image, const Snapshot &snapshot);
  /// The stream's possible end: what the snapshot's L1 can map. vmstate_bytes is not trusted as a
  /// limit, because QEMU does not take it as one.
  uint64_t mapped_bytes() const;
  Result<void> read(StreamOffset offset, std::span<std::byte> to);
  Result<ClusterReader::Extent> extent_at(StreamOffset offset);
  /// As ClusterReader::run_at(); the range must be mapped.
  Result<ClusterReader::Run> run_at(StreamOffset offset, uint64_t bytes_max);

 private:
  /// The guest offset of a range that the snapshot maps, or bad_stream.
  Result<GuestOffset> locate(StreamOffset offset, uint64_t bytes) const;

  ClusterReader reader_;
  std::string image_name_;
  std::string snapshot_name_;
  uint64_t base_;
  uint64_t mapped_bytes_;
};

}  // namespace qvmstate::qcow2
