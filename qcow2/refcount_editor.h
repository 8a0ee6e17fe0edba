// The refcounts an image will have after the commit, kept in shadow copies of the blocks that
// change.
//
// A block that changes is copied once to a free cluster, and only the copy is edited, through a
// bounded cache; the image on disk keeps its own blocks and counts. finish() writes the rest of
// the copies and a new refcount table that points at them. The copies' own clusters, and the freed
// old blocks, are counted in them as well.
//
// Threads: one at a time.
#pragma once

#include <cstdint>
#include <list>
#include <unordered_map>
#include <utility>
#include <vector>

#include "qcow2/allocator.h"
#include "qcow2/image.h"
#include "qcow2/io/result.h"

namespace qvmstate::qcow2 {

class RefcountEditor {
 public:
  RefcountEditor(const Image &image, Allocator &allocator);

  Result<uint64_t> get(uint64_t cluster);
  /// One more reference to each cluster, all of which are in use already; afterwards each count
  /// must be at most `ceiling`.
  Result<void> reference(uint64_t first, uint64_t count, uint64_t ceiling);
  Result<void> dereference(uint64_t first, uint64_t count);
  /// Clusters from the allocator: 0 becomes `references`.
  Result<void> claim(ClusterRun run, uint64_t references);

  struct Table {
    HostOffset offset;
    uint32_t clusters = 0;
  };
  /// Writes everything; no change may follow.
  Result<Table> finish();

  /// Runs whose count became 0 (bounded; for giving their space back after the commit).
  const std::vector<ClusterRun> &freed() const { return freed_; }

 private:
  struct Page {
    uint64_t key = 0;
    bool dirty = false;
    std::vector<std::byte> data;
  };
  using PageList = std::list<Page>;
  struct Pending {
    uint64_t cluster;
    bool claim;
  };

  template <class Change>
  Result<void> change(uint64_t first, uint64_t count, Change change_one);
  Result<Page *> page(uint64_t key);
  Result<void> write_page(Page &page);
  Result<void> shadow(uint64_t block);
  Result<void> settle();
  Result<void> check_covered(uint64_t first, uint64_t count) const;
  Result<void> claim_now(uint64_t first, uint64_t count, uint64_t references);
  Result<void> dereference_now(uint64_t first, uint64_t count);
  uint64_t blocks_used() const;
  Result<void> write_table(HostOffset offset, uint64_t clusters);

  const Image &image_;
  Allocator &allocator_;
  const uint32_t order_;
  const uint64_t page_bytes_;
  const uint64_t entries_per_page_;
  const uint64_t pages_per_block_;
  const size_t pages_max_;
  std::vector<uint64_t> table_;  // the new refcount table
  std::vector<bool> shadowed_;   // block i has its copy
  PageList pages_;               // most recently used first
  std::unordered_map<uint64_t, PageList::iterator> page_of_;
  std::vector<Pending> pending_;  // counts of copies made and blocks replaced, not yet applied
  std::vector<ClusterRun> freed_;
};

}  // namespace qvmstate::qcow2
