#include "plugin/abi/host_ram.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <utility>

#include "plugin/qemu/inprocess_source.h"
#include "qcow2/io/offsets.h"
#include "vmstate/section_scan.h"

namespace qvmstate::abi {
namespace {

constexpr uint64_t host_page_bytes_min = 4096;
constexpr uint64_t mapped_check_bytes = 256 * mib;  // at a time: a byte for each page

/// mincore() tells of all pages, but of nothing if one is not mapped.
bool is_mapped(const std::byte *address, uint64_t bytes) {
  std::vector<unsigned char> pages(std::min(bytes, mapped_check_bytes) / host_page_bytes_min);
  for (uint64_t done = 0; done < bytes; done += mapped_check_bytes) {
    const uint64_t part = std::min(mapped_check_bytes, bytes - done);
    if (::mincore(const_cast<std::byte *>(address + done), part, pages.data()) != 0 &&
        errno == ENOMEM) {
      return false;
    }
  }
  return true;
}

/// All pages count as touched.
class PlainRam : public vmstate::RamSource {
 public:
  explicit PlainRam(std::span<const HostBlock> blocks)
      : host_(blocks.begin(), blocks.end()), blocks_(ram_blocks(blocks)) {}

  std::span<const vmstate::RamBlock> blocks() const override { return blocks_; }
  const std::byte *view(size_t block) const override { return host_[block].address; }
  Result<Presence> presence(size_t block, uint64_t offset) override {
    return Presence{true, host_[block].bytes - offset};
  }
  Result<void> read_pages(size_t block, uint64_t offset, size_t count, size_t page_bytes,
                          std::byte *to, size_t stride) override {
    for (size_t i = 0; i < count; ++i) {
      std::memcpy(to + i * stride, host_[block].address + offset + i * page_bytes, page_bytes);
    }
    return {};
  }

 private:
  std::vector<HostBlock> host_;
  std::vector<vmstate::RamBlock> blocks_;
};

}  // namespace

Outcome<HostBlock> take_block(const qvmstate_ram_block &given, uint64_t guest_page_bytes,
                              std::span<const HostBlock> others) {
  if (given.name == nullptr || given.name[0] == '\0' ||
      ::strnlen(given.name, vmstate::section_idstr_bytes_max + 1) >
          vmstate::section_idstr_bytes_max) {
    return refuse(QVMSTATE_BAD_ARGUMENT, "RAM block: its name must have 1 to 255 bytes");
  }
  HostBlock block = {given.name, static_cast<std::byte *>(given.address), given.bytes,
                     given.host_page_bytes == 0 ? host_page_bytes_min : given.host_page_bytes};
  const auto wrong = [&](const std::string &what) {
    return refuse(QVMSTATE_BAD_ARGUMENT, "RAM block '" + block.name + "': " + what);
  };
  if (std::ranges::any_of(others,
                          [&](const HostBlock &other) { return other.name == block.name; })) {
    return wrong("there is a block of this name already");
  }
  if (!std::has_single_bit(block.page_bytes) || block.page_bytes < host_page_bytes_min) {
    return wrong("its page size of " + std::to_string(block.page_bytes) +
                 " bytes is not a power of two from 4096 on");
  }
  const auto address = reinterpret_cast<uintptr_t>(block.address);
  if (address == 0 || address % block.page_bytes != 0) {
    return wrong("its address is NULL or no multiple of its page size of " +
                 std::to_string(block.page_bytes) + " bytes; allocate it with mmap");
  }
  if (block.bytes == 0 || block.bytes % guest_page_bytes != 0 ||
      block.bytes > UINTPTR_MAX - address) {
    return wrong("its size of " + std::to_string(block.bytes) +
                 " bytes is 0 or no multiple of the guest page size of " +
                 std::to_string(guest_page_bytes) + " bytes");
  }
  if (!is_mapped(block.address, block.bytes)) {
    return wrong("not all of its memory is mapped");
  }
  return block;
}

std::vector<vmstate::RamBlock> ram_blocks(std::span<const HostBlock> blocks) {
  std::vector<vmstate::RamBlock> list;
  for (const HostBlock &block : blocks) {
    list.push_back({block.name, block.bytes, block.page_bytes});
  }
  return list;
}

Result<std::unique_ptr<vmstate::RamSource>> open_host_ram(std::span<const HostBlock> blocks) {
  std::vector<qemu::HostRamBlock> known;
  for (const HostBlock &block : blocks) {
    known.push_back(
        {{block.name, block.bytes, block.page_bytes}, reinterpret_cast<uintptr_t>(block.address)});
  }
  if (auto source = qemu::InProcessSource::open(std::move(known))) {
    return std::unique_ptr<vmstate::RamSource>(std::move(*source));
  }
  return std::unique_ptr<vmstate::RamSource>(std::make_unique<PlainRam>(blocks));
}

Result<uint64_t> touched_bytes(vmstate::RamSource &source) {
  uint64_t touched = 0;
  for (size_t block = 0; block < source.blocks().size(); ++block) {
    for (uint64_t at = 0; at < source.blocks()[block].used_bytes;) {
      QV_ASSIGN(const auto presence, source.presence(block, at));
      touched += presence.touched ? presence.bytes : 0;
      at += presence.bytes;
    }
  }
  return touched;
}

}  // namespace qvmstate::abi
