// The vmstate area of a new snapshot: where in the image each part of the stream goes.
//
// A legacy stream is placed from its first byte to its last, in host runs as long as there are. A
// stream at fixed offsets (mapped-ram) is placed in any order, in units; a unit that is written
// whole gets clusters as they are; any other gets clusters that read as zeros, holes of the file
// where it can have them; and what is never placed becomes clusters flagged zero (version 2 has no
// such flag: clusters full of holes). No cluster stays unallocated, because a larger backing file
// would show through. The L2 tables that map all of it are written at the end (image_edit.cc).
//
// A stream that is written later, while QEMU uses the image, has its clusters reserved instead: in
// runs that begin and end on 64 KiB of the file, so that no page of the page cache is shared with
// what QEMU writes. ReservedArea then says where in them the stream goes.
//
// Threads: one at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "qcow2/allocator.h"
#include "qcow2/image.h"
#include "qcow2/io/placement.h"

namespace qvmstate::qcow2 {

/// Clusters of the stream that lie in one piece of the file.
struct AreaRun {
  uint64_t stream_first = 0;  ///< in clusters from the start of the stream
  uint64_t host_first = 0;
  uint64_t count = 0;
  bool shared = false;  ///< held already, and not written
  uint64_t stream_end() const { return stream_first + count; }
};

/// Adds to `runs` where a range of the stream lies in the file. `area` is ascending, without gaps,
/// and has all of the range.
void find_host_runs(std::span<const AreaRun> area, const Geometry &geometry,
                    const io::StreamRange &range, std::vector<io::HostRun> &runs);

class VmstateArea : public io::Placement, public io::FixedPlacement {
 public:
  VmstateArea(const Image &image, Allocator &allocator) : image_(image), allocator_(allocator) {}

  Result<void> place(StreamOffset from, uint64_t bytes, std::vector<io::HostRun> &runs) override;
  uint64_t unit_bytes() const override { return 4096; }

  Result<void> place_at(std::span<const io::StreamRange> ranges,
                        std::vector<io::HostRun> &runs) override;
  uint64_t place_unit_bytes() const override;
  /// The stream at fixed offsets is complete, and has this length.
  Result<void> finish_fixed(uint64_t stream_bytes);
  /// About how many bytes place_at() will be given.
  void expect_fixed_bytes(uint64_t bytes) { expected_bytes_ = bytes; }

  /// The clusters of another VM state from its first one on, 0 for those that cannot be shared.
  void set_base(std::vector<uint64_t> host_clusters) { base_ = std::move(host_clusters); }
  /// Whether all of a range of the base can be shared. It begins and ends at clusters.
  bool can_share(StreamOffset base_from, uint64_t bytes) const;
  /// It is the next part of this stream, of which all so far is placed and ends at a cluster's end.
  Result<void> share(StreamOffset base_from, uint64_t bytes);
  /// Clusters of the base that are not shared (yet), and 0 for all others.
  const std::vector<uint64_t> &unshared_base() const { return base_; }
  /// Takes clusters for a stream of up to `bytes`, and more to fill 64 KiB, as holes of the file.
  Result<void> reserve(uint64_t bytes);

  /// Ascending and disjoint; what lies between them up to clusters() is zeros.
  const std::vector<AreaRun> &runs() const { return runs_; }
  uint64_t clusters() const { return clusters_; }
  /// What an L1 table of the largest size could map past the disk.
  static uint64_t bytes_max(const Header &header);

 private:
  Result<void> check_fits(uint64_t stream_bytes) const;
  void note(const AreaRun &run);
  /// How much of a cluster will be written.
  enum class Fill : uint8_t { whole, part };
  Result<void> take_fixed(uint64_t first, uint64_t count, Fill fill);
  Result<void> take_missing(uint64_t first, uint64_t end, Fill fill);
  Result<ClusterRun> take_from_arena(uint64_t count, Fill fill);

  const Image &image_;
  Allocator &allocator_;
  std::vector<AreaRun> runs_;
  uint64_t clusters_ = 0;
  uint64_t placed_bytes_ = 0;    // by place()
  uint64_t expected_bytes_ = 0;  // of place_at()
  std::vector<uint64_t> base_;
  // Taken from the allocator ahead of need.
  ClusterRun whole_arena_;
  ClusterRun zeroed_arena_;
};

/// A stream that goes into reserved clusters.
class ReservedArea : public io::Placement {
 public:
  /// Asked before each write; an error keeps from it.
  using Guard = std::function<Result<void>()>;
  ReservedArea(std::vector<AreaRun> runs, const Geometry &geometry, std::string image_name,
               Guard guard = {})
      : runs_(std::move(runs)),
        geometry_(geometry),
        image_name_(std::move(image_name)),
        guard_(std::move(guard)) {}

  /// no_space past the reserved clusters.
  Result<void> place(StreamOffset from, uint64_t bytes, std::vector<io::HostRun> &runs) override;
  uint64_t unit_bytes() const override { return 4096; }

 private:
  std::vector<AreaRun> runs_;
  Geometry geometry_;
  std::string image_name_;
  Guard guard_;
};

}  // namespace qvmstate::qcow2
