// Whether an image's metadata is whole: every reference of its tables is counted and compared with
// its refcounts, as `qemu-img check` does, and further what would keep QEMU from loading its
// snapshots.
//
// Nothing is changed. L2 tables are read once each, in the order of the file, however many
// snapshots share them. Memory: 8 bytes a cluster of the file, of which only what is used is
// touched (128 MiB a TiB at 64 KiB clusters), up to checked_clusters_max of them.
// Format: QEMU docs/interop/qcow2.txt.
#pragma once

#include <cstdint>

#include "qcow2/findings.h"
#include "qcow2/image.h"
#include "qcow2/io/result.h"

namespace qvmstate::qcow2 {

struct ImageCheck {
  uint64_t allocated_clusters = 0;   ///< of the active disk
  uint64_t compressed_clusters = 0;  ///< among them
  uint64_t total_clusters = 0;       ///< of the active disk
  uint64_t end_offset = 0;           ///< behind the last cluster in use
};

/// What is wrong goes to `findings`; an error means that the check could not be done.
Result<ImageCheck> check_image(const Image &image, Findings &findings);

}  // namespace qvmstate::qcow2
