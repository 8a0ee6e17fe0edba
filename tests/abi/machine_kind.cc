#include "abi/machine_kind.h"

#include "abi/check.h"

namespace unicorn_host {
namespace {

/// `count` registers whose ids follow one another.
void add(std::vector<Register> &registers, const std::string &name, int first, int count,
         int first_number = 0) {
  for (int i = 0; i < count; ++i) {
    registers.push_back({name + std::to_string(first_number + i), first + i});
  }
}

MachineKind x86_64() {
  MachineKind kind = {"unicorn-x86_64",
                      UC_ARCH_X86,
                      UC_MODE_64,
                      4096,
                      {{"rax", UC_X86_REG_RAX},
                       {"rbx", UC_X86_REG_RBX},
                       {"rcx", UC_X86_REG_RCX},
                       {"rdx", UC_X86_REG_RDX},
                       {"rsi", UC_X86_REG_RSI},
                       {"rdi", UC_X86_REG_RDI},
                       {"rbp", UC_X86_REG_RBP},
                       {"rsp", UC_X86_REG_RSP},
                       {"rip", UC_X86_REG_RIP},
                       {"rflags", UC_X86_REG_RFLAGS},
                       {"mxcsr", UC_X86_REG_MXCSR}},
                      UC_X86_REG_RIP};
  add(kind.registers, "r", UC_X86_REG_R8, 8, 8);
  add(kind.registers, "xmm", UC_X86_REG_XMM0, 16);
  return kind;
}

MachineKind aarch64() {
  // Pages of 16 KiB, as some of these CPUs have: not all machines have those of 4 KiB.
  MachineKind kind = {"unicorn-aarch64",
                      UC_ARCH_ARM64,
                      UC_MODE_ARM,
                      16384,
                      {{"x29", UC_ARM64_REG_X29},
                       {"x30", UC_ARM64_REG_X30},
                       {"sp", UC_ARM64_REG_SP},
                       {"pc", UC_ARM64_REG_PC},
                       {"nzcv", UC_ARM64_REG_NZCV}},
                      UC_ARM64_REG_PC};
  add(kind.registers, "x", UC_ARM64_REG_X0, 29);
  add(kind.registers, "v", UC_ARM64_REG_V0, 32);
  return kind;
}

}  // namespace

MachineKind MachineKind::of(const std::string &name) {
  check(name == "x86_64" || name == "aarch64", "no machine '" + name + "'");
  return name == "x86_64" ? x86_64() : aarch64();
}

}  // namespace unicorn_host
