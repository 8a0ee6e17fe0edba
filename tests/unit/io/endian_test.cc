// Big-endian integers against bytes written by hand.
#include "qcow2/io/endian.h"

#include <gtest/gtest.h>

#include <array>

#include "qcow2/io/offsets.h"

namespace qvmstate {
namespace {

TEST(Endian, LoadsTheMostSignificantByteFirst) {
  const uint8_t bytes[] = {0x51, 0x46, 0x49, 0xfb, 0x00, 0x80, 0xff, 0x01, 0x02};
  EXPECT_EQ(load_be<uint8_t>(bytes), 0x51);
  EXPECT_EQ(load_be<uint16_t>(bytes), 0x5146);
  EXPECT_EQ(load_be<uint32_t>(bytes), 0x514649fbU);
  EXPECT_EQ(load_be<uint64_t>(bytes), 0x514649fb0080ff01U);
  EXPECT_EQ(load_be<uint64_t>(bytes + 1), 0x4649fb0080ff0102U);  // Alignment does not matter.
}

TEST(Endian, StoresTheMostSignificantByteFirst) {
  std::array<uint8_t, 9> bytes;
  bytes.fill(0xee);
  store_be<uint64_t>(bytes.data() + 1, 0x0123456789abcdefU);
  EXPECT_EQ(bytes, (std::array<uint8_t, 9>{0xee, 0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef}));
  store_be<uint32_t>(bytes.data(), 0xfffefdfcU);
  store_be<uint16_t>(bytes.data() + 7, 0x1234);
  EXPECT_EQ(bytes, (std::array<uint8_t, 9>{0xff, 0xfe, 0xfd, 0xfc, 0x67, 0x89, 0xab, 0x12, 0x34}));
}

TEST(Endian, FieldsOfAStructLieByteForByte) {
  struct Fields {
    Be16 a;
    Be64 b;
    Be32 c;
  };
  static_assert(sizeof(Fields) == 14);
  const Fields fields = {uint16_t{0x0102}, uint64_t{0x030405060708090aU}, uint32_t{0x0b0c0d0eU}};
  std::array<uint8_t, 14> bytes;
  std::memcpy(bytes.data(), &fields, sizeof fields);
  EXPECT_EQ(bytes, (std::array<uint8_t, 14>{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14}));
  EXPECT_EQ(fields.a, 0x0102);
  EXPECT_EQ(fields.b, 0x030405060708090aU);
  EXPECT_EQ(fields.c, 0x0b0c0d0eU);
}

TEST(Offsets, RoundingDoesNotOverflow) {
  EXPECT_EQ(divide_up(0, 512), 0U);
  EXPECT_EQ(divide_up(513, 512), 2U);
  EXPECT_EQ(divide_up(UINT64_MAX, 512), 1ULL << 55);
  EXPECT_EQ(round_up(513, 512), 1024U);
  EXPECT_EQ(round_up(1024, 512), 1024U);
  EXPECT_EQ(round_down(1023, 512), 512U);
}

}  // namespace
}  // namespace qvmstate
