// The input is a stream of either layout, or what a hostile image holds in its place. Reading it
// must not crash, every page that is reported must lie in its block, and the parallel reader of
// mapped-ram must report the same pages as the reader of streams.

#include <cstdlib>
#include <span>

#include "tests/fuzz/stream_input.h"
#include "vmstate/mapped_ram_reader.h"
#include "vmstate/stream_reader.h"

namespace {

using namespace qvmstate;

uint64_t mapped_sum(const vmstate::StreamSummary &summary, std::span<const uint8_t> input) {
  uint64_t sum = 0;
  const auto done = vmstate::read_mapped_ram(
      summary, fuzz::opener_of(input),
      [&](size_t, size_t block, uint64_t offset, std::span<const std::byte> pages,
          uint64_t bytes) -> Result<void> {
        for (uint64_t at = 0; at < bytes; at += summary.page_bytes) {
          sum += fuzz::page_hash(block, offset + at,
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
  const std::span input(data, size);
  fuzz::Input source(input);
  uint64_t sum = 0;
  vmstate::StreamHooks hooks;
  hooks.page = [&](size_t block, uint64_t offset, uint64_t page_bytes,
                   std::span<const std::byte> page) -> Result<void> {
    if (page_bytes == 0 || offset % page_bytes != 0 ||
        (!page.empty() && page.size() != page_bytes)) {
      abort();
    }
    sum += fuzz::page_hash(block, offset, page);
    return {};
  };
  hooks.page_now = [](size_t, uint64_t, std::span<std::byte>) -> Result<void> { return {}; };
  const auto summary = vmstate::read_stream(source, {}, hooks);
  if (summary && summary->stream_bytes > size) {
    abort();
  }
  if (summary && summary->layout == vmstate::Layout::mapped_ram && !summary->blocks.empty() &&
      mapped_sum(*summary, input) != sum) {
    abort();
  }
  return 0;
}
