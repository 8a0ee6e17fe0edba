// The input is a legacy stream, or what a hostile image holds in its place. Reading it must not
// crash, and every page that is reported must lie in its block.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

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

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  Bytes source(data, size);
  const auto summary = vmstate::read_stream(source,
                                            [](size_t, uint64_t offset, uint64_t page_bytes,
                                               std::span<const std::byte> page) -> Result<void> {
                                              if (page_bytes == 0 || offset % page_bytes != 0 ||
                                                  (!page.empty() && page.size() != page_bytes)) {
                                                abort();
                                              }
                                              return {};
                                            });
  if (summary && summary->stream_bytes > size) {
    abort();
  }
  return 0;
}
