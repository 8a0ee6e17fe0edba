// The bytes of QEMU's legacy migration stream: type bytes, flags, limits.
//
// All integers are big-endian. Source of the facts: QEMU migration/savevm.c, migration/ram.c and
// docs/devel/migration.
#pragma once

#include <cstdint>

namespace qvmstate::vmstate {

constexpr uint32_t stream_magic = 0x5145564d;  // "QEVM"
constexpr uint32_t stream_version = 3;

// Type bytes.
constexpr uint8_t section_eof = 0x00;
constexpr uint8_t section_start = 0x01;  // u32 id, u8 len, idstr, u32 instance, u32 version, body
constexpr uint8_t section_part = 0x02;   // u32 id, body
constexpr uint8_t section_end = 0x03;    // u32 id, body
constexpr uint8_t section_full = 0x04;   // as START
constexpr uint8_t section_subsection = 0x05;     // u8 len, name, u32 version, fields
constexpr uint8_t section_vmdescription = 0x06;  // u32 length, JSON; after EOF
constexpr uint8_t section_configuration = 0x07;  // u32 len, machine type name; subsections
constexpr uint8_t section_command = 0x08;        // u16 command, u16 length, payload; no footer
constexpr uint8_t section_footer = 0x7e;         // u32 id; after each START, PART, END, FULL body

// Commands, with the length of their payload.
constexpr uint16_t command_open_return_path = 1;  // 0
constexpr uint16_t command_ping = 2;              // 4
constexpr uint16_t command_postcopy_advise = 3;   // 0, or u64 host page sizes, u64 target page size
constexpr uint16_t command_postcopy_listen = 4;   // 0
constexpr uint16_t command_postcopy_run = 5;      // 0
constexpr uint16_t command_postcopy_discard = 6;  // pages that come again
constexpr uint16_t command_packaged = 7;          // u32 bytes that follow: sections and commands
constexpr uint16_t command_switchover_start = 11;  // 0

// What a channel of a multifd migration begins with.
constexpr uint32_t multifd_magic = 0x11223344;

// RAM records: a u64 of page offset | flags.
constexpr uint64_t ram_zero = 0x002;
constexpr uint64_t ram_mem_size = 0x004;
constexpr uint64_t ram_page = 0x008;
constexpr uint64_t ram_eos = 0x010;
constexpr uint64_t ram_continue = 0x020;
constexpr uint64_t ram_xbzrle = 0x040;
constexpr uint64_t ram_hook = 0x080;
constexpr uint64_t ram_compress_page = 0x100;
constexpr uint64_t ram_multifd_flush = 0x200;

constexpr uint32_t ram_section_version = 4;
// PART and END are matched by the id that each handler remembers from its START, so the id of "ram"
// must not be the id of a device. Devices keep the small ids QEMU gave them.
constexpr uint32_t ram_section_id = 0x7fffffff;

// mapped-ram: in the block list, after each block's used length: u32 version, u64 page size, u64
// offset of the bitmap, u64 offset of the pages; the bitmap; at its offset the block's pages, page
// n at n * page size. Offsets count from the start of the file, or of the vmstate area. The bitmap
// is of 64-bit words of the host; on little-endian ones bit n % 8 of byte n / 8 says that page n is
// there. Source: QEMU docs/devel/migration/mapped-ram.rst, migration/ram.c.
constexpr uint32_t mapped_ram_version = 1;
constexpr uint64_t mapped_ram_header_bytes = 4 + 8 + 8 + 8;
constexpr uint64_t mapped_ram_alignment_bytes = uint64_t{1} << 20;  // of each block's pages
constexpr const char *mapped_ram_capability = "mapped-ram";
// Each block's address follows its length, and blocks in shared memory have no pages.
constexpr const char *ignore_shared_capability = "x-ignore-shared";

}  // namespace qvmstate::vmstate
