// The vmstate area of a snapshot in compressed clusters: where each goes, byte after byte.
//
// Clusters come in the order of the stream. Compressed ones are packed one behind the other, also
// over the border of two host clusters, as far as refcounts allow: each use of a host cluster by a
// compressed one counts, and loading the snapshot counts all of them again twice for a moment. What
// is zeros takes nothing; what does not shrink gets a cluster of its own. Full buffers are written
// while the next one is filled.
//
// Threads: one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "qcow2/allocator.h"
#include "qcow2/image.h"
#include "qcow2/io/buffer_pool.h"
#include "qcow2/io/result.h"

namespace qvmstate::qcow2 {

class CompressedArea {
 public:
  CompressedArea(const Image &image, Allocator &allocator);
  ~CompressedArea();
  CompressedArea(const CompressedArea &) = delete;
  CompressedArea &operator=(const CompressedArea &) = delete;

  Result<void> add_zeros();
  /// `stored` is shorter than a cluster.
  Result<void> add_compressed(std::span<const std::byte> stored);
  Result<void> add_plain(std::span<const std::byte> cluster);
  /// Writes the rest, waits for all of it, and gives back what was not used.
  Result<void> finish();

  /// How the entries of the L2 tables say it, without the words of extended ones.
  const std::vector<uint64_t> &entries() const { return entries_; }
  struct Use {
    uint64_t cluster;
    uint64_t references;
  };
  /// Ascending in each run of clusters; none twice.
  const std::vector<Use> &uses() const { return uses_; }
  uint64_t stored_bytes() const { return stored_bytes_; }

 private:
  Result<void> make_room(uint64_t bytes);
  Result<void> put(std::span<const std::byte> stored);
  Result<void> fill_up_to(uint64_t offset, const std::byte *from);
  Result<void> take_buffer();
  Result<void> flush();
  Result<void> end_run();
  void use(uint64_t first_byte, uint64_t bytes);

  const Image &image_;
  Allocator &allocator_;
  const uint64_t cluster_bytes_;
  const uint64_t references_max_;
  std::vector<uint64_t> entries_;
  std::vector<Use> uses_;
  ClusterRun run_;                      // taken, and being filled
  uint64_t position_ = 0;               // in the file; run_ is used up to here
  std::optional<io::BufferPool> pool_;  // once something is put
  io::Buffer *buffer_ = nullptr;        // being filled
  uint64_t filled_ = 0;                 // in the file: up to here, buffers are full or on their way
  uint64_t stored_bytes_ = 0;
};

}  // namespace qvmstate::qcow2
