// The snapshot table: entries of snapshots, parsed and written back, unknown extra data included.
//
// Format: QEMU docs/interop/qcow2.txt, "Snapshots". Entries start at multiples of 8 bytes from the
// table's start.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "qcow2/io/endian.h"
#include "qcow2/io/offsets.h"
#include "qcow2/io/result.h"

namespace qvmstate::qcow2 {

struct RawSnapshot {
  Be64 l1_offset;      // 0
  Be32 l1_entries;     // 8
  Be16 id_bytes;       // 12
  Be16 name_bytes;     // 14
  Be32 date_seconds;   // 16
  Be32 date_nanos;     // 20
  Be64 clock_nanos;    // 24  VM clock
  Be32 vmstate_bytes;  // 32  0 if it needs 64 bits
  Be32 extra_bytes;    // 36
};
static_assert(sizeof(RawSnapshot) == 40);

constexpr uint64_t icount_none = UINT64_MAX;

struct Snapshot {
  std::string id;
  std::string name;
  HostOffset l1_offset;
  uint32_t l1_entries = 0;
  uint32_t date_seconds = 0;
  uint32_t date_nanos = 0;
  uint64_t clock_nanos = 0;
  uint64_t vmstate_bytes = 0;  ///< 0: disk only
  uint64_t disk_bytes = 0;     ///< the image's, where the extra data does not say
  uint64_t icount = icount_none;
  std::vector<std::byte> more_extra;  ///< extra data past the 24 known bytes, kept as it is
  uint32_t entry_extra_bytes = 0;     ///< all extra data, as the entry had it when it was read
};

/// Parses `count` entries; `image_name` is for messages. Refuses what limits.h forbids, tables that
/// end early, and lengths that point outside. Ids and names of any length up to 65535 are kept.
/// `disk_bytes` fills Snapshot::disk_bytes of entries without one.
Result<std::vector<Snapshot>> parse_snapshot_table(std::span<const std::byte> table, uint32_t count,
                                                   uint64_t disk_bytes,
                                                   std::string_view image_name);

/// The bytes of a table; every entry gets the 24 known extra bytes (64-bit size, disk size, icount)
/// and its more_extra.
Result<std::vector<std::byte>> format_snapshot_table(std::span<const Snapshot> snapshots);

/// Whether QEMU could save, load and delete a snapshot of this name: 1 to 255 bytes, no NUL, no
/// control bytes, not all digits, not equal to the id of another snapshot in `others`. Errors are
/// bad_argument and say which rule and why.
Result<void> check_snapshot_name(std::string_view name, std::span<const Snapshot> others);

/// The id for a new snapshot: one more than the largest decimal id, and further while a snapshot
/// bears that as its name.
std::string next_snapshot_id(std::span<const Snapshot> snapshots);

/// Index of the first snapshot of that name, or -1.
int find_snapshot(std::span<const Snapshot> snapshots, std::string_view name);

}  // namespace qvmstate::qcow2
