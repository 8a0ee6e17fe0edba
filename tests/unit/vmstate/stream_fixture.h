// What the vmstate tests share: RAM in memory seen in both ways, a file in memory that a stream is
// written to, and a byte builder for streams written by hand.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "qcow2/io/memory_backend.h"
#include "qcow2/io/stream_buffer.h"
#include "vmstate/aligned_writer.h"
#include "vmstate/legacy_writer.h"
#include "vmstate/ram_source.h"
#include "vmstate/stream_reader.h"

namespace qvmstate::vmstate::test {

using Blob = std::vector<std::byte>;

constexpr size_t page = 4096;

enum class Touch : char { untouched, zero, data };

/// Blocks of RAM whose pages are untouched, zero or random. Untouched pages hold garbage here, so
/// that a writer that reads them is found out.
class FakeRam : public RamSource {
 public:
  explicit FakeRam(bool has_view) : has_view_(has_view) {}

  void add_block(std::string idstr, std::span<const Touch> pages, uint32_t seed) {
    std::mt19937_64 random(seed);
    Blob memory(pages.size() * page);
    for (size_t i = 0; i < pages.size(); ++i) {
      if (pages[i] == Touch::zero) {
        continue;
      }
      for (size_t at = i * page; at < (i + 1) * page; at += 8) {
        const uint64_t word = random();
        std::memcpy(&memory[at], &word, 8);
      }
      if (pages[i] == Touch::data && i % 3 == 0) {
        // One byte at the end is the hardest page to tell from a zero one.
        std::memset(&memory[i * page], 0, page);
        memory[(i + 1) * page - 1] = std::byte{0x5a};
      }
    }
    blocks_.push_back({std::move(idstr), memory.size(), page});
    memory_.push_back(std::move(memory));
    touch_.emplace_back(pages.begin(), pages.end());
  }

  /// What a loader must have afterwards.
  Blob expected(size_t block) const {
    Blob memory = memory_[block];
    for (size_t i = 0; i < touch_[block].size(); ++i) {
      if (touch_[block][i] == Touch::untouched) {
        std::memset(&memory[i * page], 0, page);
      }
    }
    return memory;
  }

  Blob &memory(size_t block) { return memory_[block]; }
  std::vector<RamBlock> &block_list() { return blocks_; }

  std::span<const RamBlock> blocks() const override { return blocks_; }
  const std::byte *view(size_t block) const override {
    return has_view_ ? memory_[block].data() : nullptr;
  }
  Result<Presence> presence(size_t block, uint64_t offset) override {
    size_t i = offset / page;
    const bool touched = touch_[block][i] != Touch::untouched;
    while (i < touch_[block].size() && (touch_[block][i] != Touch::untouched) == touched) {
      ++i;
    }
    return Presence{touched, i * page - offset};
  }
  Result<void> read_pages(size_t block, uint64_t offset, size_t count, size_t page_bytes,
                          std::byte *to, size_t stride) override {
    for (size_t i = 0; i < count; ++i) {
      EXPECT_NE(touch_[block].at((offset + i * page_bytes) / page), Touch::untouched);
      std::memcpy(to + i * stride, &memory_[block].at(offset + i * page_bytes), page_bytes);
    }
    return {};
  }

 private:
  bool has_view_;
  std::vector<RamBlock> blocks_;
  std::vector<Blob> memory_;
  std::vector<std::vector<Touch>> touch_;
};

class IdentityPlacement : public io::Placement {
 public:
  Result<void> place(StreamOffset from, uint64_t bytes, std::vector<io::HostRun> &runs) override {
    runs.push_back({HostOffset(from.value), bytes});
    return {};
  }
  uint64_t unit_bytes() const override { return 4096; }
};

struct Written {
  Result<StreamStats> stats;
  Blob bytes;  ///< without the padding at the end
};

/// Writes a stream into memory, through buffers of `buffer_bytes`.
inline Written write_stream(RamSource &ram, const StreamConfiguration &configuration,
                            std::span<const DeviceSection> devices, size_t buffer_bytes = 1 * mib,
                            const RamHook &hook = {}) {
  auto backend = std::make_unique<io::MemoryBackend>();
  io::MemoryBackend &memory = *backend;
  io::File file(std::move(backend), "memory", 4);
  auto pool = io::BufferPool::create(3, buffer_bytes);
  EXPECT_TRUE(pool);
  IdentityPlacement placement;
  io::StreamBuffer out(file, *pool, placement);
  auto stats = write_legacy_stream(out, configuration, ram, qemu_load_order(devices), hook);
  Blob bytes;
  if (stats) {
    bytes = memory.contents();
    EXPECT_GE(bytes.size(), stats->stream_bytes);
    bytes.resize(stats->stream_bytes);
  }
  return {std::move(stats), std::move(bytes)};
}

/// The same in the layout stream-aligned, with what is kept behind the stream.
inline Written write_aligned(RamSource &ram, const StreamConfiguration &configuration,
                             std::span<const DeviceSection> devices, uint64_t group_bytes,
                             size_t buffer_bytes = 1 * mib, const RamHook &hook = {}) {
  auto backend = std::make_unique<io::MemoryBackend>();
  io::MemoryBackend &memory = *backend;
  io::File file(std::move(backend), "memory", 4);
  auto pool = io::BufferPool::create(3, buffer_bytes);
  EXPECT_TRUE(pool);
  IdentityPlacement placement;
  io::StreamBuffer out(file, *pool, placement);
  auto stats = write_aligned_stream(out, configuration, ram, qemu_load_order(devices),
                                    {.group_bytes = group_bytes}, hook);
  return {std::move(stats), memory.contents()};
}

/// A stream built by hand.
class Bytes {
 public:
  Bytes &u8(uint8_t value) { return integer(value, 1); }
  Bytes &u16(uint16_t value) { return integer(value, 2); }
  Bytes &u32(uint32_t value) { return integer(value, 4); }
  Bytes &u64(uint64_t value) { return integer(value, 8); }
  Bytes &text(std::string_view text) {
    for (const char c : text) {
      u8(static_cast<uint8_t>(c));
    }
    return *this;
  }
  Bytes &blob(std::span<const std::byte> bytes) {
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
    return *this;
  }
  Bytes &fill(size_t count, uint8_t value) {
    bytes_.insert(bytes_.end(), count, std::byte{value});
    return *this;
  }
  const Blob &done() const { return bytes_; }

 private:
  Bytes &integer(uint64_t value, int bytes) {
    for (int i = bytes - 1; i >= 0; --i) {
      bytes_.push_back(static_cast<std::byte>(value >> (8 * i)));
    }
    return *this;
  }
  Blob bytes_;
};

/// A FULL section with its footer.
inline Bytes &add_section(Bytes &bytes, uint32_t id, std::string_view idstr, uint32_t instance,
                          uint32_t version, std::span<const std::byte> body) {
  return bytes.u8(0x04)
      .u32(id)
      .u8(static_cast<uint8_t>(idstr.size()))
      .text(idstr)
      .u32(instance)
      .u32(version)
      .blob(body)
      .u8(0x7e)
      .u32(id);
}

/// A stream in memory; reading past its end gives an error.
class BlobSource : public StreamSource {
 public:
  explicit BlobSource(std::span<const std::byte> bytes) : bytes_(bytes) {}
  Result<void> read(StreamOffset offset, std::span<std::byte> to) override {
    if (offset.value > bytes_.size() || to.size() > bytes_.size() - offset.value) {
      return fail(ErrorCode::io, "read past the end");
    }
    std::memcpy(to.data(), bytes_.data() + offset.value, to.size());
    return {};
  }
  uint64_t bytes_max() const override { return bytes_.size(); }

 private:
  std::span<const std::byte> bytes_;
};

}  // namespace qvmstate::vmstate::test
