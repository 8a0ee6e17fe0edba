// File over the fake: transfers that are cut short, interrupted, refused or failed.
#include "qcow2/io/memory_backend.h"
#include "tests/unit/io/support.h"

namespace qvmstate::io {
namespace {

constexpr unsigned depth = 4;
constexpr size_t part = 4096;

struct Fake {
  explicit Fake(MemoryOptions options, Bytes contents = {}) {
    auto backend = std::make_unique<MemoryBackend>(std::move(contents), std::move(options));
    memory = backend.get();
    file = std::make_unique<File>(std::make_unique<WatchingBackend>(std::move(backend), watched),
                                  "file", depth);
  }

  Watched watched;
  MemoryBackend *memory;
  std::unique_ptr<File> file;
};

class Seeded : public testing::TestWithParam<uint64_t> {};

TEST_P(Seeded, CutInterruptedAndRefusedTransfersEndWhole) {
  MemoryOptions options;
  options.seed = GetParam();
  options.short_percent = 40;
  options.interrupted_percent = 20;
  options.again_percent = 20;
  options.out_of_order = true;
  options.direct_alignment = GetParam() % 2 == 0 ? 512 : 0;
  Fake fake(options);
  constexpr unsigned count = 50;
  const Bytes bytes = random_bytes(count * part, GetParam());
  AlignedMemory memory(bytes);
  for (unsigned i = 0; i < count; ++i) {
    const auto span = memory.span().subspan(i * part, part);
    if (i % 10 == 0) {
      ASSERT_TRUE(fake.file->write_at(span, HostOffset(i * part)));
    } else {
      ASSERT_TRUE(fake.file->start_write(span, HostOffset(i * part), no_buffer, i));
    }
  }
  ASSERT_TRUE(fake.file->sync());
  EXPECT_EQ(fake.memory->contents(), bytes);
  EXPECT_EQ(fake.file->bytes_written(), bytes.size());

  AlignedMemory back(bytes.size());
  for (unsigned i = 0; i < count; ++i) {
    const auto span = back.span().subspan(i * part, part);
    if (i % 10 == 0) {
      ASSERT_TRUE(fake.file->read_at(span, HostOffset(i * part)));
    } else {
      ASSERT_TRUE(fake.file->start_read(span, HostOffset(i * part), no_buffer, i));
    }
  }
  ASSERT_TRUE(fake.file->drain());
  EXPECT_EQ(back.copy(), bytes);
  EXPECT_GT(fake.watched.started, 2U * 45U);  // Some were resubmitted.
  EXPECT_EQ(fake.watched.mixed, 0U);
  EXPECT_EQ(fake.watched.synchronous_overlap, 0U);
  EXPECT_LE(fake.watched.in_flight_max, depth);
}

INSTANTIATE_TEST_SUITE_P(Seeds, Seeded, testing::Range<uint64_t>(0, 20));

TEST(Faults, CompletionsComeBackInAnyOrder) {
  unsigned unsorted = 0;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    MemoryOptions options;
    options.out_of_order = true;
    options.seed = seed;
    Fake fake(options);
    const Bytes bytes(part);
    for (unsigned i = 0; i < depth; ++i) {
      ASSERT_TRUE(fake.file->start_write(bytes, HostOffset(i * part), no_buffer, i));
    }
    std::vector<uint64_t> cookies;
    while (fake.file->pending() > 0) {
      cookies.push_back(fake.file->wait_any().value());
    }
    unsorted += !std::ranges::is_sorted(cookies);
  }
  EXPECT_GT(unsorted, 5U);
}

TEST(Faults, OneTransferOfZeroBytesIsForgivenTwoAreAnError) {
  const Bytes bytes = random_bytes(part, 1);
  MemoryOptions options;
  options.faults = {{FileOperation::write, 0, 0}};
  Fake once(options);
  ASSERT_TRUE(once.file->start_write(bytes, HostOffset(0), no_buffer, 0));
  ASSERT_TRUE(once.file->wait_any());
  EXPECT_EQ(once.memory->contents(), bytes);

  options.faults = {{FileOperation::write, 0, 0}, {FileOperation::write, 1, 0}};
  Fake twice(options);
  ASSERT_TRUE(twice.file->start_write(bytes, HostOffset(512), no_buffer, 0));
  const auto result = twice.file->wait_any();
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().message,
            "file: cannot write 4096 bytes at offset 512: no byte of it was accepted");

  Fake synchronous(options);
  const auto written = synchronous.file->write_at(bytes, HostOffset(512));
  ASSERT_FALSE(written);
  EXPECT_EQ(written.error().message, result.error().message);
}

TEST(Faults, DirectTransfersCutWithinASectorAreResubmittedAligned) {
  MemoryOptions options;
  options.direct_alignment = 512;
  options.faults = {{FileOperation::write, 0, 700}, {FileOperation::write, 1, 100}};
  Fake fake(options);
  const Bytes bytes = random_bytes(part, 5);
  AlignedMemory memory(bytes);
  ASSERT_TRUE(fake.file->start_write(memory.span(), HostOffset(0), no_buffer, 0));
  ASSERT_TRUE(fake.file->drain());
  EXPECT_EQ(fake.memory->contents(), bytes);
  EXPECT_EQ(fake.watched.direct_started, 3U);
  EXPECT_EQ(fake.watched.buffered_started, 0U);
  ASSERT_EQ(fake.memory->journal().size(), 3U);
  EXPECT_EQ(fake.memory->journal()[1].offset, 512U);
  EXPECT_EQ(fake.memory->journal()[2].offset, 512U);
}

TEST(Faults, FirstErrorWinsDrainsAndNothingStartsAfterIt) {
  MemoryOptions options;
  options.faults = {{FileOperation::write, 2, -ENOSPC}, {FileOperation::write, 3, -EIO}};
  Fake fake(options);
  const Bytes bytes = random_bytes(part, 2);
  uint64_t offset = 0;
  Result<void> result;
  for (; offset < 100 * part && result; offset += part) {
    result = fake.file->start_write(bytes, HostOffset(offset), no_buffer, offset);
  }
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().code, ErrorCode::no_space);
  EXPECT_EQ(result.error().sys_errno, ENOSPC);
  EXPECT_EQ(result.error().message,
            "file: cannot write 4096 bytes at offset 8192: No space left on device");
  EXPECT_EQ(fake.watched.in_flight, 0U);
  EXPECT_EQ(fake.file->pending(), 0U);

  const uint64_t started = fake.watched.started;
  const size_t changes = fake.memory->journal().size();
  Bytes read(1);
  const std::string message = result.error().message;
  EXPECT_EQ(fake.file->start_write(bytes, HostOffset(0), no_buffer, 0).error().message, message);
  EXPECT_EQ(fake.file->start_read(read, HostOffset(0), no_buffer, 0).error().message, message);
  EXPECT_EQ(fake.file->wait_any().error().message, message);
  EXPECT_EQ(fake.file->drain().error().message, message);
  EXPECT_EQ(fake.file->write_at(bytes, HostOffset(0)).error().message, message);
  EXPECT_EQ(fake.file->read_at(read, HostOffset(0)).error().message, message);
  EXPECT_EQ(fake.file->read_or_zero_at(read, HostOffset(0)).error().message, message);
  EXPECT_EQ(fake.file->sync().error().message, message);
  EXPECT_EQ(fake.file->size().error().message, message);
  EXPECT_EQ(fake.file->resize(0).error().message, message);
  EXPECT_EQ(fake.file->preallocate(HostOffset(0), 1).error().message, message);
  EXPECT_EQ(fake.file->punch_hole(HostOffset(0), 1).error().message, message);
  EXPECT_EQ(fake.watched.started, started);
  EXPECT_EQ(fake.memory->journal().size(), changes);

  fake.file->clear_error();
  ASSERT_TRUE(fake.file->resize(0));
  ASSERT_TRUE(fake.file->start_write(bytes, HostOffset(0), no_buffer, 7));
  EXPECT_EQ(fake.file->wait_any(), 7U);
  EXPECT_EQ(fake.memory->contents(), bytes);
}

TEST(Faults, WhatWaitedToBeStartedIsForgottenWithTheError) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    MemoryOptions options;
    options.seed = seed;
    options.again_percent = 60;
    options.faults = {{FileOperation::write, 4, -ENOSPC}};
    Fake fake(options);
    Bytes bytes(part, std::byte{0x11});
    Result<void> result;
    for (uint64_t i = 0; i < 20 && result; ++i) {
      result = fake.file->start_write(bytes, HostOffset(i * part), no_buffer, i);
    }
    if (result) {
      result = fake.file->drain();
    }
    ASSERT_FALSE(result);
    const size_t changes = fake.memory->journal().size();
    fake.memory->set_options({});
    fake.file->clear_error();
    ASSERT_TRUE(fake.file->start_write(bytes, HostOffset(100 * part), no_buffer, 7));
    EXPECT_EQ(fake.file->pending(), 1U);
    EXPECT_EQ(fake.file->wait_any(), 7U);
    ASSERT_TRUE(fake.file->drain());
    ASSERT_EQ(fake.memory->journal().size(), changes + 1);
    EXPECT_EQ(fake.memory->journal().back().offset, 100 * part);
  }
}

TEST(Faults, SynchronousErrorsStayToo) {
  for (const FileOperation operation :
       {FileOperation::write, FileOperation::sync, FileOperation::resize,
        FileOperation::preallocate, FileOperation::punch_hole}) {
    MemoryOptions options;
    options.faults = {{operation, 0, -EIO}};
    Fake fake(options);
    const Bytes bytes(part);
    EXPECT_EQ(fake.file->write_at(bytes, HostOffset(0)).has_value(),
              operation != FileOperation::write);
    bool failed = operation == FileOperation::write;
    EXPECT_EQ(fake.file->sync().has_value(), !(failed |= operation == FileOperation::sync));
    EXPECT_EQ(fake.file->resize(part).has_value(), !(failed |= operation == FileOperation::resize));
    EXPECT_EQ(fake.file->preallocate(HostOffset(0), part).has_value(),
              !(failed |= operation == FileOperation::preallocate));
    EXPECT_EQ(fake.file->punch_hole(HostOffset(0), part).has_value(),
              !(failed |= operation == FileOperation::punch_hole));
    EXPECT_EQ(fake.file->sync().error().sys_errno, EIO);
  }
}

TEST(Faults, WhatAFileSystemCannotDoIsNoError) {
  MemoryOptions options;
  options.faults = {{FileOperation::preallocate, 0, -EOPNOTSUPP},
                    {FileOperation::punch_hole, 0, -EOPNOTSUPP}};
  Fake fake(options);
  EXPECT_EQ(fake.file->preallocate(HostOffset(0), part), false);
  EXPECT_EQ(fake.file->punch_hole(HostOffset(0), part), false);
  EXPECT_EQ(fake.file->preallocate(HostOffset(0), part), true);
  EXPECT_EQ(fake.file->punch_hole(HostOffset(0), part), true);
}

TEST(Faults, InterruptionsWithoutEndAreAnError) {
  MemoryOptions options;
  options.interrupted_percent = 100;
  Fake fake(options);
  Bytes bytes(part);
  EXPECT_EQ(fake.file->read_at(bytes, HostOffset(0)).error().sys_errno, EINTR);
  ASSERT_TRUE(fake.file->start_write(bytes, HostOffset(0), no_buffer, 0));
  EXPECT_EQ(fake.file->wait_any().error().sys_errno, EINTR);

  options.interrupted_percent = 0;
  options.again_percent = 100;
  Fake again(options);
  EXPECT_EQ(again.file->start_write(bytes, HostOffset(0), no_buffer, 0).error().sys_errno, EAGAIN);
}

TEST(Faults, AFailedReadIsAnErrorOfThatCallAlone) {
  MemoryOptions options;
  options.faults = {{FileOperation::read, 0, -EIO}};
  const Bytes bytes = random_bytes(part, 3);
  Fake fake(options, bytes);
  Bytes read(part);
  EXPECT_EQ(fake.file->read_at(read, HostOffset(0)).error().sys_errno, EIO);
  ASSERT_TRUE(fake.file->read_at(read, HostOffset(0)));
  EXPECT_EQ(read, bytes);
}

TEST(Faults, AfterThePowerIsGoneEverythingFails) {
  MemoryOptions options;
  options.changes_max = 2;
  Fake fake(options);
  const Bytes bytes = random_bytes(part, 4);
  Bytes read(part);
  ASSERT_TRUE(fake.file->write_at(bytes, HostOffset(0)));
  ASSERT_TRUE(fake.file->sync());
  EXPECT_EQ(fake.file->write_at(bytes, HostOffset(part)).error().sys_errno, EIO);
  for (int i = 0; i < 2; ++i) {
    fake.file->clear_error();
    EXPECT_EQ(fake.file->read_at(read, HostOffset(0)).error().sys_errno, EIO);
    EXPECT_EQ(fake.file->resize(0).error().sys_errno, EIO);
    fake.file->clear_error();
    EXPECT_EQ(fake.file->punch_hole(HostOffset(0), part).error().sys_errno, EIO);
    fake.file->clear_error();
    EXPECT_EQ(fake.file->size().error().sys_errno, EIO);
    ASSERT_TRUE(fake.file->start_write(bytes, HostOffset(0), no_buffer, 0));
    EXPECT_EQ(fake.file->drain().error().sys_errno, EIO);
  }
  EXPECT_EQ(fake.memory->contents(), bytes);
  EXPECT_EQ(fake.memory->journal().size(), 2U);
}

TEST(Faults, DepthIsClampedNotRefused) {
  for (const unsigned asked : {0U, 1U}) {
    Watched watched;
    File file(std::make_unique<WatchingBackend>(std::make_unique<MemoryBackend>(), watched), "file",
              asked);
    const Bytes bytes(16);
    for (unsigned i = 0; i < 3; ++i) {
      ASSERT_TRUE(file.start_write(bytes, HostOffset(i * 16), no_buffer, i));
    }
    ASSERT_TRUE(file.drain());
    EXPECT_EQ(watched.in_flight_max, 1U);
  }
}

}  // namespace
}  // namespace qvmstate::io
