#include "qcow2/cluster_reader.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "qcow2/compression.h"

namespace qvmstate::qcow2 {
namespace {

constexpr uint32_t subclusters = 32;  // in a cluster with extended L2 entries
constexpr uint64_t host_bytes_max = uint64_t{1} << 56;
constexpr uint64_t l1_piece_entries = 8192;

tl::unexpected<Error> bad_entry(const Image &image, uint64_t entry, const char *why) {
  char text[19];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(entry));
  return fail(ErrorCode::bad_image, image.name() + ": L2 table entry " + text + " " + why +
                                        ": check the image with `qemu-img check`");
}

/// Refuses an entry that the format forbids.
Result<void> check_entry(const Image &image, uint64_t entry, uint64_t bitmap) {
  const Geometry &geometry = image.geometry();
  if (entry & entry_compressed) {
    if (entry & entry_copied) {
      return bad_entry(image, entry, "is of a compressed cluster and has the copied flag");
    }
    if (bitmap != 0) {
      return bad_entry(image, entry, "is of a compressed cluster and has subclusters");
    }
    const CompressedRange range = compressed_range(entry, geometry);
    if (range.offset.value >= host_bytes_max - range.bytes) {
      return bad_entry(image, entry, "points past the 2^56 bytes that a file can have");
    }
    return {};
  }
  if (entry & l2_reserved_mask) {
    return bad_entry(image, entry, "has reserved bits set");
  }
  if ((entry & entry_zero) && (geometry.extended_l2 || image.header().version < 3)) {
    return bad_entry(image, entry, "has a zero flag, which this image cannot have");
  }
  if (!geometry.aligned(entry & host_offset_mask)) {
    return bad_entry(image, entry, "does not point at the start of a cluster");
  }
  const uint32_t allocated = static_cast<uint32_t>(bitmap);
  const uint32_t zero = static_cast<uint32_t>(bitmap >> 32);
  if (allocated & zero) {
    return bad_entry(image, entry, "has a subcluster that is both allocated and zero");
  }
  if (allocated != 0 && (entry & host_offset_mask) == 0) {
    return bad_entry(image, entry, "has allocated subclusters but no cluster");
  }
  return {};
}

ClusterKind subcluster_kind(uint64_t entry, uint64_t bitmap, uint32_t index) {
  if (bitmap >> index & 1) {
    return ClusterKind::data;
  }
  if (bitmap >> (32 + index) & 1) {
    return entry & host_offset_mask ? ClusterKind::zero_allocated : ClusterKind::zero;
  }
  return ClusterKind::unallocated;
}

}  // namespace

ClusterReader::ClusterReader(const Image &image, HostOffset l1_offset, uint32_t l1_entries)
    : image_(&image), l1_offset_(l1_offset), l1_entries_(l1_entries) {}

Result<void> ClusterReader::check_named(const char *table, uint64_t clusters,
                                        uint64_t expanded_bytes) const {
  QV_ASSIGN(const uint64_t file_bytes, image_->file().size());
  if (clusters <= image_->geometry().clusters_for(file_bytes) &&
      expanded_bytes / expansion_max <= file_bytes) {
    return {};
  }
  return fail(ErrorCode::bad_image,
              image_->name() + ": " + table + " names " + std::to_string(clusters) +
                  " clusters and " + std::to_string(expanded_bytes) +
                  " bytes of compressed ones, in a file of " + std::to_string(file_bytes) +
                  " bytes: it names some again and again; check the image with `qemu-img check`");
}

Result<void> ClusterReader::check_l1() const {
  std::vector<uint64_t> piece;
  uint64_t tables = 0;
  for (uint64_t at = 0; at < l1_entries_; at += piece.size()) {
    piece.resize(std::min<uint64_t>(l1_piece_entries, l1_entries_ - at));
    QV_TRY(image_->read_l1(l1_offset_, at, piece));
    tables += piece.size() - static_cast<uint64_t>(std::ranges::count(piece, uint64_t{0}));
  }
  return check_named("an L1 table", tables, 0);
}

Result<void> ClusterReader::check_l2() const {
  const Geometry &geometry = image_->geometry();
  uint64_t clusters = 0;
  uint64_t compressed = 0;
  for (uint64_t i = 0; i < geometry.l2_entries(); ++i) {
    const auto entry = load_be<uint64_t>(&cached_l2_[i * geometry.l2_entry_bytes()]);
    const ClusterKind kind = cluster_kind(entry, geometry);
    clusters += kind == ClusterKind::data ? 1 : 0;
    compressed += kind == ClusterKind::compressed ? 1 : 0;
  }
  return check_named("an L2 table", clusters, compressed * geometry.cluster_bytes());
}

Result<void> ClusterReader::load_l2(GuestOffset offset) {
  const Geometry &geometry = image_->geometry();
  const uint64_t l1_index = offset.value / geometry.span_bytes();
  if (l1_index >= l1_entries_) {
    return fail(ErrorCode::bad_image, image_->name() + ": offset " + std::to_string(offset.value) +
                                          " is past the " + std::to_string(l1_entries_) +
                                          " entries of the L1 table at offset " +
                                          std::to_string(l1_offset_.value));
  }
  if (cached_l1_index_ == static_cast<int64_t>(l1_index)) {
    return {};
  }
  cached_l1_index_ = -1;
  if (!l1_checked_) {
    QV_TRY(check_l1());
    l1_checked_ = true;
  }
  uint64_t l1_entry = 0;
  QV_TRY(image_->read_l1(l1_offset_, l1_index, std::span(&l1_entry, 1)));
  cached_present_ = (l1_entry & ~entry_copied) != 0;
  if (cached_present_) {
    cached_l2_.resize(geometry.cluster_bytes());
    QV_TRY(image_->read_l2(l1_entry, cached_l2_));
    // Where the clusters lie in another file, nothing is read but the table.
    if ((image_->header().incompatible_features & incompatible::data_file) == 0) {
      QV_TRY(check_l2());
    }
  }
  cached_l1_index_ = static_cast<int64_t>(l1_index);
  return {};
}

/// From `offset` to the end of its cluster or subcluster (or, without an L2 table, of the span).
/// Precondition: load_l2(offset).
Result<ClusterReader::Run> ClusterReader::unit_at(GuestOffset offset) const {
  const Geometry &geometry = image_->geometry();
  const uint64_t in_span = offset.value % geometry.span_bytes();
  if (!cached_present_) {
    return Run{ClusterKind::unallocated, geometry.span_bytes() - in_span, HostOffset(0), 0};
  }
  const std::byte *stored =
      &cached_l2_[(in_span >> geometry.cluster_bits) * geometry.l2_entry_bytes()];
  const auto entry = load_be<uint64_t>(stored);
  const uint64_t bitmap = geometry.extended_l2 ? load_be<uint64_t>(stored + 8) : 0;
  QV_TRY(check_entry(*image_, entry, bitmap));

  const uint64_t in_cluster = in_span % geometry.cluster_bytes();
  ClusterKind kind = cluster_kind(entry, geometry);
  uint64_t unit_bytes = geometry.cluster_bytes();
  if (geometry.extended_l2 && kind != ClusterKind::compressed) {
    unit_bytes /= subclusters;
    kind = subcluster_kind(entry, bitmap, static_cast<uint32_t>(in_cluster / unit_bytes));
  }
  return Run{kind, unit_bytes - in_cluster % unit_bytes,
             HostOffset((entry & host_offset_mask) + in_cluster), entry};
}

/// From `offset` on, as far as the kind stays the same; with `in_one_piece`, data only as far as it
/// is contiguous in the file, and one compressed cluster.
Result<ClusterReader::Run> ClusterReader::merged_run_at(GuestOffset offset, uint64_t bytes_max,
                                                        bool in_one_piece) {
  QV_TRY(load_l2(offset));
  const uint64_t span_bytes = image_->geometry().span_bytes();
  const uint64_t bytes_to_span_end = span_bytes - offset.value % span_bytes;
  bytes_max = std::min(bytes_max, bytes_to_span_end);
  QV_ASSIGN(Run run, unit_at(offset));
  while (run.bytes < bytes_max && !(in_one_piece && run.kind == ClusterKind::compressed)) {
    QV_ASSIGN(const Run next, unit_at(offset + run.bytes));
    if (next.kind != run.kind ||
        (in_one_piece && run.kind == ClusterKind::data && next.host != run.host + run.bytes)) {
      break;
    }
    run.bytes += next.bytes;
  }
  run.bytes = std::min(run.bytes, bytes_max);
  return run;
}

Result<ClusterReader::Extent> ClusterReader::extent_at(GuestOffset offset) {
  QV_ASSIGN(const Run run, merged_run_at(offset, UINT64_MAX, false));
  return Extent{run.kind, run.bytes};
}

Result<void> ClusterReader::inflate_cluster(uint64_t entry) {
  if (inflated_entry_ == entry) {
    return {};
  }
  const CompressedRange range = compressed_range(entry, image_->geometry());
  std::vector<std::byte> stored(range.bytes);
  QV_TRY(image_->file().read_or_zero_at(stored, range.offset));
  inflated_entry_ = 0;
  inflated_.resize(image_->geometry().cluster_bytes());

  if (!expand_cluster(image_->header().compression_type, stored, inflated_)) {
    return bad_entry(*image_, entry, "is of a compressed cluster that does not inflate to one");
  }
  inflated_entry_ = entry;
  return {};
}

Result<ClusterReader::Run> ClusterReader::run_at(GuestOffset offset, uint64_t bytes_max) {
  QV_TRY(check_readable());
  return merged_run_at(offset, bytes_max, true);
}

Result<void> ClusterReader::check_readable() const {
  const Header &header = image_->header();
  if (header.crypt_method != 0) {
    return fail(ErrorCode::not_supported,
                image_->name() + ": is encrypted, and its contents cannot be read");
  }
  if (header.incompatible_features & incompatible::data_file) {
    return fail(ErrorCode::not_supported,
                image_->name() + ": keeps its data in an external file, which cannot be read");
  }
  return {};
}

Result<void> ClusterReader::read(GuestOffset offset, std::span<std::byte> to) {
  QV_TRY(check_readable());
  while (!to.empty()) {
    QV_ASSIGN(const Run run, merged_run_at(offset, to.size(), true));
    const auto part = to.first(run.bytes);
    switch (run.kind) {
      case ClusterKind::unallocated:
      case ClusterKind::zero:
      case ClusterKind::zero_allocated:
        std::fill(part.begin(), part.end(), std::byte{0});
        break;
      case ClusterKind::data:
        QV_TRY(image_->file().read_or_zero_at(part, run.host));
        break;
      case ClusterKind::compressed:
        QV_TRY(inflate_cluster(run.entry));
        std::memcpy(part.data(),
                    &inflated_[offset.value & (image_->geometry().cluster_bytes() - 1)],
                    part.size());
        break;
    }
    offset += run.bytes;
    to = to.subspan(run.bytes);
  }
  return {};
}

VmstateReader::VmstateReader(const Image &image, const Snapshot &snapshot)
    : reader_(image, snapshot.l1_offset, snapshot.l1_entries),
      image_name_(image.name()),
      snapshot_name_(snapshot.name),
      base_(0),
      mapped_bytes_(0) {
  // A disk size that overflows here has no room for a vmstate in any L1 table either.
  const Geometry &geometry = image.geometry();
  const uint64_t first_entry = geometry.vmstate_l1_index(snapshot.disk_bytes);
  if (first_entry < snapshot.l1_entries) {
    base_ = first_entry * geometry.span_bytes();
    mapped_bytes_ = (snapshot.l1_entries - first_entry) * geometry.span_bytes();
  }
}

uint64_t VmstateReader::mapped_bytes() const {
  return mapped_bytes_;
}

Result<GuestOffset> VmstateReader::locate(StreamOffset offset, uint64_t bytes) const {
  if (offset.value > mapped_bytes_ || bytes > mapped_bytes_ - offset.value) {
    return fail(ErrorCode::bad_stream,
                image_name_ + ": snapshot '" + snapshot_name_ + "': its VM state goes on at byte " +
                    std::to_string(offset.value) + ", past the " + std::to_string(mapped_bytes_) +
                    " bytes that it can have");
  }
  return GuestOffset(base_ + offset.value);
}

Result<void> VmstateReader::read(StreamOffset offset, std::span<std::byte> to) {
  QV_ASSIGN(const GuestOffset guest, locate(offset, to.size()));
  return reader_.read(guest, to);
}

Result<ClusterReader::Extent> VmstateReader::extent_at(StreamOffset offset) {
  QV_ASSIGN(const GuestOffset guest, locate(offset, 1));
  return reader_.extent_at(guest);
}

Result<ClusterReader::Run> VmstateReader::run_at(StreamOffset offset, uint64_t bytes_max) {
  QV_ASSIGN(const GuestOffset guest, locate(offset, bytes_max));
  return reader_.run_at(guest, bytes_max);
}

}  // namespace qvmstate::qcow2
