#include "abi/ram.h"

#include <sys/mman.h>

#include <cstring>
#include <fstream>
#include <utility>

#include "abi/check.h"

namespace unicorn_host {
namespace {

constexpr uint64_t word_bits = 64;
constexpr uint64_t words_per_mib = (1 << 20) / sizeof(uint64_t);

uint8_t *map(uint64_t bytes) {
  void *const data =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  check(data != MAP_FAILED, "mmap");
  return static_cast<uint8_t *>(data);
}

}  // namespace

void RamBlock::Unmap::operator()(uint8_t *data) const {
  ::munmap(data, bytes);
}

RamBlock::RamBlock(std::string name, uint64_t address, uint64_t bytes, uint64_t page_bytes)
    : name_(std::move(name)),
      address_(address),
      bytes_(bytes),
      page_bytes_(page_bytes),
      data_(map(bytes), Unmap{bytes}),
      dirty_((bytes / page_bytes + word_bits - 1) / word_bits) {}

void RamBlock::fill(uint64_t seed) {
  uint64_t random = seed;
  for (uint64_t i = 0; i < bytes_ / sizeof random; ++i) {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    const uint64_t kind = i / words_per_mib % 4;
    const uint64_t word = kind == 0 ? random : (kind == 1 ? 0x2074786574206120 + i % 8 : 0);
    if (word != 0) {
      std::memcpy(data() + i * sizeof word, &word, sizeof word);
    }
  }
}

uint64_t RamBlock::hash() const {
  uint64_t hash = 0xcbf29ce484222325;
  for (uint64_t at = 0; at < bytes_; at += sizeof hash) {
    uint64_t word = 0;
    std::memcpy(&word, data() + at, sizeof word);
    hash = (hash ^ word) * 0x100000001b3;
    hash ^= hash >> 29;
  }
  return hash;
}

void RamBlock::write_to(const std::string &path) const {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char *>(data()), static_cast<std::streamsize>(bytes_));
  file.close();
  check(file.good(), "cannot write " + path);
}

void RamBlock::note_write(uint64_t address, uint64_t bytes) {
  if (address < address_ || address - address_ >= bytes_) {
    return;
  }
  const uint64_t first = (address - address_) / page_bytes_;
  const uint64_t last = (address - address_ + bytes - 1) / page_bytes_;
  for (uint64_t page = first; page <= last && page < bytes_ / page_bytes_; ++page) {
    dirty_[page / word_bits] |= uint64_t{1} << (page % word_bits);
  }
}

std::vector<uint64_t> RamBlock::take_dirty() {
  return std::exchange(dirty_, std::vector<uint64_t>(dirty_.size()));
}

}  // namespace unicorn_host
