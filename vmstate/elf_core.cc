#include "vmstate/elf_core.h"

#include <elf.h>

#include <bit>
#include <cassert>
#include <cstring>
#include <string_view>
#include <type_traits>

namespace qvmstate::vmstate {
namespace {

static_assert(std::endian::native == std::endian::little);  // structures below are written as is

struct X86Registers {
  uint64_t r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax, rip,
      cs, rflags, rsp, ss, fs_base, gs_base, ds, es, fs, gs;
};
/// Of 32-bit CPUs; selectors have 16 bits and 16 of padding.
struct I386Registers {
  uint32_t ebx, ecx, edx, esi, edi, ebp, eax, ds, es, fs, gs, orig_eax, eip, cs, eflags, esp, ss;
};
struct ArmRegisters {
  uint64_t x[31], sp, pc, pstate;
};

/// struct elf_prstatus of Linux on 64-bit machines; what QEMU does not fill in is 0.
template <class Registers>
struct Prstatus {
  std::byte before_pid[32] = {};
  uint32_t pid = 0;
  std::byte before_registers[76] = {};
  Registers registers = {};
  uint32_t fp_valid = 0;
  uint32_t padding = 0;
};
static_assert(sizeof(Prstatus<X86Registers>) == 336);
static_assert(sizeof(Prstatus<ArmRegisters>) == 392);

/// The same of 32-bit x86.
struct I386Prstatus {
  std::byte before_pid[24] = {};
  uint32_t pid = 0;
  std::byte before_registers[44] = {};
  I386Registers registers = {};
  uint32_t fp_valid = 0;
};
static_assert(sizeof(I386Prstatus) == 144);

struct QemuSegment {
  uint32_t selector, limit, flags, padding;
  uint64_t base;
};
/// The note "QEMU", version 1.
struct QemuState {
  uint32_t version, bytes;
  uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8_to_r15[8], rip, rflags;
  QemuSegment cs, ds, es, fs, gs, ss, ldt, tr, gdt, idt;
  uint64_t control[5];
  uint64_t kernel_gs_base;
};
static_assert(sizeof(QemuState) == 440);

// X86Cpu::registers and segments.
enum : size_t { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 };
enum : size_t { es, cs, ss, ds, fs, gs };
constexpr uint32_t selector_mask = 0xffff;

template <class T>
void append(std::vector<std::byte> &out, const T &value) {
  static_assert(std::has_unique_object_representations_v<T>);
  const auto *const bytes = reinterpret_cast<const std::byte *>(&value);
  out.insert(out.end(), bytes, bytes + sizeof value);
}

template <class T>
void append_note(std::vector<std::byte> &out, std::string_view owner, uint32_t type,
                 const T &contents) {
  constexpr size_t name_bytes = 8;  // "CORE" or "QEMU" with its NUL, in words of four
  static_assert(sizeof contents % 4 == 0);
  append(out, Elf64_Nhdr{static_cast<uint32_t>(owner.size() + 1), sizeof contents, type});
  std::byte name[name_bytes] = {};
  assert(owner.size() < name_bytes);
  std::memcpy(name, owner.data(), owner.size());
  append(out, name);
  append(out, contents);
}

Prstatus<X86Registers> prstatus(const X86Cpu &cpu) {
  Prstatus<X86Registers> status;
  const auto &r = cpu.registers;
  const auto &s = cpu.segments;
  status.registers = {
      r[15],          r[14],          r[13],          r[12],      r[rbp],     r[rbx],
      r[11],          r[10],          r[9],           r[8],       r[rax],     r[rcx],
      r[rdx],         r[rsi],         r[rdi],         0,          cpu.rip,    s[cs].selector,
      cpu.rflags,     r[rsp],         s[ss].selector, s[fs].base, s[gs].base, s[ds].selector,
      s[es].selector, s[fs].selector, s[gs].selector};
  return status;
}

I386Prstatus i386_prstatus(const X86Cpu &cpu) {
  I386Prstatus status;
  const auto low = [&cpu](size_t number) { return static_cast<uint32_t>(cpu.registers[number]); };
  const auto &s = cpu.segments;
  status.registers = {low(rbx),
                      low(rcx),
                      low(rdx),
                      low(rsi),
                      low(rdi),
                      low(rbp),
                      low(rax),
                      s[ds].selector & selector_mask,
                      s[es].selector & selector_mask,
                      s[fs].selector & selector_mask,
                      s[gs].selector & selector_mask,
                      0,
                      static_cast<uint32_t>(cpu.rip),
                      s[cs].selector & selector_mask,
                      static_cast<uint32_t>(cpu.rflags),
                      low(rsp),
                      s[ss].selector & selector_mask};
  return status;
}

Prstatus<ArmRegisters> prstatus(const ArmCpu &cpu) {
  Prstatus<ArmRegisters> status;
  std::memcpy(status.registers.x, cpu.x.data(), sizeof status.registers.x);
  status.registers.sp = cpu.x[31];
  status.registers.pc = cpu.pc;
  status.registers.pstate = cpu.pstate;
  return status;
}

QemuState qemu_state(const X86Cpu &cpu) {
  const auto segment = [](const X86Segment &from) {
    return QemuSegment{from.selector, from.limit, from.flags, 0, from.base};
  };
  const auto &r = cpu.registers;
  const auto &s = cpu.segments;
  QemuState state = {};
  state.version = 1;
  state.bytes = sizeof state;
  state.rax = r[rax];
  state.rbx = r[rbx];
  state.rcx = r[rcx];
  state.rdx = r[rdx];
  state.rsi = r[rsi];
  state.rdi = r[rdi];
  state.rsp = r[rsp];
  state.rbp = r[rbp];
  std::memcpy(state.r8_to_r15, &r[r8], sizeof state.r8_to_r15);
  state.rip = cpu.rip;
  state.rflags = cpu.rflags;
  state.cs = segment(s[cs]);
  state.ds = segment(s[ds]);
  state.es = segment(s[es]);
  state.fs = segment(s[fs]);
  state.gs = segment(s[gs]);
  state.ss = segment(s[ss]);
  state.ldt = segment(cpu.ldt);
  state.tr = segment(cpu.tr);
  state.gdt = segment(cpu.gdt);
  state.idt = segment(cpu.idt);
  std::memcpy(state.control, cpu.control.data(), sizeof state.control);
  state.kernel_gs_base = cpu.kernel_gs_base;
  return state;
}

Elf64_Half machine_of(const CpuState &cpu) {
  const auto *const x86 = std::get_if<X86Cpu>(&cpu.registers);
  return x86 == nullptr ? EM_AARCH64 : x86->in_long_mode ? EM_X86_64 : EM_386;
}

void append_prstatus(std::vector<std::byte> &notes, auto status, uint32_t index) {
  status.pid = index + 1;
  append_note(notes, "CORE", NT_PRSTATUS, status);
}

/// First the registers of all CPUs, then the notes "QEMU" of all.
std::vector<std::byte> format_notes(std::span<const CpuState> cpus, Elf64_Half machine) {
  std::vector<std::byte> notes;
  for (const CpuState &cpu : cpus) {
    if (const auto *const x86 = std::get_if<X86Cpu>(&cpu.registers);
        x86 != nullptr && machine == EM_386) {
      append_prstatus(notes, i386_prstatus(*x86), cpu.index);
    } else {
      std::visit(
          [&](const auto &registers) { append_prstatus(notes, prstatus(registers), cpu.index); },
          cpu.registers);
    }
  }
  for (const CpuState &cpu : cpus) {
    if (const auto *const registers = std::get_if<X86Cpu>(&cpu.registers)) {
      append_note(notes, "QEMU", 0, qemu_state(*registers));
    }
  }
  return notes;
}

struct Elf32 {
  using Header = Elf32_Ehdr;
  using ProgramHeader = Elf32_Phdr;
  using Word = uint32_t;
  static constexpr unsigned char file_class = ELFCLASS32;
};
struct Elf64 {
  using Header = Elf64_Ehdr;
  using ProgramHeader = Elf64_Phdr;
  using Word = uint64_t;
  static constexpr unsigned char file_class = ELFCLASS64;
};

/// In a class whose words have room for all of it.
template <class Elf>
std::vector<std::byte> format_headers(Elf64_Half machine, std::span<const RamPiece> pieces,
                                      uint64_t notes_bytes) {
  using Word = typename Elf::Word;
  typename Elf::Header header = {};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_ident[EI_CLASS] = Elf::file_class;
  header.e_ident[EI_DATA] = ELFDATA2LSB;
  header.e_ident[EI_VERSION] = EV_CURRENT;
  header.e_type = ET_CORE;
  header.e_machine = machine;
  header.e_version = EV_CURRENT;
  header.e_phoff = sizeof header;
  header.e_ehsize = sizeof header;
  header.e_phentsize = sizeof(typename Elf::ProgramHeader);
  header.e_phnum = static_cast<uint16_t>(pieces.size() + 1);

  std::vector<std::byte> head;
  append(head, header);
  const auto append_segment = [&head](uint32_t type, uint32_t flags, uint64_t offset,
                                      uint64_t address, uint64_t bytes) {
    typename Elf::ProgramHeader segment = {};
    segment.p_type = type;
    segment.p_flags = flags;
    segment.p_offset = static_cast<Word>(offset);
    segment.p_vaddr = static_cast<Word>(address);
    segment.p_paddr = static_cast<Word>(address);
    segment.p_filesz = static_cast<Word>(bytes);
    segment.p_memsz = static_cast<Word>(bytes);
    append(head, segment);
  };
  append_segment(PT_NOTE, 0, sizeof header + (pieces.size() + 1) * header.e_phentsize, 0,
                 notes_bytes);
  uint64_t offset = elf_head_bytes;
  for (const RamPiece &piece : pieces) {
    append_segment(PT_LOAD, PF_R | PF_W | PF_X, offset, piece.address, piece.bytes);
    offset += piece.bytes;
  }
  return head;
}

bool fits_32_bits(std::span<const RamPiece> pieces) {
  uint64_t end = elf_head_bytes;
  for (const RamPiece &piece : pieces) {
    end += piece.bytes;
    if (piece.address + piece.bytes > UINT32_MAX) {
      return false;
    }
  }
  return end <= UINT32_MAX;
}

}  // namespace

Result<std::vector<std::byte>> format_elf_head(std::span<const RamPiece> pieces,
                                               std::span<const CpuState> cpus) {
  assert(!cpus.empty());
  const Elf64_Half machine = machine_of(cpus[0]);
  const std::vector<std::byte> notes = format_notes(cpus, machine);
  const uint64_t headers_bytes_max = sizeof(Elf64_Ehdr) + (pieces.size() + 1) * sizeof(Elf64_Phdr);
  if (pieces.size() + 1 >= PN_XNUM || headers_bytes_max + notes.size() > elf_head_bytes) {
    return fail(ErrorCode::not_supported,
                std::to_string(cpus.size()) + " CPUs and " + std::to_string(pieces.size()) +
                    " pieces of memory are more than the head of the core has room for");
  }
  std::vector<std::byte> head = machine == EM_386 && fits_32_bits(pieces)
                                    ? format_headers<Elf32>(machine, pieces, notes.size())
                                    : format_headers<Elf64>(machine, pieces, notes.size());
  head.insert(head.end(), notes.begin(), notes.end());
  return head;
}

}  // namespace qvmstate::vmstate
