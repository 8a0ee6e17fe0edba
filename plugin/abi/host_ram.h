// The RAM blocks of the host, and their memory as a source of pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "plugin/abi/failure.h"
#include "plugin/qvmstate.h"
#include "vmstate/ram_source.h"

namespace qvmstate::abi {

struct HostBlock {
  std::string name;
  std::byte *address = nullptr;
  uint64_t bytes = 0;
  uint64_t page_bytes = 0;  ///< host page
};

/// Takes what the host says of a block, if its name, place and size can be; of a guest with pages
/// of `guest_page_bytes`. Refuses a name that one of `others` has, and memory that is not mapped.
Outcome<HostBlock> take_block(const qvmstate_ram_block &given, uint64_t guest_page_bytes,
                              std::span<const HostBlock> others);

std::vector<vmstate::RamBlock> ram_blocks(std::span<const HostBlock> blocks);

/// Looks anew at which pages were ever touched; a source must not be used for longer than that
/// holds. Where the system does not tell (no /proc), all count as touched.
Result<std::unique_ptr<vmstate::RamSource>> open_host_ram(std::span<const HostBlock> blocks);

/// Bytes of all blocks that may hold data.
Result<uint64_t> touched_bytes(vmstate::RamSource &source);

}  // namespace qvmstate::abi
