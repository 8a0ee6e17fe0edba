// Bounds on what is read from an image, each with its reason. QEMU refuses to open an image beyond
// the ones marked (QEMU); ours are no narrower, so every image QEMU opens is opened here.
//
// Together with them, no table is followed twice where the format has it once, and none that names
// more clusters than the file has: reading, checking, and editing an image takes work in proportion
// to its file, not to what its tables claim. For a file of 1 MiB that is at most 64 MiB of memory
// and 10 s of CPU time (tests/unit/qcow2/bounds_test).
#pragma once

#include <cstdint>

#include "qcow2/io/offsets.h"

namespace qvmstate::qcow2 {

constexpr uint32_t cluster_bits_min = 9;    // (QEMU) 512 bytes
constexpr uint32_t cluster_bits_max = 21;   // (QEMU) 2 MiB
constexpr uint32_t refcount_order_max = 6;  // format: 64-bit refcounts

constexpr uint64_t l1_bytes_max = 32 * mib;              // (QEMU) 4,194,304 entries
constexpr uint64_t refcount_table_bytes_max = 8 * mib;   // (QEMU) 1,048,576 blocks
constexpr uint64_t snapshots_max = 65536;                // (QEMU)
constexpr uint64_t snapshot_table_bytes_max = 64 * mib;  // (QEMU)
constexpr uint64_t snapshot_extra_bytes_max = 1024;      // (QEMU)
constexpr uint64_t backing_name_bytes_max = 1023;        // (QEMU)

// QEMU keeps ids and names in buffers of 128 and 256 bytes: longer ones are cut on listing and can
// then be neither loaded nor deleted.
constexpr uint64_t snapshot_id_bytes_max = 127;
constexpr uint64_t snapshot_name_bytes_max = 255;

// Persistent bitmaps: their directory, and the table of one.
constexpr uint64_t bitmap_directory_bytes_max = 64 * mib;  // (QEMU)
constexpr uint64_t bitmap_table_entries_max = 0x8000000;   // (QEMU)

// A check keeps 8 bytes a cluster: 4 GiB for 32 TiB at 64 KiB, and an index of 32 bits would do.
constexpr uint64_t checked_clusters_max = uint64_t{1} << 29;

// Bytes that the compressed clusters of one L2 table may expand to, for each byte of the file.
// Deflate makes at most 1032 of one. Zstandard makes more of a cluster that repeats one byte, but
// not even a disk full of such ones comes up to this with clusters of 64 KiB, because each takes an
// entry of 8 bytes and some 20 of data.
constexpr uint64_t expansion_max = 4096;

// Host offsets in L1 and L2 entries have bits 9 to 55.
constexpr uint64_t host_offset_mask = 0x00fffffffffffe00;

}  // namespace qvmstate::qcow2
