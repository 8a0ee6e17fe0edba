// The registers of the CPUs of a stream, as far as the notes of an ELF core tell them.
//
// Threads: one at a time uses the source.
#pragma once

#include <array>
#include <cstdint>
#include <variant>
#include <vector>

#include "qcow2/io/result.h"
#include "vmstate/stream_reader.h"

namespace qvmstate::vmstate {

struct X86Segment {
  uint32_t selector = 0;
  uint32_t limit = 0;
  uint32_t flags = 0;
  uint64_t base = 0;
};

struct X86Cpu {
  std::array<uint64_t, 16> registers = {};  ///< rax rcx rdx rbx rsp rbp rsi rdi r8 ... r15
  uint64_t rip = 0;
  uint64_t rflags = 0;
  std::array<X86Segment, 6> segments;  ///< es cs ss ds fs gs
  X86Segment ldt, tr, gdt, idt;
  std::array<uint64_t, 5> control = {};  ///< cr1 is always 0
  uint64_t kernel_gs_base = 0;
  bool in_long_mode = false;  ///< otherwise it is a 32-bit CPU for now
};

struct ArmCpu {
  std::array<uint64_t, 32> x = {};  ///< the last is the stack pointer
  uint64_t pc = 0;
  uint64_t pstate = 0;
};

struct CpuState {
  uint32_t index = 0;  ///< QEMU's number of the CPU
  std::variant<X86Cpu, ArmCpu> registers;
};

/// In the order of the stream. not_supported: the machine is none of x86-64 and aarch64, or its
/// section "cpu" is of an unknown kind.
Result<std::vector<CpuState>> read_cpus(StreamSource &source, const StreamSummary &stream);

}  // namespace qvmstate::vmstate
