// is_zero: every size, alignment and place of the one nonzero byte, both versions.

#include "vmstate/page_scan.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <vector>

namespace qvmstate::vmstate {
namespace {

using Scan = bool (*)(const std::byte *, size_t);

class PageScan : public testing::TestWithParam<Scan> {};

TEST_P(PageScan, finds_one_nonzero_byte_anywhere) {
  const Scan scan = GetParam();
  std::vector<std::byte> memory(32 + 300 + 32, std::byte{0});
  for (size_t alignment = 0; alignment < 32; ++alignment) {
    for (size_t size = 0; size <= 300; size += alignment == 0 ? 1 : 7) {
      const std::byte *data = memory.data() + alignment;
      EXPECT_TRUE(scan(data, size)) << alignment << ' ' << size;
      for (size_t at = 0; at < size; ++at) {
        memory[alignment + at] = std::byte{1} << (at % 8);
        EXPECT_FALSE(scan(data, size)) << alignment << ' ' << size << ' ' << at;
        memory[alignment + at] = std::byte{0};
      }
    }
  }
}

TEST_P(PageScan, ignores_bytes_outside) {
  const Scan scan = GetParam();
  for (size_t size = 0; size <= 300; ++size) {
    std::vector<std::byte> memory(64 + size + 64, std::byte{0xff});
    std::fill_n(memory.begin() + 64, size, std::byte{0});
    EXPECT_TRUE(scan(memory.data() + 64, size)) << size;
  }
}

TEST_P(PageScan, finds_one_nonzero_byte_in_a_page) {
  const Scan scan = GetParam();
  std::vector<std::byte> memory(4096, std::byte{0});
  EXPECT_TRUE(scan(memory.data(), memory.size()));
  for (size_t at = 0; at < memory.size(); ++at) {
    memory[at] = std::byte{0x80};
    EXPECT_FALSE(scan(memory.data(), memory.size())) << at;
    memory[at] = std::byte{0};
  }
}

INSTANTIATE_TEST_SUITE_P(Versions, PageScan, testing::Values(&is_zero, &is_zero_portable));

}  // namespace
}  // namespace qvmstate::vmstate
