// The vmstate area of a new snapshot: where in the image each part of the stream goes.
//
// Clusters are taken as the stream comes, in host runs as long as there are; the L2 tables that map
// them are written at the end, from the list of runs (image_edit.cc).
#pragma once

#include <cstdint>
#include <vector>

#include "qcow2/allocator.h"
#include "qcow2/image.h"
#include "qcow2/io/stream_buffer.h"

namespace qvmstate::qcow2 {

class VmstateArea : public io::Placement {
 public:
  VmstateArea(const Image &image, Allocator &allocator) : image_(image), allocator_(allocator) {}

  Result<void> place(StreamOffset from, uint64_t bytes, std::vector<io::HostRun> &runs) override;
  uint64_t unit_bytes() const override { return 4096; }

  /// Host runs in stream order; together they hold clusters() clusters.
  const std::vector<ClusterRun> &runs() const { return runs_; }
  uint64_t clusters() const { return clusters_; }
  /// What an L1 table of the largest size could map past the disk.
  static uint64_t bytes_max(const Header &header);

 private:
  const Image &image_;
  Allocator &allocator_;
  std::vector<ClusterRun> runs_;
  uint64_t clusters_ = 0;
  uint64_t placed_bytes_ = 0;
};

}  // namespace qvmstate::qcow2
