// The fake's journal: what a crash test relies on.
#include "qcow2/io/memory_backend.h"

#include "tests/unit/io/support.h"

namespace qvmstate::io {
namespace {

Bytes bytes_of(std::initializer_list<int> values) {
  Bytes bytes;
  for (const int value : values) {
    bytes.push_back(static_cast<std::byte>(value));
  }
  return bytes;
}

TEST(MemoryBackend, EveryPrefixOfTheJournalCanBeReplayed) {
  MemoryBackend memory(bytes_of({1, 2, 3, 4}));
  const Bytes two = bytes_of({8, 9});
  EXPECT_EQ(memory.write_some(two.data(), 2, 3), 2);
  EXPECT_EQ(memory.sync(), 0);
  EXPECT_EQ(memory.punch_hole(1, 3), 0);
  EXPECT_EQ(memory.preallocate(4, 3), 0);
  EXPECT_EQ(memory.resize(2), 0);
  EXPECT_EQ(memory.resize(3), 0);
  ASSERT_EQ(memory.journal().size(), 6U);
  EXPECT_EQ(memory.contents_after(0), bytes_of({1, 2, 3, 4}));
  EXPECT_EQ(memory.contents_after(1), bytes_of({1, 2, 3, 8, 9}));
  EXPECT_EQ(memory.contents_after(2), bytes_of({1, 2, 3, 8, 9}));
  EXPECT_EQ(memory.contents_after(3), bytes_of({1, 0, 0, 0, 9}));
  EXPECT_EQ(memory.contents_after(4), bytes_of({1, 0, 0, 0, 9, 0, 0}));
  EXPECT_EQ(memory.contents_after(5), bytes_of({1, 0}));
  EXPECT_EQ(memory.contents_after(6), bytes_of({1, 0, 0}));
  EXPECT_EQ(memory.contents(), bytes_of({1, 0, 0}));

  const JournalEntry &write = memory.journal()[0];
  EXPECT_EQ(write.operation, FileOperation::write);
  EXPECT_EQ(write.offset, 3U);
  EXPECT_EQ(write.bytes, 2U);
  EXPECT_EQ(write.data, two);
  EXPECT_EQ(memory.journal()[1].operation, FileOperation::sync);
  EXPECT_EQ(memory.journal()[4].operation, FileOperation::resize);
  EXPECT_EQ(memory.journal()[4].bytes, 2U);
}

TEST(MemoryBackend, PunchingBehindTheEndChangesNothing) {
  MemoryBackend memory(bytes_of({1, 2}));
  EXPECT_EQ(memory.punch_hole(1, 10), 0);
  EXPECT_EQ(memory.punch_hole(100, 10), 0);
  EXPECT_EQ(memory.contents(), bytes_of({1, 0}));
}

TEST(MemoryBackend, AsynchronousWritesHappenWhenReaped) {
  MemoryBackend memory;
  Bytes bytes = bytes_of({1, 2, 3});
  EXPECT_EQ(memory.start({OpKind::write, bytes.data(), 3, 0, no_buffer, 5}), 0);
  EXPECT_TRUE(memory.journal().empty());
  bytes[1] = std::byte{7};  // Touched too early: must show.
  const BackendCompletion completion = memory.reap();
  EXPECT_EQ(completion.cookie, 5U);
  EXPECT_EQ(completion.result, 3);
  EXPECT_EQ(memory.contents(), bytes_of({1, 7, 3}));
}

TEST(MemoryBackend, ACutWriteIsRecordedAsFarAsItWent) {
  MemoryOptions options;
  options.short_percent = 100;
  MemoryBackend memory({}, options);
  const Bytes bytes = random_bytes(100, 1);
  const int64_t count = memory.write_some(bytes.data(), 100, 0);
  ASSERT_GT(count, 0);
  ASSERT_LT(count, 100);
  EXPECT_EQ(memory.contents(), Bytes(bytes.begin(), bytes.begin() + count));
  EXPECT_EQ(memory.journal()[0].bytes, static_cast<uint64_t>(count));
}

TEST(MemoryBackend, AFaultOfAnyKindCountsAllOperations) {
  MemoryOptions options;
  options.faults = {{std::nullopt, 2, -ENOSPC}};
  MemoryBackend memory({}, options);
  EXPECT_EQ(memory.sync(), 0);
  EXPECT_EQ(memory.resize(10), 0);
  EXPECT_EQ(memory.preallocate(0, 10), -ENOSPC);
  EXPECT_EQ(memory.preallocate(0, 10), 0);
  EXPECT_EQ(memory.journal().size(), 3U);
}

TEST(MemoryBackend, AbsurdOffsetsAreRefused) {
  MemoryBackend memory;
  const std::byte byte{1};
  EXPECT_EQ(memory.write_some(&byte, 1, UINT64_MAX), -EFBIG);
  EXPECT_EQ(memory.resize(UINT64_MAX), -EFBIG);
  EXPECT_EQ(memory.preallocate(1, UINT64_MAX), -EFBIG);
  EXPECT_TRUE(memory.journal().empty());
}

TEST(MemoryBackend, ContentsGoToARealFileAndBack) {
  const TemporaryFile temporary;
  const Bytes bytes = random_bytes(100'001, 2);
  ASSERT_TRUE(save_contents(temporary.path(), bytes));
  EXPECT_EQ(load_contents(temporary.path()), bytes);
  EXPECT_EQ(load_contents(temporary.path() + ".none").error().code, ErrorCode::not_found);
  EXPECT_FALSE(save_contents(temporary.path() + ".none/file", bytes));
}

}  // namespace
}  // namespace qvmstate::io
