// The input is a stream of either layout whose pages are then read in any order, as convert, diff
// and import do. That must not crash or need much memory, and RAM must be what the reader of
// streams says that its records leave.

#include <algorithm>
#include <cstdlib>
#include <map>
#include <utility>
#include <vector>

#include "tests/fuzz/stream_input.h"
#include "vmstate/stored_state.h"
#include "vmstate/stream_reader.h"

namespace {

using namespace qvmstate;

constexpr uint64_t ram_bytes_max = 16 * mib;  // a bitmap of a few bytes may tell of much more

void require(bool condition) {
  if (!condition) {
    abort();
  }
}

/// By block and offset, what is not zero.
using Memory = std::map<std::pair<size_t, uint64_t>, std::vector<std::byte>>;

/// As the records leave it.
Memory loaded(fuzz::Input &source) {
  Memory memory;
  vmstate::StreamHooks hooks;
  hooks.page = [&](size_t block, uint64_t offset, uint64_t,
                   std::span<const std::byte> page) -> Result<void> {
    memory[{block, offset}] = {page.begin(), page.end()};
    return {};
  };
  hooks.page_now = [&](size_t block, uint64_t offset, std::span<std::byte> to) -> Result<void> {
    if (const auto found = memory.find({block, offset}); found != memory.end()) {
      std::ranges::copy(found->second, to.begin());
    }
    return {};
  };
  require(vmstate::read_stream(source, {}, hooks).has_value());
  std::erase_if(memory, [](const auto &page) {
    return std::ranges::all_of(page.second, [](std::byte byte) { return byte == std::byte{0}; });
  });
  return memory;
}

void compare(const vmstate::StoredState &state, const Memory &expected) {
  const auto opened = state.ram();
  require(opened.has_value());
  vmstate::RamSource &ram = **opened;
  const uint64_t page_bytes = state.summary().page_bytes;
  std::vector<std::byte> page(page_bytes);
  size_t pages_found = 0;
  for (size_t block = 0; block < state.blocks().size(); ++block) {
    const uint64_t end = state.blocks()[block].used_bytes;
    for (uint64_t offset = 0; offset < end;) {
      const auto presence = ram.presence(block, offset);
      require(presence && presence->bytes > 0 && presence->bytes <= end - offset);
      for (uint64_t at = offset; presence->touched && at < offset + presence->bytes;
           at += page_bytes) {
        require(ram.read_pages(block, at, 1, page_bytes, page.data(), page_bytes).has_value());
        const auto found = expected.find({block, at});
        require(found != expected.end() ? found->second == page
                                        : std::ranges::all_of(page, [](std::byte byte) {
                                            return byte == std::byte{0};
                                          }));
        pages_found += found != expected.end();
      }
      offset += presence->bytes;
    }
  }
  require(pages_found == expected.size());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const std::span input(data, size);
  const auto state = vmstate::StoredState::open(fuzz::opener_of(input));
  if (!state || vmstate::total_bytes((*state)->blocks()) > ram_bytes_max) {
    return 0;
  }
  fuzz::Input source(input);
  compare(**state, loaded(source));
  return 0;
}
