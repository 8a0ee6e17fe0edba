// Memory of this process that tests take for guest RAM.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "plugin/qemu/ram_blocks.h"
#include "qcow2/io/offsets.h"

namespace qvmstate::qemu::test {

constexpr size_t page = 4096;
constexpr size_t huge_page = 2 * mib;

struct Memory {
  Memory(size_t bytes, bool huge, bool shared = false) : size(bytes) {
    const int flags = (shared ? MAP_SHARED : MAP_PRIVATE) | MAP_ANONYMOUS;
    data = static_cast<std::byte *>(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0));
    if (data == MAP_FAILED) {
      std::abort();
    }
    ::madvise(data, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  }
  ~Memory() { ::munmap(data, size); }
  HostRamBlock block(const std::string &name) const {
    return {{name, size, page}, reinterpret_cast<uint64_t>(data)};
  }
  std::byte *data;
  size_t size;
};

}  // namespace qvmstate::qemu::test
