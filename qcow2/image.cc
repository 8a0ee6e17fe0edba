#include "qcow2/image.h"

#include <algorithm>
#include <cassert>
#include <cstdio>
#include <cstring>

#include "qcow2/entries.h"
#include "qcow2/limits.h"

namespace qvmstate::qcow2 {
namespace {

// Refcount table entries are host offsets of clusters; bits 0 to 8 are reserved.
constexpr uint64_t refcount_table_reserved_mask = ~host_offset_mask;

std::string hex(uint64_t value) {
  char text[19];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

Result<std::vector<uint64_t>> read_refcount_table(io::File &file, const Header &header) {
  const uint64_t table_bytes = uint64_t{header.refcount_table_clusters}
                               << header.geometry.cluster_bits;
  std::vector<uint64_t> table(table_bytes / 8);
  QV_TRY(file.read_at(std::as_writable_bytes(std::span(table)), header.refcount_table_offset));
  for (size_t i = 0; i < table.size(); ++i) {
    table[i] = native_to_be(table[i]);
    if ((table[i] & refcount_table_reserved_mask) != 0 || !header.geometry.aligned(table[i])) {
      return fail(ErrorCode::bad_image, file.name() + ": refcount table entry " +
                                            std::to_string(i) + " is not valid (" + hex(table[i]) +
                                            "): check the image with `qemu-img check`");
    }
  }
  return table;
}

/// The bytes of the snapshot table, whose length follows only from its entries.
Result<std::vector<std::byte>> read_snapshot_table(io::File &file, const Header &header,
                                                   uint64_t file_bytes) {
  constexpr uint64_t piece_bytes = 64 * kib;
  const uint64_t start = header.snapshot_table_offset.value;
  const uint64_t bytes_max =
      std::min(file_bytes - std::min(start, file_bytes), snapshot_table_bytes_max);
  std::vector<std::byte> table;
  const auto read_up_to = [&](uint64_t end) -> Result<void> {
    if (end <= table.size()) {
      return {};
    }
    if (end > bytes_max) {
      return fail(ErrorCode::bad_image,
                  file.name() + ": its snapshot table goes on past " +
                      (bytes_max == snapshot_table_bytes_max
                           ? std::to_string(bytes_max) + " bytes, the most that is valid"
                           : "the end of the file"));
    }
    const uint64_t have = table.size();
    table.resize(std::min(round_up(end, piece_bytes), bytes_max));
    return file.read_at(std::span(table).subspan(have), HostOffset(start + have));
  };

  uint64_t end = 0;
  for (uint32_t i = 0; i < header.snapshot_count; ++i) {
    const uint64_t entry = round_up(end, 8);
    QV_TRY(read_up_to(entry + sizeof(RawSnapshot)));
    RawSnapshot raw;
    std::memcpy(&raw, &table[entry], sizeof raw);
    // The parser refuses more extra data than this; until then it must not be read.
    const uint64_t extra_bytes = std::min<uint64_t>(raw.extra_bytes, snapshot_extra_bytes_max);
    end = entry + sizeof raw + extra_bytes + raw.id_bytes + raw.name_bytes;
    QV_TRY(read_up_to(end));
  }
  table.resize(end);
  return table;
}

Result<void> check_snapshot_l1(const std::string &name, const Geometry &geometry,
                               const Snapshot &snapshot, uint64_t file_bytes) {
  const auto bad = [&](const std::string &what) {
    return fail(ErrorCode::bad_image, name + ": snapshot '" + snapshot.name.substr(0, 64) +
                                          "' (id " + snapshot.id.substr(0, 64) +
                                          "): its L1 table " + what +
                                          ": check the image with `qemu-img check`");
  };
  const uint64_t bytes = uint64_t{snapshot.l1_entries} * 8;
  if (bytes > l1_bytes_max) {
    return bad("of " + std::to_string(bytes) + " bytes is larger than the " +
               std::to_string(l1_bytes_max) + " bytes that are valid");
  }
  if (!geometry.aligned(snapshot.l1_offset.value)) {
    return bad("at offset " + std::to_string(snapshot.l1_offset.value) +
               " does not start at a cluster");
  }
  if (bytes > file_bytes || snapshot.l1_offset.value > file_bytes - bytes) {
    return bad("at offset " + std::to_string(snapshot.l1_offset.value) +
               " ends past the end of the file");
  }
  return {};
}

}  // namespace

Result<Image> Image::open(io::File &file) {
  Image image;
  image.file_ = &file;
  QV_TRY(image.reload());
  return image;
}

Result<void> Image::reload() {
  QV_ASSIGN(Header header, read_header(*file_));
  QV_ASSIGN(const uint64_t file_bytes, file_->size());
  QV_ASSIGN(std::vector<uint64_t> refcount_table, read_refcount_table(*file_, header));
  std::vector<std::byte> table;
  if (header.snapshot_count > 0) {
    QV_ASSIGN(table, read_snapshot_table(*file_, header, file_bytes));
  }
  QV_ASSIGN(std::vector<Snapshot> snapshots,
            parse_snapshot_table(table, header.snapshot_count, header.disk_bytes, file_->name()));
  for (const Snapshot &snapshot : snapshots) {
    QV_TRY(check_snapshot_l1(file_->name(), header.geometry, snapshot, file_bytes));
  }
  header_ = std::move(header);
  refcount_table_ = std::move(refcount_table);
  snapshots_ = std::move(snapshots);
  snapshot_table_bytes_ = table.size();
  return {};
}

Result<void> Image::read_l1(HostOffset l1_offset, uint64_t first, std::span<uint64_t> to) const {
  assert(first + to.size() <= l1_bytes_max / 8);
  QV_TRY(file_->read_at(std::as_writable_bytes(to), l1_offset + first * 8));
  for (uint64_t &entry : to) {
    entry = native_to_be(entry);
  }
  return {};
}

Result<void> Image::read_l2(uint64_t l1_entry, std::span<std::byte> to) const {
  assert(to.size() == geometry().cluster_bytes());
  const uint64_t offset = l1_entry & host_offset_mask;
  if ((l1_entry & l1_reserved_mask) != 0 || offset == 0 || !geometry().aligned(offset)) {
    return fail(ErrorCode::bad_image, name() + ": L1 table entry " + hex(l1_entry) +
                                          " is not valid: check the image with `qemu-img check`");
  }
  QV_ASSIGN(const uint64_t file_bytes, file_->size());
  if (offset >= file_bytes) {
    return fail(ErrorCode::bad_image, name() + ": an L2 table is at offset " +
                                          std::to_string(offset) + ", but the file has only " +
                                          std::to_string(file_bytes) + " bytes: it was cut short");
  }
  return file_->read_or_zero_at(to, HostOffset(offset));
}

}  // namespace qvmstate::qcow2
