// An open qcow2 image: its header, refcount table and snapshot table, as read when it was opened.
//
// Reading only. What changes an image is commit.h, which after its header write calls reload().
//
// Threads: one at a time. The File must outlive the Image.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "qcow2/header.h"
#include "qcow2/io/file.h"
#include "qcow2/io/result.h"
#include "qcow2/snapshot_table.h"

namespace qvmstate::qcow2 {

class Image {
 public:
  static Result<Image> open(io::File &file);
  Result<void> reload();

  io::File &file() const { return *file_; }
  const std::string &name() const { return file_->name(); }
  const Header &header() const { return header_; }
  const Geometry &geometry() const { return header_.geometry; }
  const std::vector<Snapshot> &snapshots() const { return snapshots_; }
  uint64_t snapshot_table_bytes() const { return snapshot_table_bytes_; }
  /// Host offsets of refcount blocks; 0 where a block is absent (all its counts are 0).
  const std::vector<uint64_t> &refcount_table() const { return refcount_table_; }

  /// L1 entries [first, first + to.size()) of a table at `l1_offset`, in native order.
  Result<void> read_l1(HostOffset l1_offset, uint64_t first, std::span<uint64_t> to) const;
  /// One L2 table, raw big-endian bytes, `to` is one cluster. `l1_entry` is validated: reserved
  /// bits, alignment.
  Result<void> read_l2(uint64_t l1_entry, std::span<std::byte> to) const;

 private:
  io::File *file_ = nullptr;
  Header header_;
  std::vector<uint64_t> refcount_table_;
  std::vector<Snapshot> snapshots_;
  uint64_t snapshot_table_bytes_ = 0;
};

}  // namespace qvmstate::qcow2
