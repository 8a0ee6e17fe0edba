#include "qcow2/image_edit.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "qcow2/entries.h"
#include "qcow2/io/endian.h"
#include "qcow2/limits.h"

namespace qvmstate::qcow2 {
namespace {

constexpr uint64_t l1_piece_entries = 8192;                 // 64 KiB of an L1 table at a time
constexpr uint64_t all_subclusters_allocated = 0xffffffff;  // second word of an extended L2 entry

/// A cluster that reads as zeros and has no host cluster.
void put_zero_entry(std::byte *entry, const Geometry &geometry) {
  if (geometry.extended_l2) {
    store_be<uint64_t>(entry, 0);
    store_be<uint64_t>(entry + 8, 0xffffffff00000000);  // all 32 subclusters zero
  } else {
    store_be(entry, entry_zero);
  }
}

}  // namespace

ImageEdit::ImageEdit(Image &image, Allocator allocator)
    : image_(image),
      allocator_(std::move(allocator)),
      refcounts_(image_, allocator_),
      area_(image_, allocator_),
      compressed_area_(image_, allocator_),
      snapshots_(image.snapshots()),
      active_l1_(image.header().l1_offset) {
  for (size_t i = 0; i < snapshots_.size(); ++i) {
    original_index_.push_back(i);
  }
}

Result<std::unique_ptr<ImageEdit>> ImageEdit::begin(Image &image) {
  QV_ASSIGN(Allocator allocator, Allocator::scan(image));
  return std::unique_ptr<ImageEdit>(new ImageEdit(image, std::move(allocator)));
}

ImageEdit::~ImageEdit() {
  if (!finished_) {
    (void)abort();
  }
}

// Calls visit(first cluster, count, compressed) for the host clusters of an L2 table;
// neighbours in table and file come as one run.
template <class Visit>
Result<void> ImageEdit::visit_clusters(std::span<const std::byte> l2, Visit visit) {
  const Geometry &geometry = image_.geometry();
  uint64_t run_first = 0;
  uint64_t run_count = 0;
  auto flush = [&]() -> Result<void> {
    if (run_count != 0) {
      QV_TRY(visit(run_first, run_count, false));
      run_count = 0;
    }
    return {};
  };
  for (uint64_t i = 0; i < geometry.l2_entries(); ++i) {
    const auto entry = load_be<uint64_t>(l2.data() + i * geometry.l2_entry_bytes());
    const ClusterKind kind = cluster_kind(entry, geometry);
    if (kind == ClusterKind::unallocated || kind == ClusterKind::zero) {
      continue;
    }
    if (kind == ClusterKind::compressed) {
      QV_TRY(flush());
      const CompressedRange range = compressed_range(entry, geometry);
      const uint64_t first = geometry.cluster_of(range.offset);
      const uint64_t last = geometry.cluster_of(range.offset + (range.bytes - 1));
      QV_TRY(visit(first, last - first + 1, true));
      continue;
    }
    const uint64_t offset = entry & host_offset_mask;
    if (!geometry.aligned(offset)) {
      return fail(ErrorCode::bad_image,
                  image_.name() + ": an L2 entry points to byte " + std::to_string(offset) +
                      ", which is no cluster's start: the image is damaged; repair it with "
                      "`qemu-img check -r all`");
    }
    const uint64_t cluster = geometry.cluster_of(HostOffset(offset));
    if (run_count != 0 && cluster == run_first + run_count) {
      ++run_count;
    } else {
      QV_TRY(flush());
      run_first = cluster;
      run_count = 1;
    }
  }
  return flush();
}

// The next entries of an L1 table, from `at` on. `tables` counts the L2 tables met so far: more
// than the file has clusters would be one of them met again and again, each time with all its
// entries.
Result<void> ImageEdit::read_l1_piece(HostOffset l1, uint32_t l1_entries, uint64_t at,
                                      std::vector<uint64_t> &piece, uint64_t &tables) const {
  piece.resize(std::min<uint64_t>(l1_piece_entries, l1_entries - at));
  QV_TRY(image_.read_l1(l1, at, piece));
  tables += static_cast<uint64_t>(
      std::ranges::count_if(piece, [](uint64_t entry) { return (entry & host_offset_mask) != 0; }));
  QV_ASSIGN(const uint64_t file_bytes, image_.file().size());
  if (tables > image_.geometry().clusters_for(file_bytes)) {
    return fail(ErrorCode::bad_image,
                image_.name() + ": the L1 table at offset " + std::to_string(l1.value) +
                    " has more L2 tables than the file has clusters: the image is damaged; repair "
                    "it with `qemu-img check -r all`");
  }
  return {};
}

Result<void> ImageEdit::drop_table(uint64_t l1_entry) {
  std::vector<std::byte> l2(image_.geometry().cluster_bytes());
  QV_TRY(image_.read_l2(l1_entry, l2));
  QV_TRY(visit_clusters(l2, [&](uint64_t first, uint64_t count, bool) {
    return refcounts_.dereference(first, count);
  }));
  return refcounts_.dereference(
      image_.geometry().cluster_of(HostOffset(l1_entry & host_offset_mask)), 1);
}

Result<void> ImageEdit::drop_l1(const Snapshot &snapshot, uint64_t first) {
  std::vector<uint64_t> piece;
  uint64_t tables = 0;
  for (uint64_t at = first; at < snapshot.l1_entries; at += piece.size()) {
    QV_TRY(read_l1_piece(snapshot.l1_offset, snapshot.l1_entries, at, piece, tables));
    for (const uint64_t entry : piece) {
      if ((entry & host_offset_mask) != 0) {
        QV_TRY(drop_table(entry));
      }
    }
  }
  if (snapshot.l1_entries != 0) {
    QV_TRY(refcounts_.dereference(image_.geometry().cluster_of(snapshot.l1_offset),
                                  image_.geometry().l1_clusters(snapshot.l1_entries)));
  }
  return {};
}

// The host clusters of an L2 table's first entries; 0 for those that cannot be shared. Loading the
// snapshot raises each count once more.
Result<void> ImageEdit::hold_table(uint64_t l1_entry, std::span<uint64_t> clusters) {
  const Geometry &geometry = image_.geometry();
  std::vector<std::byte> l2(geometry.cluster_bytes());
  QV_TRY(image_.read_l2(l1_entry, l2));
  QV_ASSIGN(const uint64_t file_bytes, image_.file().size());
  const uint64_t file_clusters = file_bytes >> geometry.cluster_bits;
  const uint64_t ceiling = geometry.refcount_max() - 1;
  for (size_t i = 0; i < clusters.size(); ++i) {
    const std::byte *stored = l2.data() + i * geometry.l2_entry_bytes();
    const auto entry = load_be<uint64_t>(stored);
    const bool whole =
        !geometry.extended_l2 || load_be<uint64_t>(stored + 8) == all_subclusters_allocated;
    const uint64_t cluster = geometry.cluster_of(HostOffset(entry & host_offset_mask));
    if (cluster_kind(entry, geometry) != ClusterKind::data || !whole ||
        !geometry.aligned(entry & host_offset_mask) || cluster >= file_clusters) {
      continue;
    }
    QV_ASSIGN(const uint64_t references, refcounts_.get(cluster));
    if (references != 0 && references < ceiling) {
      QV_TRY(refcounts_.reference(cluster, 1, ceiling));
      clusters[i] = cluster;
    }
  }
  return {};
}

Result<void> ImageEdit::hold_vmstate(size_t index, uint64_t bytes) {
  assert(!added_ && !removed_any_);
  const Geometry &geometry = image_.geometry();
  const Snapshot &snapshot = image_.snapshots()[index];
  const uint64_t first = geometry.vmstate_l1_index(snapshot.disk_bytes);
  const uint64_t l1_entries = first < snapshot.l1_entries ? snapshot.l1_entries - first : 0;
  std::vector<uint64_t> clusters(
      std::min(geometry.clusters_for(bytes), l1_entries * geometry.l2_entries()));
  std::vector<uint64_t> piece;
  uint64_t tables = 0;
  const uint64_t end = first + divide_up(clusters.size(), geometry.l2_entries());
  for (uint64_t at = first; at < end; at += piece.size()) {
    QV_TRY(read_l1_piece(snapshot.l1_offset, static_cast<uint32_t>(end), at, piece, tables));
    for (size_t i = 0; i < piece.size(); ++i) {
      const uint64_t done = (at - first + i) * geometry.l2_entries();
      if ((piece[i] & host_offset_mask) != 0) {
        QV_TRY(hold_table(piece[i], std::span(clusters).subspan(
                                        done, std::min<uint64_t>(geometry.l2_entries(),
                                                                 clusters.size() - done))));
      }
    }
  }
  area_.set_base(std::move(clusters));
  return {};
}

Result<void> ImageEdit::remove_snapshot(size_t index) {
  assert(!added_);
  const Snapshot &snapshot = image_.snapshots()[index];
  QV_TRY(drop_l1(snapshot, 0));
  const auto found = std::find(original_index_.begin(), original_index_.end(), index);
  assert(found != original_index_.end());
  snapshots_.erase(snapshots_.begin() + (found - original_index_.begin()));
  original_index_.erase(found);
  removed_any_ = true;
  return {};
}

Snapshot &ImageEdit::edited(size_t original_index) {
  const auto found = std::find(original_index_.begin(), original_index_.end(), original_index);
  assert(found != original_index_.end());
  return snapshots_[static_cast<size_t>(found - original_index_.begin())];
}

Result<void> ImageEdit::rename_snapshot(size_t index, const std::string &name) {
  edited(index).name = name;
  return {};
}

void ImageEdit::set_more_extra(size_t index, std::vector<std::byte> more_extra) {
  edited(index).more_extra = std::move(more_extra);
}

Result<ClusterRun> ImageEdit::begin_active_l1() {
  const Geometry &geometry = image_.geometry();
  const Header &header = image_.header();
  QV_ASSIGN(const ClusterRun run,
            allocator_.take(std::max<uint64_t>(1, geometry.l1_clusters(header.l1_entries))));
  QV_TRY(refcounts_.claim(run, 1));
  if (header.l1_entries != 0) {
    QV_TRY(refcounts_.dereference(geometry.cluster_of(header.l1_offset),
                                  geometry.l1_clusters(header.l1_entries)));
  }
  active_l1_ = geometry.host_offset(run.first);
  return run;
}

Result<void> ImageEdit::write_l1(HostOffset l1, uint64_t first, std::span<const uint64_t> entries) {
  std::vector<std::byte> bytes(entries.size() * 8);
  for (size_t i = 0; i < entries.size(); ++i) {
    store_be(bytes.data() + i * 8, entries[i]);
  }
  return image_.file().write_at(bytes, l1 + first * 8);
}

// The active disk gets a second owner: every cluster one more reference, every L2 table with COPIED
// entries a copy without them, and a new active L1 whose entries (COPIED clear: each table has two
// owners) the new snapshot's L1 will repeat. What a save by QEMU left of its vmstate is dropped.
Result<void> ImageEdit::share_active_disk() {
  const Geometry &geometry = image_.geometry();
  const Header &header = image_.header();
  const uint64_t disk_entries = geometry.vmstate_l1_index(header.disk_bytes);
  const uint64_t count_max = geometry.refcount_max();
  // Loading a snapshot raises the count of each of its clusters once more before it lowers the old
  // ones; a cluster that holds several compressed ones is raised as often as the active disk uses
  // it.
  const uint64_t ceiling = count_max - 1;
  const uint64_t ceiling_compressed = count_max / 3 * 2;

  QV_TRY(begin_active_l1());
  std::vector<std::byte> l2(geometry.cluster_bytes());
  std::vector<uint64_t> piece;
  uint64_t tables = 0;
  for (uint64_t at = 0; at < header.l1_entries; at += piece.size()) {
    QV_TRY(read_l1_piece(header.l1_offset, header.l1_entries, at, piece, tables));
    for (size_t i = 0; i < piece.size(); ++i) {
      const uint64_t offset = piece[i] & host_offset_mask;
      if (offset == 0) {
        piece[i] = 0;
        continue;
      }
      if (at + i >= disk_entries) {
        QV_TRY(drop_table(piece[i]));
        piece[i] = 0;
        continue;
      }
      QV_TRY(image_.read_l2(piece[i], l2));
      QV_TRY(visit_clusters(l2, [&](uint64_t first, uint64_t count, bool compressed) {
        return refcounts_.reference(first, count, compressed ? ceiling_compressed : ceiling);
      }));
      bool any_copied = false;
      for (uint64_t k = 0; k < geometry.l2_entries(); ++k) {
        std::byte &top = l2[k * geometry.l2_entry_bytes()];
        any_copied |= (top & std::byte{0x80}) != std::byte{0};
        top &= std::byte{0x7f};
      }
      const uint64_t old_table = geometry.cluster_of(HostOffset(offset));
      if (!any_copied) {
        QV_TRY(refcounts_.reference(old_table, 1, ceiling));
        piece[i] = offset;
        continue;
      }
      QV_ASSIGN(const ClusterRun copy, allocator_.take(1));
      QV_TRY(refcounts_.claim(copy, 2));
      QV_TRY(refcounts_.dereference(old_table, 1));
      QV_TRY(image_.file().write_at(l2, geometry.host_offset(copy.first)));
      piece[i] = geometry.host_offset(copy.first).value;
    }
    QV_TRY(write_l1(active_l1_, at, piece));
  }
  return {};
}

// After a removal alone: a cluster that only the active disk still uses must say so (COPIED).
Result<void> ImageEdit::refresh_copied_flags() {
  const Geometry &geometry = image_.geometry();
  const Header &header = image_.header();
  QV_TRY(begin_active_l1());
  std::vector<std::byte> l2(geometry.cluster_bytes());
  std::vector<uint64_t> piece;
  uint64_t tables = 0;
  for (uint64_t at = 0; at < header.l1_entries; at += piece.size()) {
    QV_TRY(read_l1_piece(header.l1_offset, header.l1_entries, at, piece, tables));
    for (uint64_t &l1_entry : piece) {
      uint64_t offset = l1_entry & host_offset_mask;
      if (offset == 0) {
        l1_entry = 0;
        continue;
      }
      QV_TRY(image_.read_l2(l1_entry, l2));
      bool changed = false;
      for (uint64_t k = 0; k < geometry.l2_entries(); ++k) {
        std::byte *at_entry = l2.data() + k * geometry.l2_entry_bytes();
        const auto entry = load_be<uint64_t>(at_entry);
        const ClusterKind kind = cluster_kind(entry, geometry);
        if (kind != ClusterKind::data && kind != ClusterKind::zero_allocated) {
          continue;
        }
        QV_ASSIGN(const uint64_t references,
                  refcounts_.get(geometry.cluster_of(HostOffset(entry & host_offset_mask))));
        const uint64_t wanted =
            (entry & ~entry_copied) | (references == 1 ? entry_copied : uint64_t{0});
        if (wanted != entry) {
          store_be(at_entry, wanted);
          changed = true;
        }
      }
      if (changed) {
        QV_ASSIGN(const ClusterRun copy, allocator_.take(1));
        QV_TRY(refcounts_.claim(copy, 1));
        QV_TRY(refcounts_.dereference(geometry.cluster_of(HostOffset(offset)), 1));
        QV_TRY(image_.file().write_at(l2, geometry.host_offset(copy.first)));
        offset = geometry.host_offset(copy.first).value;
      }
      QV_ASSIGN(const uint64_t owners, refcounts_.get(geometry.cluster_of(HostOffset(offset))));
      l1_entry = offset | (owners == 1 ? entry_copied : uint64_t{0});
    }
    QV_TRY(write_l1(active_l1_, at, piece));
  }
  return {};
}

Result<void> ImageEdit::add_snapshot(const NewSnapshot &snapshot) {
  assert(!added_);
  if (snapshots_.size() >= snapshots_max) {
    return fail(ErrorCode::no_space, image_.name() + ": has " + std::to_string(snapshots_max) +
                                         " snapshots, the most that QEMU opens: delete some");
  }
  Snapshot added;
  added.id = next_snapshot_id(image_.snapshots());
  added.name = snapshot.name;
  added.date_seconds = snapshot.date_seconds;
  added.date_nanos = snapshot.date_nanos;
  added.clock_nanos = snapshot.clock_nanos;
  added.disk_bytes = image_.header().disk_bytes;
  added.icount = snapshot.icount;
  added.more_extra = snapshot.more_extra;
  added_ = std::move(added);
  added_position_ = snapshots_.size();
  QV_TRY(share_active_disk());
  disk_l1_ = active_l1_;
  disk_l1_entries_ = image_.header().l1_entries;
  return {};
}

Result<void> ImageEdit::replace_vmstate(size_t index) {
  assert(!added_);
  const Snapshot &snapshot = image_.snapshots()[index];
  QV_TRY(drop_l1(snapshot, image_.geometry().vmstate_l1_index(snapshot.disk_bytes)));
  take_out(index);
  removed_any_ = true;
  return {};
}

/// The snapshot will be added again, changed, in its place.
void ImageEdit::take_out(size_t index) {
  const Snapshot &snapshot = image_.snapshots()[index];
  const auto found = std::find(original_index_.begin(), original_index_.end(), index);
  assert(found != original_index_.end());
  added_position_ = static_cast<size_t>(found - original_index_.begin());
  snapshots_.erase(snapshots_.begin() + static_cast<ptrdiff_t>(added_position_));
  original_index_.erase(found);
  added_ = snapshot;
  disk_l1_ = snapshot.l1_offset;
  disk_l1_entries_ = snapshot.l1_entries;
}

Result<void> ImageEdit::reserve_vmstate(uint64_t bytes) {
  assert(added_);
  reserved_ = true;
  return area_.reserve(bytes);
}

Result<void> ImageEdit::keep_reserved(size_t index, const std::string &name,
                                      uint64_t vmstate_bytes) {
  assert(!added_);
  const Snapshot &snapshot = image_.snapshots()[index];
  QV_TRY(keep_tables(snapshot, image_.geometry().clusters_for(vmstate_bytes)));
  take_out(index);
  added_->name = name;
  reserved_ = true;
  return {};
}

// Of the L2 tables of the snapshot's vmstate those of its first clusters; the others and the L1,
// which write_added_l1() writes anew, are dropped. What is dropped the active disk never used, so
// that its COPIED flags stay right.
Result<void> ImageEdit::keep_tables(const Snapshot &snapshot, uint64_t clusters) {
  const Geometry &geometry = image_.geometry();
  const uint64_t per_table = geometry.l2_entries();
  const uint64_t first = geometry.vmstate_l1_index(snapshot.disk_bytes);
  const auto missing = [&] {
    return fail(ErrorCode::bad_image, image_.name() + ": snapshot '" + snapshot.name +
                                          "' no longer has all clusters that were reserved for "
                                          "it; save again");
  };
  std::vector<uint64_t> piece;
  uint64_t tables = 0;
  uint64_t seen_clusters = 0;
  for (uint64_t at = first; at < snapshot.l1_entries; at += piece.size()) {
    QV_TRY(read_l1_piece(snapshot.l1_offset, snapshot.l1_entries, at, piece, tables));
    for (const uint64_t entry : piece) {
      const bool there = (entry & host_offset_mask) != 0;
      if (seen_clusters >= clusters) {
        QV_TRY(there ? drop_table(entry) : Result<void>());
      } else if (!there) {
        return missing();
      } else if (clusters - seen_clusters < per_table) {
        QV_TRY(keep_part(entry, clusters - seen_clusters));
      } else {
        note_vmstate_table(geometry.cluster_of(HostOffset(entry & host_offset_mask)));
      }
      seen_clusters += per_table;
    }
  }
  if (seen_clusters < clusters) {
    return missing();
  }
  return refcounts_.dereference(geometry.cluster_of(snapshot.l1_offset),
                                geometry.l1_clusters(snapshot.l1_entries));
}

// A copy of an L2 table with its first clusters alone.
Result<void> ImageEdit::keep_part(uint64_t l1_entry, uint64_t clusters) {
  const Geometry &geometry = image_.geometry();
  std::vector<std::byte> kept(geometry.cluster_bytes());
  QV_TRY(image_.read_l2(l1_entry, kept));
  const auto border = kept.begin() + static_cast<ptrdiff_t>(clusters * geometry.l2_entry_bytes());
  std::vector<std::byte> dropped(kept.size());
  std::copy(border, kept.end(), dropped.begin() + (border - kept.begin()));
  std::fill(border, kept.end(), std::byte{0});
  QV_TRY(visit_clusters(dropped, [&](uint64_t first, uint64_t count, bool) {
    return refcounts_.dereference(first, count);
  }));
  QV_TRY(refcounts_.dereference(geometry.cluster_of(HostOffset(l1_entry & host_offset_mask)), 1));
  QV_ASSIGN(const ClusterRun table, allocator_.take(1));
  QV_TRY(refcounts_.claim(table, 1));
  note_vmstate_table(table.first);
  return image_.file().write_at(kept, geometry.host_offset(table.first));
}

void ImageEdit::note_vmstate_table(uint64_t cluster) {
  if (!vmstate_tables_.empty() && vmstate_tables_.back().end() == cluster) {
    ++vmstate_tables_.back().count;
  } else {
    vmstate_tables_.push_back({cluster, 1});
  }
}

void ImageEdit::set_added_extra(std::vector<std::byte> more_extra) {
  added_->more_extra = std::move(more_extra);
}

uint64_t ImageEdit::vmstate_clusters() const {
  return std::max<uint64_t>(area_.clusters(), compressed_area_.entries().size());
}

Result<void> ImageEdit::claim_vmstate() {
  for (const AreaRun &run : area_.runs()) {
    if (!run.shared) {
      QV_TRY(refcounts_.claim({run.host_first, run.count}, 1));
    }
  }
  for (const CompressedArea::Use &use : compressed_area_.uses()) {
    QV_TRY(refcounts_.claim({use.cluster, 1}, use.references));
  }
  return {};
}

Result<void> ImageEdit::release_unshared() {
  for (const uint64_t cluster : area_.unshared_base()) {
    if (cluster != 0) {
      QV_TRY(refcounts_.dereference(cluster, 1));
    }
  }
  return {};
}

Result<void> ImageEdit::write_vmstate_tables() {
  const Geometry &geometry = image_.geometry();
  std::vector<std::byte> l2(geometry.cluster_bytes());
  QV_TRY(claim_vmstate());
  QV_TRY(release_unshared());
  const std::vector<uint64_t> &compressed = compressed_area_.entries();
  auto run = area_.runs().begin();
  // The L2 entry of a cluster, in ascending order.
  const auto entry_of = [&](uint64_t cluster) {
    if (!compressed.empty()) {
      return compressed[cluster];
    }
    if (run != area_.runs().end() && run->stream_end() == cluster) {
      ++run;
    }
    if (run == area_.runs().end() || cluster < run->stream_first) {
      return entry_zero;
    }
    return geometry.host_offset(run->host_first + (cluster - run->stream_first)).value;
  };
  const uint64_t clusters = vmstate_clusters();
  for (uint64_t done = 0; done < clusters; done += geometry.l2_entries()) {
    std::fill(l2.begin(), l2.end(), std::byte{0});
    for (uint64_t k = 0; k < std::min(geometry.l2_entries(), clusters - done); ++k) {
      std::byte *stored = l2.data() + k * geometry.l2_entry_bytes();
      const uint64_t entry = entry_of(done + k);
      if (entry == entry_zero) {
        put_zero_entry(stored, geometry);
        continue;
      }
      store_be(stored, entry);
      if (geometry.extended_l2 && (entry & entry_compressed) == 0) {
        store_be<uint64_t>(stored + 8, all_subclusters_allocated);
      }
    }
    QV_ASSIGN(const ClusterRun table, allocator_.take(1));
    QV_TRY(refcounts_.claim(table, 1));
    QV_TRY(image_.file().write_at(l2, geometry.host_offset(table.first)));
    note_vmstate_table(table.first);
  }
  return {};
}

Result<void> ImageEdit::write_added_l1() {
  const Geometry &geometry = image_.geometry();
  const uint64_t disk_entries = geometry.vmstate_l1_index(added_->disk_bytes);
  uint64_t entries = disk_entries;
  for (const ClusterRun &run : vmstate_tables_) {
    entries += run.count;
  }
  if (entries > l1_bytes_max / 8) {
    return fail(ErrorCode::no_space, image_.name() +
                                         ": the vmstate does not fit into the largest L1 table; "
                                         "use an image with larger clusters");
  }
  added_->l1_entries = static_cast<uint32_t>(entries);
  QV_ASSIGN(const ClusterRun run,
            allocator_.take(std::max<uint64_t>(1, geometry.l1_clusters(entries))));
  QV_TRY(refcounts_.claim(run, 1));
  added_->l1_offset = geometry.host_offset(run.first);

  std::vector<uint64_t> piece;
  for (uint64_t at = 0; at < disk_entries; at += piece.size()) {
    piece.resize(std::min<uint64_t>(l1_piece_entries, disk_entries - at));
    // A table may end before the disk does, where nothing follows.
    const uint64_t there = at < disk_l1_entries_ ? disk_l1_entries_ - at : 0;
    std::fill(piece.begin(), piece.end(), 0);
    QV_TRY(image_.read_l1(disk_l1_, at, std::span(piece).first(std::min(there, piece.size()))));
    QV_TRY(write_l1(added_->l1_offset, at, piece));
  }
  uint64_t at = disk_entries;
  for (const ClusterRun &tables : vmstate_tables_) {
    for (uint64_t done = 0; done < tables.count; done += piece.size()) {
      piece.resize(std::min<uint64_t>(l1_piece_entries, tables.count - done));
      for (size_t i = 0; i < piece.size(); ++i) {
        piece[i] = geometry.host_offset(tables.first + done + i).value;
      }
      QV_TRY(write_l1(added_->l1_offset, at, piece));
      at += piece.size();
    }
  }
  return {};
}

Result<void> ImageEdit::write_snapshot_table() {
  const Geometry &geometry = image_.geometry();
  const Header &header = image_.header();
  if (header.snapshot_count != 0) {
    QV_TRY(refcounts_.dereference(geometry.cluster_of(header.snapshot_table_offset),
                                  geometry.clusters_for(image_.snapshot_table_bytes())));
  }
  if (snapshots_.empty()) {
    return {};
  }
  QV_ASSIGN(std::vector<std::byte> table, format_snapshot_table(snapshots_));
  const uint64_t clusters = geometry.clusters_for(table.size());
  table.resize(clusters * geometry.cluster_bytes());
  QV_ASSIGN(const ClusterRun run, allocator_.take(clusters));
  QV_TRY(refcounts_.claim(run, 1));
  table_offset_ = geometry.host_offset(run.first);
  return image_.file().write_at(table, table_offset_);
}

Result<void> ImageEdit::commit(uint64_t vmstate_bytes) {
  assert(!finished_);
  assert(reserved_ || (vmstate_bytes == 0) == (vmstate_clusters() == 0));
  io::File &file = image_.file();

  // 1. All that the new header will point at, in clusters that the old image calls free.
  if (added_) {
    added_->vmstate_bytes = vmstate_bytes;
    QV_TRY(write_vmstate_tables());
    QV_TRY(write_added_l1());
    snapshots_.insert(snapshots_.begin() + static_cast<ptrdiff_t>(added_position_), *added_);
  }
  if (removed_any_ && active_l1_ == image_.header().l1_offset) {
    QV_TRY(refresh_copied_flags());
  }
  QV_TRY(write_snapshot_table());
  QV_ASSIGN(const RefcountEditor::Table refcount_table, refcounts_.finish());

  // 2. The file reaches to the end of its last cluster, and all of that is on the disk before the
  //    header names it.
  QV_TRY(allocator_.trim_file());
  QV_TRY(file.sync());

  // 3. The commit: one write within one sector.
  RawHeader raw{};
  raw.l1_entries = image_.header().l1_entries;
  raw.l1_offset = active_l1_.value;
  raw.refcount_table_offset = refcount_table.offset.value;
  raw.refcount_table_clusters = refcount_table.clusters;
  raw.snapshot_count = static_cast<uint32_t>(snapshots_.size());
  raw.snapshot_table_offset = table_offset_.value;
  committed_ = true;
  finished_ = true;
  const auto *bytes = reinterpret_cast<const std::byte *>(&raw);
  QV_TRY(file.write_at({bytes + switch_offset, switch_bytes}, HostOffset(switch_offset)));
  QV_TRY(file.sync());
  return image_.reload();
}

Result<void> ImageEdit::abort() {
  if (finished_) {
    return {};
  }
  finished_ = true;
  (void)image_.file().drain();
  image_.file().clear_error();
  return allocator_.undo();
}

void ImageEdit::give_back_space() {
  if (!committed_) {
    return;
  }
  const Geometry &geometry = image_.geometry();
  for (const ClusterRun &run : refcounts_.freed()) {
    if (!image_.file().punch_hole(geometry.host_offset(run.first),
                                  run.count * geometry.cluster_bytes())) {
      image_.file().clear_error();
      return;
    }
  }
}

}  // namespace qvmstate::qcow2
