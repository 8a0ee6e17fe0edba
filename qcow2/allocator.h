// Free host clusters of an image, for one edit: those whose refcount is 0, and all past the last
// one in use.
//
// One pass over the refcount blocks finds them. What is taken is only remembered here; the counts
// change in the new refcount blocks of the edit (refcount_editor.h), so until the commit the image
// on disk still calls these clusters free. A cluster that the edit frees is never handed out in the
// same edit: the old image still needs it.
//
// Threads: one at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "qcow2/image.h"
#include "qcow2/io/result.h"

namespace qvmstate::qcow2 {

struct ClusterRun {
  uint64_t first = 0;
  uint64_t count = 0;
  uint64_t end() const { return first + count; }
};

/// How the file is made longer for the stream.
enum class Growth {
  ahead,   ///< reserved, as far as the stream is expected to go
  sparse,  ///< holes: what is never written takes no space
};

class Allocator {
 public:
  static Result<Allocator> scan(const Image &image);
  /// Bytes of free clusters in an image on a block device, which cannot become longer, up to the
  /// device's end. Also of one that QEMU is using: then about so many.
  static Result<uint64_t> room_on_device(const Image &image);

  /// Contiguous clusters, for tables.
  Result<ClusterRun> take(uint64_t count);
  /// 1 to `count` clusters, for the stream: from free runs of at least stream_run_bytes_min, then
  /// past the end, and only on a device that is full from smaller ones. Starts and ends at
  /// multiples of `alignment_bytes`, so that O_DIRECT never shares a page with metadata.
  Result<ClusterRun> take_for_stream(uint64_t count, Growth growth = Growth::ahead,
                                     uint64_t alignment_bytes = 4096);
  /// Makes taken clusters read as zeros: punches, or where that cannot be done writes them. Those
  /// past the file's former end are holes already.
  Result<void> make_zero(const ClusterRun &run);
  /// Taken for the stream and not used after all.
  void give_back(const ClusterRun &run);
  /// How much the stream will take at most: how far ahead the file is extended.
  void expect_stream_bytes(uint64_t bytes) { expected_bytes_ = bytes; }

  /// End of the clusters in use, the taken ones included.
  uint64_t used_end() const { return tail_; }
  uint64_t free_bytes_inside() const;
  /// Cuts the file to what is used (never below the size it had).
  Result<void> trim_file();
  /// Gives everything taken back: cuts the file to the size it had, punches the rest.
  Result<void> undo();

 private:
  explicit Allocator(const Image &image) : image_(&image) {}
  Result<void> scan_blocks();
  /// Refuses a refcount table that names a block twice: a table of a MiB could have us read 256
  /// GiB.
  Result<void> check_blocks_differ() const;
  /// Refuses an image whose refcounts call its own tables free: they would be overwritten. (QEMU
  /// looks for such overlaps before each write.)
  Result<void> check_own_tables() const;
  Result<void> check_in_use(const char *what, uint64_t offset, uint64_t bytes) const;
  void note_free(uint64_t first, uint64_t count);
  Result<ClusterRun> take_tail(uint64_t count, Growth growth);
  Result<void> grow_file(uint64_t end_cluster, Growth growth);

  const Image *image_;
  std::vector<ClusterRun> free_;  // sorted by position; bounded by free_runs_max
  size_t free_cursor_ = 0;        // runs before it are empty
  size_t stream_cursor_ = 0;      // runs before it are too small for the stream
  std::vector<ClusterRun> taken_;
  uint64_t tail_ = 0;            // first cluster past all in use
  uint64_t original_bytes_ = 0;  // of the file
  uint64_t grown_bytes_ = 0;     // the file reaches this far now
  uint64_t expected_bytes_ = 0;
  bool device_ = false;
};

}  // namespace qvmstate::qcow2
