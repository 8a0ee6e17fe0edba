// Which clusters an edit takes, and that giving them back leaves no trace.
#include "qcow2/allocator.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "edit_helpers.h"

namespace qvmstate::qcow2::test {
namespace {

using io::Fault;
using io::FileOperation;

// Clusters 4 and 5 are free; 6 is the last one in use.
const std::vector<uint16_t> counts_with_hole{1, 1, 1, 1, 0, 0, 1};

TEST(Allocator, TakesTheFirstFreeRunThatIsLargeEnoughThenTheEnd) {
  MemoryImage disk(tiny_image(counts_with_hole));
  auto allocator = Allocator::scan(*disk.image);
  ASSERT_TRUE(allocator) << allocator.error().message;
  EXPECT_EQ(allocator->free_bytes_inside(), 2 * 512U);
  EXPECT_EQ(allocator->used_end(), 7U);
  EXPECT_EQ(allocator->take(1)->first, 4U);
  EXPECT_EQ(allocator->take(2)->first, 7U);  // 5 alone is too short
  EXPECT_EQ(allocator->take(1)->first, 5U);
  EXPECT_EQ(allocator->take(1)->first, 9U);
  EXPECT_EQ(allocator->used_end(), 10U);
}

TEST(Allocator, TheStreamStartsAtAMultipleOf4096AndLeavesTheGapFree) {
  MemoryImage disk(tiny_image({1, 1, 1, 1, 1}));
  auto allocator = Allocator::scan(*disk.image);
  ASSERT_TRUE(allocator);
  const auto run = allocator->take_for_stream(8);
  ASSERT_TRUE(run);
  EXPECT_EQ(run->first, 8U);
  EXPECT_EQ(run->count, 8U);
  EXPECT_EQ(allocator->take(3)->first, 5U);
  EXPECT_EQ(allocator->take(1)->first, 16U);
}

TEST(Allocator, TheFileIsCutToWhatIsUsed) {
  MemoryImage disk(tiny_image(counts_with_hole));
  auto allocator = Allocator::scan(*disk.image);
  ASSERT_TRUE(allocator);
  ASSERT_TRUE(allocator->take(3));
  EXPECT_GT(disk.contents().size(), 10 * 512U);  // reserved ahead
  ASSERT_TRUE(allocator->trim_file());
  EXPECT_EQ(disk.contents().size(), 10 * 512U);
}

TEST(Allocator, UndoGivesBackTheFileAsItWas) {
  const Bytes before = tiny_image(counts_with_hole);
  MemoryImage disk(before);
  auto allocator = Allocator::scan(*disk.image);
  ASSERT_TRUE(allocator);
  const Bytes junk(512, std::byte{0xcd});
  for (int i = 0; i < 4; ++i) {
    const auto run = allocator->take(1);
    ASSERT_TRUE(run);
    ASSERT_TRUE(disk.file->write_at(junk, HostOffset(run->first * 512)));
  }
  ASSERT_FALSE(disk.contents() == before);
  ASSERT_TRUE(allocator->undo());
  EXPECT_TRUE(disk.contents() == before);
}

TEST(Allocator, WhereRoomAheadIsRefusedItTakesWhatItNeeds) {
  MemoryImage disk(tiny_image({1, 1, 1, 1}));
  auto allocator = Allocator::scan(*disk.image);
  ASSERT_TRUE(allocator);
  io::MemoryOptions options;
  options.faults = {{FileOperation::preallocate, 0, -ENOSPC},
                    {FileOperation::preallocate, 1, -ENOSPC}};
  disk.backend->set_options(options);
  ASSERT_TRUE(allocator->take(2));
  EXPECT_EQ(disk.contents().size(), 6 * 512U);
}

TEST(Allocator, AFullDiskIsAnError) {
  MemoryImage disk(tiny_image({1, 1, 1, 1}));
  auto allocator = Allocator::scan(*disk.image);
  ASSERT_TRUE(allocator);
  io::MemoryOptions options;
  for (uint64_t nth = 0; nth < 3; ++nth) {
    options.faults.push_back({FileOperation::preallocate, nth, -ENOSPC});
  }
  disk.backend->set_options(options);
  const auto run = allocator->take(2);
  ASSERT_FALSE(run);
  EXPECT_EQ(run.error().code, ErrorCode::no_space);
}

// The reservation is tried again with less; the write must not be forgotten over that.
TEST(Allocator, ENOSPCOfAWriteInFlightIsNotTakenForOneOfReserving) {
  MemoryImage disk(tiny_image({1, 1, 1, 1, 0}));
  auto allocator = Allocator::scan(*disk.image);
  ASSERT_TRUE(allocator);
  io::MemoryOptions options;
  options.faults = {{FileOperation::write, 0, -ENOSPC}};
  disk.backend->set_options(options);
  const Bytes data(512, std::byte{1});
  ASSERT_TRUE(disk.file->start_write(data, HostOffset(4 * 512), io::no_buffer, 1));
  const auto run = allocator->take(2);
  ASSERT_FALSE(run);
  EXPECT_NE(run.error().message.find("write 512 bytes"), std::string::npos) << run.error().message;
  EXPECT_FALSE(disk.file->sync()) << "the error must stay";
}

TEST(Allocator, AnImageInWhichNothingIsInUseIsDamaged) {
  MemoryImage disk(tiny_image({0, 0, 0, 0}));
  const auto allocator = Allocator::scan(*disk.image);
  ASSERT_FALSE(allocator);
  EXPECT_EQ(allocator.error().code, ErrorCode::bad_image);
}

}  // namespace
}  // namespace qvmstate::qcow2::test
