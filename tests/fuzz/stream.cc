// The input is a stream of either layout, or what a hostile image holds in its place. Reading it
// must not crash, every page that is reported must lie in its block, and the parallel reader of
// mapped-ram must report the same pages as the reader of streams.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "vmstate/mapped_ram_reader.h"
#include "vmstate/stream_reader.h"

namespace {

using namespace qvmstate;

class Bytes : public vmstate::StreamSource {
 public:
  Bytes(const uint8_t *data, size_t size) : data_(data), size_(size) {}
  Result<void> read(StreamOffset offset, std::span<std::byte> to) override {
    if (offset.value > size_ || to.size() > size_ - offset.value) {
      return fail(ErrorCode::bad_stream, "fuzz: the stream ends");
    }
    std::memcpy(to.data(), data_ + offset.value, to.size());
    return {};
  }
  uint64_t bytes_max() const override { return size_; }

 private:
  const uint8_t *data_;
  size_t size_;
};

/// Order of pages does not matter in this sum; what and where they are does.
uint64_t page_sum(size_t block, uint64_t offset, std::span<const std::byte> page) {
  uint64_t sum = block * 31 + offset;
  for (const std::byte byte : page) {
    sum = sum * 1099511628211ULL + static_cast<uint64_t>(byte);
  }
  return sum;
}

uint64_t mapped_sum(const vmstate::StreamSummary &summary, const uint8_t *data, size_t size) {
  uint64_t sum = 0;
  const auto done = vmstate::read_mapped_ram(
      summary,
      [&]() -> Result<std::unique_ptr<vmstate::StreamSource>> {
        return std::make_unique<Bytes>(data, size);
      },
      [&](size_t, size_t block, uint64_t offset, std::span<const std::byte> pages,
          uint64_t bytes) -> Result<void> {
        for (uint64_t at = 0; at < bytes; at += summary.page_bytes) {
          sum += page_sum(block, offset + at,
                          pages.empty() ? pages : pages.subspan(at, summary.page_bytes));
        }
        return {};
      });
  if (!done) {
    abort();
  }
  return sum;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  Bytes source(data, size);
  uint64_t sum = 0;
  vmstate::StreamHooks hooks;
  hooks.page = [&](size_t block, uint64_t offset, uint64_t page_bytes,
                   std::span<const std::byte> page) -> Result<void> {
    if (page_bytes == 0 || offset % page_bytes != 0 ||
        (!page.empty() && page.size() != page_bytes)) {
      abort();
    }
    sum += page_sum(block, offset, page);
    return {};
  };
  hooks.page_now = [](size_t, uint64_t, std::span<std::byte>) -> Result<void> { return {}; };
  const auto summary = vmstate::read_stream(source, {}, hooks);
  if (summary && summary->stream_bytes > size) {
    abort();
  }
  if (summary && summary->layout == vmstate::Layout::mapped_ram && !summary->blocks.empty() &&
      mapped_sum(*summary, data, size) != sum) {
    abort();
  }
  return 0;
}
