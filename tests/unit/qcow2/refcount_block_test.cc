#include "qcow2/refcount_block.h"

#include <gtest/gtest.h>

#include <array>
#include <vector>

namespace qvmstate::qcow2 {
namespace {

struct WidthCase {
  uint32_t order;
  std::vector<uint8_t> bytes;
  std::vector<uint64_t> counts;  ///< of the entries in these bytes, in order
};

const WidthCase width_cases[] = {
    // 1 bit: entry 0 is the least significant bit. 0x05 = 0b00000101, 0x80 = 0b10000000.
    {0, {0x05, 0x80}, {1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}},
    // 2 bits: 0xe4 = 3 2 1 0 from the most significant end; 0x01 = 0 0 0 1.
    {1, {0xe4, 0x01}, {0, 1, 2, 3, 1, 0, 0, 0}},
    // 4 bits: the low half of a byte comes first.
    {2, {0x1f, 0x20}, {15, 1, 0, 2}},
    // 8 bits.
    {3, {0xff, 0x00, 0x07}, {255, 0, 7}},
    // 16 bits, big-endian.
    {4, {0x01, 0x02, 0xff, 0xff}, {0x0102, 0xffff}},
    // 32 bits, big-endian.
    {5, {0x01, 0x02, 0x03, 0x04, 0x80, 0x00, 0x00, 0x00}, {0x01020304, 0x80000000}},
    // 64 bits, big-endian.
    {6,
     {0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
      0xff},
     {0x0102030405060708, UINT64_MAX}},
};

class RefcountWidth : public testing::TestWithParam<WidthCase> {};

TEST_P(RefcountWidth, ReadsHandWrittenBytes) {
  const WidthCase &width = GetParam();
  for (size_t i = 0; i < width.counts.size(); ++i) {
    EXPECT_EQ(refcount_get(std::as_bytes(std::span(width.bytes)), width.order, i), width.counts[i])
        << "entry " << i;
  }
}

TEST_P(RefcountWidth, WritesTheSameBytesOverOnesAndZeros) {
  const WidthCase &width = GetParam();
  for (const uint8_t before : {0x00, 0xff}) {
    std::vector<uint8_t> bytes(width.bytes.size(), before);
    for (size_t i = 0; i < width.counts.size(); ++i) {
      refcount_set(std::as_writable_bytes(std::span(bytes)), width.order, i, width.counts[i]);
    }
    EXPECT_EQ(bytes, width.bytes);
  }
}

INSTANTIATE_TEST_SUITE_P(All, RefcountWidth, testing::ValuesIn(width_cases), [](const auto &test) {
  return std::to_string(1U << test.param.order) + "bits";
});

TEST(RefcountBlock, SettingOneEntryLeavesItsNeighbours) {
  std::array<uint8_t, 2> bytes = {0xff, 0xff};
  // 2-bit entry 5 is bits 2 and 3 of byte 1: 0b11110111 with count 1.
  refcount_set(std::as_writable_bytes(std::span(bytes)), 1, 5, 1);
  EXPECT_EQ(bytes[0], 0xff);
  EXPECT_EQ(bytes[1], 0xf7);
}

}  // namespace
}  // namespace qvmstate::qcow2
