// The qcow2 header: its bytes, and what this program makes of them.
//
// Format: QEMU docs/interop/qcow2.txt, "Header" and "Header extensions".
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "qcow2/geometry.h"
#include "qcow2/io/endian.h"
#include "qcow2/io/file.h"
#include "qcow2/io/result.h"

namespace qvmstate::qcow2 {

struct RawHeader {
  Be32 magic;                    // 0   "QFI\xfb"
  Be32 version;                  // 4   2 or 3
  Be64 backing_name_offset;      // 8
  Be32 backing_name_bytes;       // 16
  Be32 cluster_bits;             // 20
  Be64 disk_bytes;               // 24
  Be32 crypt_method;             // 32  0 none, 1 AES, 2 LUKS
  Be32 l1_entries;               // 36  -- from here to byte 71 one write switches everything
  Be64 l1_offset;                // 40
  Be64 refcount_table_offset;    // 48
  Be32 refcount_table_clusters;  // 56
  Be32 snapshot_count;           // 60
  Be64 snapshot_table_offset;    // 64  -- 71
  Be64 incompatible_features;    // 72  from here on version 3 only
  Be64 compatible_features;      // 80
  Be64 autoclear_features;       // 88
  Be32 refcount_order;           // 96
  Be32 header_bytes;             // 100
  uint8_t compression_type;      // 104 only if header_bytes > 104
  uint8_t padding[7];            // 105
};
static_assert(sizeof(RawHeader) == 112);
static_assert(offsetof(RawHeader, l1_entries) == 36);
static_assert(offsetof(RawHeader, snapshot_table_offset) == 64);
static_assert(offsetof(RawHeader, header_bytes) == 100);

constexpr uint32_t header_magic = 0x514649fb;

// The range that the commit writes (commit.h).
constexpr uint64_t switch_offset = 36;
constexpr uint64_t switch_bytes = 36;

namespace incompatible {
constexpr uint64_t dirty = 1, corrupt = 2, data_file = 4, compression = 8, extended_l2 = 16;
}
namespace compatible {
constexpr uint64_t lazy_refcounts = 1;
}
namespace autoclear {
constexpr uint64_t bitmaps = 1, raw_data_file = 2;
}

struct HeaderExtension {
  uint32_t type = 0;
  std::vector<std::byte> data;
};
constexpr uint32_t extension_bitmaps = 0x23852875;
constexpr uint32_t extension_data_file = 0x44415441;
constexpr uint32_t extension_luks = 0x0537be77;

struct Header {
  uint32_t version = 3;
  Geometry geometry;
  uint64_t disk_bytes = 0;
  uint32_t crypt_method = 0;
  uint32_t l1_entries = 0;
  HostOffset l1_offset;
  HostOffset refcount_table_offset;
  uint32_t refcount_table_clusters = 0;
  uint32_t snapshot_count = 0;
  HostOffset snapshot_table_offset;
  uint64_t incompatible_features = 0;
  uint64_t compatible_features = 0;
  uint64_t autoclear_features = 0;
  uint32_t header_bytes = 72;
  uint8_t compression_type = 0;
  std::string backing_name;
  std::vector<HeaderExtension> extensions;

  const HeaderExtension *extension(uint32_t type) const;
  /// Bitmaps named by the bitmaps extension; 0 without one.
  uint32_t persistent_bitmaps() const;
};

/// Reads and validates the header of `file`: magic, version, every bound of limits.h, alignment and
/// size of all tables. Never trusts a length. Errors are bad_image ("not a qcow2 image" for another
/// magic) or not_supported (unknown incompatible bits, by number), and name the file.
Result<Header> read_header(io::File &file);

}  // namespace qvmstate::qcow2
