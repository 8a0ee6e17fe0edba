// What differs between the machines of the host: the CPU, its registers and the guest page size.
#pragma once

#include <unicorn/unicorn.h>

#include <cstdint>
#include <string>
#include <vector>

namespace unicorn_host {

struct Register {
  std::string name;
  int id;
};

struct MachineKind {
  std::string name;
  uc_arch arch;
  uc_mode mode;
  uint32_t page_bytes;
  std::vector<Register> registers;  ///< all that the guest's program depends on
  int program_counter;

  /// By "x86_64" or "aarch64".
  static MachineKind of(const std::string &name);
};

}  // namespace unicorn_host
