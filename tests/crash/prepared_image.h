// The images that the crash tests start from, made by qemu-img, with contents that tell
// generations apart.
#pragma once

#include <cstdint>
#include <string>

#include "unit/qcow2/edit_helpers.h"

namespace qvmstate::qcow2::test {

struct PreparedKind {
  uint32_t version;
  uint64_t cluster_bytes;
  bool backing_file;
  bool extended_l2 = false;
  bool bitmap = false;  ///< a persistent dirty bitmap, version 3 only
};

std::string kind_name(const PreparedKind &kind);
uint64_t disk_bytes_of(const PreparedKind &kind);

/// Whether QEMU finds the bitmap of create_image() there, and not left open by a writer.
bool has_good_bitmap(const std::string &path);

/// Throws with the output of a command that failed.
void must(const CommandResult &result);
/// Writes part of the disk so that it differs from every other generation's.
void write_generation(const std::string &path, const PreparedKind &kind, int generation);
/// An image with generation 0 of the disk, in a folder of its own or beside others.
void create_image(const std::string &path, const PreparedKind &kind);

}  // namespace qvmstate::qcow2::test
