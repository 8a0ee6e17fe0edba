// The head of an ELF core of guest-physical memory: program headers and the notes of the CPUs, as
// QEMU's dump-guest-memory writes them.
//
// What differs from QEMU's: the notes have a fixed room, so that memory can be written before the
// CPUs are known (a stream tells them last); the virtual addresses of PT_LOAD are the physical
// ones, so that gdb reads memory by them; aarch64 has no floating-point registers.
// As in QEMU's, x86 CPUs are 32-bit ones if the first of them is not in long mode, and the file is
// a 64-bit one if 32 bits do not tell where memory lies. Source of the facts: the System V ABI,
// Linux <elf.h>, QEMU target/i386/arch_dump.c and target/arm/arch_dump.c (NT_PRSTATUS, and the note
// "QEMU" of x86).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "qcow2/io/offsets.h"
#include "qcow2/io/result.h"
#include "vmstate/cpu_state.h"
#include "vmstate/ram_map.h"

namespace qvmstate::vmstate {

/// Memory begins here in the file: room for 4096 CPUs, as many as QEMU has.
constexpr uint64_t elf_head_bytes = 4 * mib;

/// Memory follows in the file piece after piece, from elf_head_bytes on.
Result<std::vector<std::byte>> format_elf_head(std::span<const RamPiece> pieces,
                                               std::span<const CpuState> cpus);

}  // namespace qvmstate::vmstate
