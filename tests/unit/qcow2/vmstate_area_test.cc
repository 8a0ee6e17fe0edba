// Where the stream goes: in order, without gaps, in whole clusters.
#include "qcow2/vmstate_area.h"

#include <gtest/gtest.h>

#include "edit_helpers.h"

namespace qvmstate::qcow2::test {
namespace {

TEST(VmstateArea, PartsOfOneClusterFollowEachOther) {
  MemoryImage disk(fixture("qemu-72-v2-64k-data.qcow2"));
  auto allocator = Allocator::scan(*disk.image);
  ASSERT_TRUE(allocator);
  VmstateArea area(*disk.image, *allocator);
  std::vector<io::HostRun> first;
  std::vector<io::HostRun> second;
  ASSERT_TRUE(area.place(StreamOffset(0), 4096, first));
  ASSERT_TRUE(area.place(StreamOffset(4096), 8192, second));
  ASSERT_EQ(first.size(), 1U);
  ASSERT_EQ(second.size(), 1U);
  EXPECT_EQ(first[0].offset.value % (64 * kib), 0U);
  EXPECT_EQ(second[0].offset, first[0].offset + 4096);
  EXPECT_EQ(second[0].bytes, 8192U);
  EXPECT_EQ(area.clusters(), 1U);
  ASSERT_TRUE(area.place(StreamOffset(12288), 60 * kib, second));
  EXPECT_EQ(area.clusters(), 2U);
}

TEST(VmstateArea, ARangeOverTwoHostRunsComesInTwoParts) {
  // Free: clusters 8 to 15, in front of one in use.
  std::vector<uint16_t> counts(17, 0);
  for (const size_t used : {0, 1, 2, 3, 4, 5, 6, 7, 16}) {
    counts[used] = 1;
  }
  MemoryImage disk(tiny_image(counts));
  auto allocator = Allocator::scan(*disk.image);
  ASSERT_TRUE(allocator);
  VmstateArea area(*disk.image, *allocator);
  std::vector<io::HostRun> runs;
  ASSERT_TRUE(area.place(StreamOffset(0), 4096, runs));
  ASSERT_EQ(runs.size(), 1U);
  EXPECT_EQ(runs[0].offset.value, 8 * 512U);
  ASSERT_TRUE(area.place(StreamOffset(4096), 4096, runs));
  ASSERT_EQ(runs.size(), 2U);
  EXPECT_EQ(runs[1].offset.value, 24 * 512U);  // past the end, at a multiple of 4096
  ASSERT_EQ(area.runs().size(), 2U);
  EXPECT_EQ(area.clusters(), 16U);
}

TEST(VmstateArea, MoreThanAnL1TableCanMapIsRefused) {
  MemoryImage disk(tiny_image({1, 1, 1, 1}));
  // An L1 table has at most 4194304 entries of 32 KiB here, of which the disk takes one.
  const uint64_t bytes_max = uint64_t{4194303} * 32 * kib;
  EXPECT_EQ(VmstateArea::bytes_max(disk.image->header()), bytes_max);
  auto allocator = Allocator::scan(*disk.image);
  ASSERT_TRUE(allocator);
  VmstateArea area(*disk.image, *allocator);
  std::vector<io::HostRun> runs;
  ASSERT_TRUE(area.place(StreamOffset(0), 4096, runs));
  const auto refused = area.place(StreamOffset(4096), bytes_max, runs);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::no_space);
}

}  // namespace
}  // namespace qvmstate::qcow2::test
