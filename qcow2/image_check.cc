#include "qcow2/image_check.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "qcow2/entries.h"
#include "qcow2/io/endian.h"
#include "qcow2/limits.h"
#include "qcow2/refcount_block.h"

namespace qvmstate::qcow2 {
namespace {

constexpr uint64_t l1_piece_entries = 8192;
constexpr uint64_t refcount_piece_bytes = 256 * kib;
constexpr uint32_t crypt_luks = 2;

// What is known of a cluster: how often it is referenced, and by what.
constexpr uint32_t references_mask = (1U << 24) - 1;  // saturating
constexpr uint32_t used_alone = 1U << 24;             // header, L1 or refcount table and so on
constexpr uint32_t used_as_table = 1U << 25;          // an L2 table
constexpr uint32_t used_as_data = 1U << 26;
constexpr uint32_t marked_copied = 1U << 27;  // by an entry of the active tables
constexpr uint32_t marked_shared = 1U << 28;  // by an entry of the active tables without the flag
constexpr uint32_t used_by_snapshot = 1U << 29;

// What is known of an L2 table: how many L1 entries point at it, and of which.
constexpr uint32_t table_references_mask = (1U << 30) - 1;
constexpr uint32_t table_in_snapshot = 1U << 30;
constexpr uint32_t table_is_active = 1U << 31;

/// Zeros that take memory only where they are touched.
struct FreeDeleter {
  void operator()(uint32_t *memory) const { std::free(memory); }
};
using ClusterArray = std::unique_ptr<uint32_t[], FreeDeleter>;

class Checker {
 public:
  Checker(const Image &image, Findings &findings)
      : image_(image), header_(image.header()), geometry_(image.geometry()), findings_(findings) {}

  Result<ImageCheck> check() {
    QV_TRY(allocate());
    check_loadable();
    count_own_structures();
    QV_TRY(count_bitmaps());
    QV_TRY(count_l1(header_.l1_offset, header_.l1_entries, table_is_active, "the active L1 table"));
    for (const Snapshot &snapshot : image_.snapshots()) {
      QV_TRY(count_l1(snapshot.l1_offset, snapshot.l1_entries, table_in_snapshot,
                      "the L1 table of snapshot " + named(snapshot)));
    }
    QV_TRY(count_l2_tables());
    QV_TRY(compare_refcounts());
    result_.total_clusters = geometry_.clusters_for(header_.disk_bytes);
    return result_;
  }

 private:
  static std::string named(const Snapshot &snapshot) {
    return "'" + snapshot.name.substr(0, 64) + "' (id " + snapshot.id.substr(0, 32) + ")";
  }
  void damage(std::string message, uint64_t count = 1) {
    findings_.add(FindingKind::damage, std::move(message), count);
  }

  Result<void> allocate() {
    QV_ASSIGN(file_bytes_, image_.file().size());
    // The last cluster of the file may reach past its end, by less than a cluster.
    clusters_ = geometry_.clusters_for(file_bytes_) + 1;
    if (clusters_ > checked_clusters_max) {
      return fail(ErrorCode::not_supported,
                  image_.name() + ": has " + std::to_string(clusters_) + " clusters, and at most " +
                      std::to_string(checked_clusters_max) +
                      " can be checked; use `qemu-img check`, or an image with larger clusters");
    }
    states_.reset(static_cast<uint32_t *>(std::calloc(clusters_, sizeof(uint32_t))));
    tables_.reset(static_cast<uint32_t *>(std::calloc(clusters_, sizeof(uint32_t))));
    if (states_ == nullptr || tables_ == nullptr) {
      return fail_errno(ENOMEM, image_.name() + ": no memory to count its clusters");
    }
    return {};
  }

  // Why QEMU would not load what is there.

  void check_loadable() {
    const auto refuse = [this](std::string why) {
      findings_.add(FindingKind::refusal, std::move(why));
    };
    const auto has = [this](uint64_t bit) { return (header_.incompatible_features & bit) != 0; };
    if (has(incompatible::corrupt)) {
      refuse("the image is marked corrupt; repair it with `qemu-img check -r all`");
    }
    if (has(incompatible::dirty)) {
      findings_.add(FindingKind::note,
                    "the image is marked dirty: its refcounts may be stale, and QEMU repairs them "
                    "when it opens it for writing");
    }
    if (has(incompatible::data_file) && !image_.snapshots().empty()) {
      refuse("the image keeps its data in an external file, and has internal snapshots");
    }
    if (const uint32_t bitmaps = header_.persistent_bitmaps();
        bitmaps > 0 && !image_.snapshots().empty()) {
      refuse("the image has " + std::to_string(bitmaps) +
             " persistent dirty bitmap(s), with which loadvm fails; remove them with `qemu-img "
             "bitmap --remove`");
    }
    std::unordered_set<std::string> ids;
    std::unordered_set<std::string> names;
    for (const Snapshot &snapshot : image_.snapshots()) {
      ids.insert(snapshot.id);
    }
    for (const Snapshot &snapshot : image_.snapshots()) {
      const std::string what = "snapshot " + named(snapshot) + " ";
      if (snapshot.name.size() > snapshot_name_bytes_max ||
          snapshot.id.size() > snapshot_id_bytes_max) {
        refuse(what + "has a longer name or id than QEMU keeps, so that it finds none of them");
      }
      if (!names.insert(snapshot.name).second) {
        refuse(what + "has the name of one before it, which is loaded instead");
      }
      if (snapshot.name != snapshot.id && ids.contains(snapshot.name)) {
        refuse(what + "has for its name the id of another one, which loadvm loads instead");
      }
      if (snapshot.vmstate_bytes != 0 && header_.crypt_method == crypt_luks) {
        refuse(what + "has a VM state in a LUKS image, on which QEMU aborts");
      }
      if (header_.version >= 3 && snapshot.entry_extra_bytes < 16) {
        damage(what + "has only " + std::to_string(snapshot.entry_extra_bytes) +
               " bytes of extra data, and version 3 demands 16");
      }
    }
  }

  // Counting references. A table that overlaps with another is not followed: what a file can make
  // us read stays in proportion to its size.

  /// What a range of the file turned out to be.
  enum class Counted : uint8_t {
    good,
    overlaps,  ///< with something that was counted before, which was said
    outside,   ///< past the end of the file, which was said
  };

  /// Counts `times` references to each cluster of a range.
  Counted count(uint64_t offset, uint64_t bytes, uint32_t times, uint32_t flags,
                const std::string &what) {
    if (bytes == 0) {
      return Counted::good;
    }
    const uint64_t end_max = round_up(file_bytes_, geometry_.cluster_bytes());
    if (offset >= end_max || bytes > end_max - offset) {
      damage(what + " points to " + std::to_string(bytes) + " bytes at offset " +
             std::to_string(offset) + ", past the " + std::to_string(file_bytes_) +
             " bytes of the file");
      return Counted::outside;
    }
    uint64_t overlaps = 0;
    uint64_t first_overlap = 0;
    const uint64_t last = (offset + bytes - 1) >> geometry_.cluster_bits;
    for (uint64_t cluster = offset >> geometry_.cluster_bits; cluster <= last; ++cluster) {
      uint32_t &state = states_[cluster];
      const uint32_t references = state & references_mask;
      if (references != 0 &&
          (((state | flags) & used_alone) != 0 || ((state ^ flags) & used_as_table) != 0)) {
        first_overlap = overlaps++ == 0 ? cluster : first_overlap;
      }
      state =
          (state & ~references_mask) | flags |
          static_cast<uint32_t>(std::min<uint64_t>(references_mask, uint64_t{references} + times));
    }
    if (overlaps != 0) {
      damage("cluster " + std::to_string(first_overlap) + " is used by " + what +
                 " and by something else",
             overlaps);
    }
    return overlaps == 0 ? Counted::good : Counted::overlaps;
  }

  void count_own_structures() {
    count(0, geometry_.cluster_bytes(), 1, used_alone, "the header");
    count(header_.snapshot_table_offset.value, image_.snapshot_table_bytes(), 1, used_alone,
          "the snapshot table");
    count(header_.refcount_table_offset.value,
          uint64_t{header_.refcount_table_clusters} * geometry_.cluster_bytes(), 1, used_alone,
          "the refcount table");
    for (const uint64_t block : image_.refcount_table()) {
      if (block != 0) {
        count(block, geometry_.cluster_bytes(), 1, used_alone, "a refcount block");
      }
    }
    // The extension holds offset and length of the LUKS header.
    if (const HeaderExtension *luks = header_.extension(extension_luks);
        luks != nullptr && luks->data.size() >= 16) {
      count(load_be<uint64_t>(luks->data.data()), load_be<uint64_t>(luks->data.data() + 8), 1,
            used_alone, "the LUKS header");
    }
  }

  /// The extension: u32 bitmaps, u32 reserved, u64 directory bytes, u64 directory offset. An entry:
  /// u64 table offset, u32 table entries, u32 flags, u8 type, u8 granularity, u16 name bytes, u32
  /// extra bytes; extra, name, padding to 8.
  Result<void> count_bitmaps() {
    constexpr uint64_t entry_bytes = 24;
    const HeaderExtension *extension = header_.extension(extension_bitmaps);
    if (extension == nullptr || (header_.autoclear_features & autoclear::bitmaps) == 0 ||
        extension->data.size() < 24) {
      return {};
    }
    const uint64_t bytes = load_be<uint64_t>(extension->data.data() + 8);
    const uint64_t offset = load_be<uint64_t>(extension->data.data() + 16);
    if (bytes > bitmap_directory_bytes_max || offset > file_bytes_ ||
        bytes > file_bytes_ - offset) {
      damage("the directory of bitmaps is too long, or lies past the end of the file");
      return {};
    }
    if (count(offset, bytes, 1, used_alone, "the directory of bitmaps") != Counted::good) {
      return {};
    }
    std::vector<std::byte> directory(bytes);
    QV_TRY(image_.file().read_at(directory, HostOffset(offset)));
    for (uint64_t at = 0; at < bytes;) {
      if (bytes - at < entry_bytes) {
        damage("the directory of bitmaps ends inside an entry");
        return {};
      }
      const std::byte *entry = directory.data() + at;
      QV_TRY(count_bitmap_table(load_be<uint64_t>(entry), load_be<uint32_t>(entry + 8)));
      at += round_up(
          entry_bytes + load_be<uint16_t>(entry + 18) + uint64_t{load_be<uint32_t>(entry + 20)}, 8);
    }
    return {};
  }

  Result<void> count_bitmap_table(uint64_t offset, uint64_t entries) {
    if (entries > bitmap_table_entries_max || offset > file_bytes_ ||
        entries * 8 > file_bytes_ - offset) {
      damage("the table of a bitmap is too long, or lies past the end of the file");
      return {};
    }
    if (count(offset, entries * 8, 1, used_alone, "the table of a bitmap") != Counted::good) {
      return {};
    }
    std::vector<uint64_t> piece;
    for (uint64_t at = 0; at < entries; at += piece.size()) {
      piece.resize(std::min(l1_piece_entries, entries - at));
      QV_TRY(image_.file().read_at(std::as_writable_bytes(std::span(piece)),
                                   HostOffset(offset + at * 8)));
      for (const uint64_t stored : piece) {
        const uint64_t cluster = native_to_be(stored) & host_offset_mask;
        if (cluster != 0) {
          count(cluster, geometry_.cluster_bytes(), 1, used_alone, "the table of a bitmap");
        }
      }
    }
    return {};
  }

  Result<void> count_l1(HostOffset offset, uint32_t entries, uint32_t owner,
                        const std::string &what) {
    if (count(offset.value, uint64_t{entries} * 8, 1, used_alone, what) != Counted::good) {
      return {};
    }
    std::vector<uint64_t> piece;
    for (uint64_t at = 0; at < entries; at += piece.size()) {
      piece.resize(std::min(l1_piece_entries, entries - at));
      QV_TRY(image_.read_l1(offset, at, piece));
      for (const uint64_t entry : piece) {
        if (entry != 0) {
          count_table(entry, owner, what);
        }
      }
    }
    return {};
  }

  void count_table(uint64_t l1_entry, uint32_t owner, const std::string &what) {
    const uint64_t offset = l1_entry & host_offset_mask;
    if ((l1_entry & l1_reserved_mask) != 0 || offset == 0 || !geometry_.aligned(offset)) {
      damage(what + " has an entry with reserved bits, or one that is no cluster's start");
      return;
    }
    if (count(offset, geometry_.cluster_bytes(), 1, used_as_table, what) != Counted::outside) {
      const uint64_t cluster = offset >> geometry_.cluster_bits;
      const uint32_t uses = tables_[cluster] & table_references_mask;
      tables_[cluster] |= owner;
      tables_[cluster] += uses < table_references_mask ? 1 : 0;
      mark(cluster, l1_entry, owner);
    }
  }

  /// Notes what an entry of the active tables says of its cluster's refcount.
  void mark(uint64_t cluster, uint64_t entry, uint32_t owner) {
    if ((owner & table_is_active) != 0) {
      states_[cluster] |= (entry & entry_copied) != 0 ? marked_copied : marked_shared;
    }
    if ((owner & table_in_snapshot) != 0) {
      states_[cluster] |= used_by_snapshot;
    }
  }

  Result<void> count_l2_tables() {
    std::vector<std::byte> table(geometry_.cluster_bytes());
    for (uint64_t cluster = 0; cluster < clusters_; ++cluster) {
      // What is something else as well, which was said, is no table that could be followed.
      if (tables_[cluster] != 0 && (states_[cluster] & used_alone) == 0) {
        QV_TRY(image_.file().read_or_zero_at(table, geometry_.host_offset(cluster)));
        in_table_ = "an entry of the L2 table in cluster " + std::to_string(cluster) + " ";
        for (uint64_t i = 0; i < geometry_.l2_entries(); ++i) {
          count_entry(table.data() + i * geometry_.l2_entry_bytes(), tables_[cluster]);
        }
      }
    }
    return {};
  }

  void count_entry(const std::byte *stored, uint32_t table_uses) {
    const auto entry = load_be<uint64_t>(stored);
    const uint64_t bitmap = geometry_.extended_l2 ? load_be<uint64_t>(stored + 8) : 0;
    const ClusterKind kind = cluster_kind(entry, geometry_);
    if (entry == 0 && bitmap == 0) {
      return;
    }
    if (kind == ClusterKind::compressed) {
      count_compressed(entry, bitmap, table_uses);
      return;
    }
    if ((entry & l2_reserved_mask) != 0 ||
        ((entry & entry_zero) != 0 && (geometry_.extended_l2 || header_.version < 3))) {
      damage(in_table_ + "has reserved bits set");
    }
    if ((static_cast<uint32_t>(bitmap) & static_cast<uint32_t>(bitmap >> 32)) != 0) {
      damage(in_table_ + "has a subcluster that is both allocated and zero");
    }
    if (kind != ClusterKind::data && kind != ClusterKind::zero_allocated) {
      if (static_cast<uint32_t>(bitmap) != 0) {
        damage(in_table_ + "has allocated subclusters without a cluster");
      }
      return;
    }
    const uint64_t offset = entry & host_offset_mask;
    if (!geometry_.aligned(offset)) {
      damage(in_table_ + "does not point at the start of a cluster");
      return;
    }
    if ((table_uses & table_is_active) != 0) {
      ++result_.allocated_clusters;
    }
    if ((header_.incompatible_features & incompatible::data_file) != 0) {
      return;  // offsets are those of another file
    }
    if (count(offset, geometry_.cluster_bytes(), table_uses & table_references_mask, used_as_data,
              in_table_) != Counted::outside) {
      mark(offset >> geometry_.cluster_bits, entry, table_uses & ~table_references_mask);
    }
  }

  void count_compressed(uint64_t entry, uint64_t bitmap, uint32_t table_uses) {
    if ((entry & entry_copied) != 0) {
      damage(in_table_ + "is of a compressed cluster and has the copied flag");
    }
    if (bitmap != 0) {
      damage(in_table_ + "is of a compressed cluster and has subclusters");
    }
    const CompressedRange range = compressed_range(entry, geometry_);
    const uint64_t first = round_down(range.offset.value, 512);
    count(first, range.offset.value + range.bytes - first, table_uses & table_references_mask,
          used_as_data | ((table_uses & table_in_snapshot) != 0 ? used_by_snapshot : 0), in_table_);
    if ((table_uses & table_is_active) != 0) {
      ++result_.allocated_clusters;
      ++result_.compressed_clusters;
    }
  }

  // Comparing with the refcounts.

  /// Clusters side by side of which the same is wrong.
  struct Wrong {
    uint64_t first = 0;
    uint64_t count = 0;
    uint64_t refcount = 0;
    uint32_t references = 0;
  };

  Result<void> compare_refcounts() {
    const uint64_t per_block = geometry_.refcount_block_entries();
    const uint64_t piece_bytes = std::min(refcount_piece_bytes, geometry_.cluster_bytes());
    const uint64_t per_piece = piece_bytes * 8 / geometry_.refcount_bits();
    const std::vector<uint64_t> &table = image_.refcount_table();
    std::vector<std::byte> piece(piece_bytes);
    for (uint64_t first = 0; first < clusters_; first += per_piece) {
      const uint64_t block = first / per_block;
      const bool present = block < table.size() && table[block] != 0 && table[block] < file_bytes_;
      if (present) {
        const uint64_t at = first % per_block * geometry_.refcount_bits() / 8;
        QV_TRY(image_.file().read_or_zero_at(piece, HostOffset(table[block] + at)));
      }
      const uint64_t end = std::min(clusters_, first + per_piece);
      for (uint64_t cluster = first; cluster < end; ++cluster) {
        compare(cluster,
                present ? refcount_get(piece, geometry_.refcount_order, cluster - first) : 0);
      }
    }
    report_wrong();
    return {};
  }

  void compare(uint64_t cluster, uint64_t refcount) {
    const uint32_t state = states_[cluster];
    const uint32_t references = state & references_mask;
    if (references == 0 && cluster >= geometry_.clusters_for(file_bytes_)) {
      return;  // nothing is there that could be lost
    }
    if (refcount != 0 || references != 0) {
      result_.end_offset = (cluster + 1) << geometry_.cluster_bits;
    }
    if (refcount != references && references != references_mask) {
      if (wrong_.count != 0 && wrong_.first + wrong_.count == cluster &&
          wrong_.refcount == refcount && wrong_.references == references) {
        ++wrong_.count;
      } else {
        report_wrong();
        wrong_ = {cluster, 1, refcount, references};
      }
    }
    if ((state & marked_copied) != 0 && refcount != 1) {
      damage("cluster " + std::to_string(cluster) + " has the copied flag, and its refcount is " +
             std::to_string(refcount));
    }
    if ((state & marked_shared) != 0 && refcount == 1) {
      damage("cluster " + std::to_string(cluster) + " has no copied flag, and its refcount is 1");
    }
    if ((state & used_by_snapshot) != 0 && refcount >= geometry_.refcount_max()) {
      findings_.add(FindingKind::refusal,
                    "the refcount of cluster " + std::to_string(cluster) + " is " +
                        std::to_string(refcount) +
                        ", the most that fits, and loading a snapshot that uses it needs one more");
    }
  }

  void report_wrong() {
    if (wrong_.count == 0) {
      return;
    }
    std::string which = "cluster " + std::to_string(wrong_.first);
    if (wrong_.count > 1) {
      which = "clusters " + std::to_string(wrong_.first) + " to " +
              std::to_string(wrong_.first + wrong_.count - 1);
    }
    which += ": refcount " + std::to_string(wrong_.refcount) + ", used " +
             std::to_string(wrong_.references) + " times";
    findings_.add(wrong_.refcount > wrong_.references ? FindingKind::leak : FindingKind::damage,
                  std::move(which), wrong_.count);
    wrong_.count = 0;
  }

  const Image &image_;
  const Header &header_;
  const Geometry &geometry_;
  Findings &findings_;
  uint64_t file_bytes_ = 0;
  uint64_t clusters_ = 0;
  ClusterArray states_;
  ClusterArray tables_;
  std::string in_table_;  // words for the table that is looked at
  Wrong wrong_;
  ImageCheck result_;
};

}  // namespace

Result<ImageCheck> check_image(const Image &image, Findings &findings) {
  return Checker(image, findings).check();
}

}  // namespace qvmstate::qcow2
