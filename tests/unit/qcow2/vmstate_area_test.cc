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

Result<std::vector<io::HostRun>> place(VmstateArea &area, uint64_t from, uint64_t bytes) {
  const io::StreamRange range{StreamOffset(from), bytes};
  std::vector<io::HostRun> runs;
  QV_TRY(area.place_at(std::span(&range, 1), runs));
  return runs;
}

TEST(VmstateArea, FixedOffsetsKeepTheirPlaceInAnyOrder) {
  MemoryImage disk(fixture("qemu-72-v3-4k-preallocated.qcow2"));
  auto allocator = Allocator::scan(*disk.image);
  ASSERT_TRUE(allocator);
  VmstateArea area(*disk.image, *allocator);
  const auto late = place(area, 3 * mib, 64 * kib);
  const auto early = place(area, 128 * kib + 4096, 8192);
  const auto again = place(area, 3 * mib, 64 * kib);
  const auto beside = place(area, 128 * kib, 4096);  // in the unit of `early`
  ASSERT_TRUE(late && early && again && beside);
  ASSERT_EQ(late->size(), 1U);
  EXPECT_EQ((*again)[0].offset, (*late)[0].offset);
  EXPECT_EQ((*beside)[0].offset + 4096, (*early)[0].offset);
  ASSERT_TRUE(area.finish_fixed(4 * mib + 5));
  EXPECT_EQ(area.clusters(), 1025U);
  uint64_t placed = 0;
  uint64_t end = 0;
  for (const AreaRun &run : area.runs()) {
    EXPECT_GE(run.stream_first, end);  // ascending and disjoint
    end = run.stream_end();
    placed += run.count;
  }
  EXPECT_EQ(placed, 2 * 16U);  // two units of 64 KiB; the rest can be flagged zero
}

TEST(VmstateArea, Version2HasAPlaceForEveryCluster) {
  MemoryImage disk(fixture("qemu-72-v2-64k-data.qcow2"));
  auto allocator = Allocator::scan(*disk.image);
  ASSERT_TRUE(allocator);
  VmstateArea area(*disk.image, *allocator);
  ASSERT_TRUE(place(area, 2 * mib, 4096));
  ASSERT_TRUE(area.finish_fixed(5 * mib));
  EXPECT_EQ(area.clusters(), 80U);
  uint64_t next = 0;
  for (const AreaRun &run : area.runs()) {
    EXPECT_EQ(run.stream_first, next);
    next = run.stream_end();
  }
  EXPECT_EQ(next, 80U);
}

TEST(VmstateArea, ClustersUsedBeforeAreEmptiedUnlessWrittenWhole) {
  // Free: clusters 8 to 4103 of 512 bytes, full of old bytes, in front of one in use.
  std::vector<uint16_t> counts(256, 0);
  for (size_t i = 0; i < 8; ++i) {
    counts[i] = 1;
  }
  counts[255] = 1;
  Bytes contents = tiny_image(counts);
  std::fill(contents.begin() + 8 * 512, contents.begin() + 255 * 512, std::byte{0xee});
  MemoryImage disk(contents);
  auto allocator = Allocator::scan(*disk.image);
  ASSERT_TRUE(allocator);
  VmstateArea area(*disk.image, *allocator);
  const auto part = place(area, 4096, 512);
  ASSERT_TRUE(part);
  // The unit of 64 KiB that holds it reads as zeros wherever it was taken from.
  for (const AreaRun &run : area.runs()) {
    const uint64_t first = run.host_first * 512;
    const uint64_t end = std::min<uint64_t>(first + run.count * 512, disk.contents().size());
    for (uint64_t at = first; at < end; ++at) {
      ASSERT_EQ(disk.contents()[at], std::byte{0}) << "byte " << at;
    }
  }
  EXPECT_EQ(area.runs().front().host_first, 8U);
}

}  // namespace
}  // namespace qvmstate::qcow2::test
