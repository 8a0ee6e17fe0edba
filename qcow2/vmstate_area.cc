#include "qcow2/vmstate_area.h"

#include <algorithm>
#include <cassert>

#include "qcow2/limits.h"

namespace qvmstate::qcow2 {

uint64_t VmstateArea::bytes_max(const Header &header) {
  const Geometry &geometry = header.geometry;
  const uint64_t entries = l1_bytes_max / 8;
  const uint64_t first = geometry.vmstate_l1_index(header.disk_bytes);
  return first >= entries ? 0 : (entries - first) * geometry.span_bytes();
}

Result<void> VmstateArea::place(StreamOffset from, uint64_t bytes, std::vector<io::HostRun> &runs) {
  assert(from.value == placed_bytes_);
  const Geometry &geometry = image_.geometry();
  if (bytes > bytes_max(image_.header()) - std::min(placed_bytes_, bytes_max(image_.header()))) {
    return fail(ErrorCode::no_space, image_.name() + ": the vmstate does not fit: with " +
                                         std::to_string(geometry.cluster_bytes()) +
                                         "-byte clusters and this disk size an L1 table can map " +
                                         std::to_string(bytes_max(image_.header())) +
                                         " bytes of it; use an image with larger clusters");
  }
  const uint64_t wanted_clusters = geometry.clusters_for(placed_bytes_ + bytes);
  while (clusters_ < wanted_clusters) {
    QV_ASSIGN(const ClusterRun run, allocator_.take_for_stream(wanted_clusters - clusters_));
    clusters_ += run.count;
    if (!runs_.empty() && runs_.back().end() == run.first) {
      runs_.back().count += run.count;
    } else {
      runs_.push_back(run);
    }
  }

  // The new bytes are the last ones of the runs: walk back to where they begin.
  uint64_t run_index = runs_.size();
  uint64_t run_stream_start = clusters_ * geometry.cluster_bytes();
  while (run_stream_start > placed_bytes_) {
    --run_index;
    run_stream_start -= runs_[run_index].count * geometry.cluster_bytes();
  }
  uint64_t left = bytes;
  uint64_t within = placed_bytes_ - run_stream_start;
  while (left > 0) {
    const ClusterRun &run = runs_[run_index];
    const uint64_t run_bytes = run.count * geometry.cluster_bytes();
    if (within < run_bytes) {
      const uint64_t part = std::min(left, run_bytes - within);
      runs.push_back({geometry.host_offset(run.first) + within, part});
      left -= part;
      within += part;
    }
    within -= run_bytes;
    ++run_index;
  }
  placed_bytes_ += bytes;
  return {};
}

}  // namespace qvmstate::qcow2
