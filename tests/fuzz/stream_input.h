// What the fuzz targets over streams share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>

#include "vmstate/mapped_ram_reader.h"
#include "vmstate/stream_source.h"

namespace qvmstate::fuzz {

/// The input as a stream.
class Input : public vmstate::StreamSource {
 public:
  explicit Input(std::span<const uint8_t> bytes) : bytes_(bytes) {}
  Result<void> read(StreamOffset offset, std::span<std::byte> to) override {
    if (offset.value > bytes_.size() || to.size() > bytes_.size() - offset.value) {
      return fail(ErrorCode::bad_stream, "fuzz: the stream ends");
    }
    std::memcpy(to.data(), bytes_.data() + offset.value, to.size());
    return {};
  }
  uint64_t bytes_max() const override { return bytes_.size(); }

 private:
  std::span<const uint8_t> bytes_;
};

inline vmstate::SourceOpener opener_of(std::span<const uint8_t> bytes) {
  return [bytes]() -> Result<std::unique_ptr<vmstate::StreamSource>> {
    return std::make_unique<Input>(bytes);
  };
}

/// Order of pages does not matter in the sum of these; what and where they are does.
inline uint64_t page_hash(size_t block, uint64_t offset, std::span<const std::byte> page) {
  uint64_t hash = block * 31 + offset;
  for (const std::byte byte : page) {
    hash = hash * 1099511628211ULL + static_cast<uint64_t>(byte);
  }
  return hash;
}

}  // namespace qvmstate::fuzz
