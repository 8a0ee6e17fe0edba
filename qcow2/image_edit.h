// Where a snapshot becomes visible: one edit of an image's snapshots, committed by one header
// write.
//
// Everything an edit writes goes to clusters that the image calls free: the stream, its L2 tables,
// copies of L2 tables whose COPIED flags change, both L1 tables, the snapshot table, the refcount
// blocks and table. commit() then switches active L1, refcount table and snapshot table at once
// with bytes 36 to 71 of the header. Until that write the file is the old image, afterwards the new
// one; `qemu-img check` finds neither a leak nor an error in either.
//
// Order of calls: begin, then hold_vmstate if an earlier state is the base of the new one, then
// remove_snapshot and rename_snapshot as needed, then add_snapshot if
// one is added (its disk part is done there, which can refuse), the stream into vmstate(), commit.
// abort() or the destructor undoes what was written, if commit() did not get to its header write.
//
// A stream that is written while QEMU uses the image takes two edits. The first adds the snapshot
// with clusters reserved for it, mapped, and a vmstate of 0 bytes, which QEMU takes for one of the
// disk alone; QEMU's allocator leaves these clusters alone. The second (keep_reserved) gives the
// snapshot its name and size, and frees the clusters that the stream did not need.
//
// The image must be ours: its locks are held and nobody else writes it. Threads: one at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "qcow2/allocator.h"
#include "qcow2/compressed_area.h"
#include "qcow2/image.h"
#include "qcow2/io/result.h"
#include "qcow2/refcount_editor.h"
#include "qcow2/vmstate_area.h"

namespace qvmstate::qcow2 {

struct NewSnapshot {
  std::string name;
  uint32_t date_seconds = 0;
  uint32_t date_nanos = 0;
  uint64_t clock_nanos = 0;  ///< VM clock
  uint64_t icount = icount_none;
  std::vector<std::byte> more_extra;  ///< extra data after the 24 bytes QEMU knows
};

class ImageEdit {
 public:
  /// The image must suit (suitability.h). Scans its refcounts.
  static Result<std::unique_ptr<ImageEdit>> begin(Image &image);
  ~ImageEdit();

  /// Lets vmstate() share clusters of a snapshot's VM state, of its first `bytes`: each that can
  /// take it has one more reference until commit(), which takes it from those that were not shared.
  /// Those that are compressed, zeros, or have as many references as an entry holds are left out.
  Result<void> hold_vmstate(size_t index, uint64_t bytes);
  /// By index into image.snapshots() as it was at begin().
  Result<void> remove_snapshot(size_t index);
  Result<void> rename_snapshot(size_t index, const std::string &name);
  /// Replaces the extra data after the bytes QEMU knows.
  void set_more_extra(size_t index, std::vector<std::byte> more_extra);
  /// At most one. Names are checked by the caller (check_snapshot_name).
  Result<void> add_snapshot(const NewSnapshot &snapshot);
  /// In place of what add_snapshot() was given.
  void set_added_extra(std::vector<std::byte> more_extra);
  /// The snapshot keeps its disk, id, name, date, clock and extra data; its VM state becomes what
  /// is written to vmstate() or compressed_vmstate(). At most one, in place of add_snapshot.
  Result<void> replace_vmstate(size_t index);
  /// For a stream that is written after the commit, which is then given 0 bytes.
  Result<void> reserve_vmstate(uint64_t bytes);
  const std::vector<AreaRun> &reserved() const { return area_.runs(); }
  /// The snapshot, of which clusters were reserved, becomes `name` with the first `vmstate_bytes`
  /// of them, in place of add_snapshot. The commit is given the same number.
  Result<void> keep_reserved(size_t index, const std::string &name, uint64_t vmstate_bytes);
  const std::string &added_id() const { return added_->id; }
  /// For the stream of the added snapshot. Not used: a snapshot of the disk alone.
  VmstateArea &vmstate() { return area_; }
  /// The same in compressed clusters; one of both is used.
  CompressedArea &compressed_vmstate() { return compressed_area_; }
  /// Bounds how far ahead of the stream the file is extended.
  void expect_stream_bytes(uint64_t bytes) { allocator_.expect_stream_bytes(bytes); }

  /// `vmstate_bytes`: the stream's exact length. After it the Image is reloaded. When it fails,
  /// committed() tells whether the header may have been written.
  Result<void> commit(uint64_t vmstate_bytes);
  bool committed() const { return committed_; }
  /// Undoes; nothing if committed.
  Result<void> abort();
  /// After commit(): punches holes where clusters became free. Best effort.
  void give_back_space();

 private:
  ImageEdit(Image &image, Allocator allocator);

  Snapshot &edited(size_t original_index);
  template <class Visit>
  Result<void> visit_clusters(std::span<const std::byte> l2, Visit visit);
  Result<void> read_l1_piece(HostOffset l1, uint32_t l1_entries, uint64_t at,
                             std::vector<uint64_t> &piece, uint64_t &tables) const;
  Result<void> drop_table(uint64_t l1_entry);
  /// An L1 table with its L2 tables from entry `first` on.
  Result<void> drop_l1(const Snapshot &snapshot, uint64_t first);
  Result<void> share_active_disk();
  Result<void> refresh_copied_flags();
  Result<ClusterRun> begin_active_l1();
  Result<void> write_l1(HostOffset l1, uint64_t first, std::span<const uint64_t> entries);
  void take_out(size_t index);
  Result<void> keep_tables(const Snapshot &snapshot, uint64_t clusters);
  Result<void> keep_part(uint64_t l1_entry, uint64_t clusters);
  void note_vmstate_table(uint64_t cluster);
  uint64_t vmstate_clusters() const;
  Result<void> hold_table(uint64_t l1_entry, std::span<uint64_t> clusters);
  Result<void> claim_vmstate();
  Result<void> release_unshared();
  Result<void> write_vmstate_tables();
  Result<void> write_added_l1();
  Result<void> write_snapshot_table();

  Image &image_;
  Allocator allocator_;
  RefcountEditor refcounts_;
  VmstateArea area_;
  CompressedArea compressed_area_;
  std::vector<Snapshot> snapshots_;     // the new table's content
  std::vector<size_t> original_index_;  // of snapshots_[i] in image_.snapshots()
  std::optional<Snapshot> added_;
  size_t added_position_ = 0;  // in the new table
  HostOffset disk_l1_;         // whose disk entries the added one repeats
  uint32_t disk_l1_entries_ = 0;
  std::vector<ClusterRun> vmstate_tables_;  // L2 tables of the stream, in order
  HostOffset active_l1_;                    // as it will be
  HostOffset table_offset_;                 // of the new snapshot table
  bool removed_any_ = false;
  bool reserved_ = false;  // the stream comes, or came, between two edits
  bool committed_ = false;
  bool finished_ = false;  // committed or undone
};

}  // namespace qvmstate::qcow2
