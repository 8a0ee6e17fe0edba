// What every backend must do alike, seen through File: io_uring, threads and the fake, each with
// and without O_DIRECT.
#include <set>

#include "qcow2/io/buffer_pool.h"
#include "qcow2/io/descriptors.h"
#include "qcow2/io/memory_backend.h"
#include "qcow2/io/thread_backend.h"
#include "qcow2/io/uring_backend.h"
#include "tests/unit/io/support.h"

namespace qvmstate::io {
namespace {

struct Kind {
  std::string name;
  bool direct;
};

std::string name_of(const testing::TestParamInfo<Kind> &info) {
  return info.param.name + (info.param.direct ? "_direct" : "_buffered");
}

class Backends : public testing::TestWithParam<Kind> {
 protected:
  static constexpr unsigned depth = 4;

  void SetUp() override {
    std::unique_ptr<Backend> backend;
    if (GetParam().name == "fake") {
      MemoryOptions options;
      options.direct_alignment = GetParam().direct ? 512 : 0;
      options.out_of_order = true;
      backend = std::make_unique<MemoryBackend>(Bytes{}, options);
    } else {
      auto descriptors =
          Descriptors::open(temporary_.path(), true,
                            GetParam().direct ? DirectMode::automatic : DirectMode::off, "file");
      ASSERT_TRUE(descriptors) << descriptors.error().message;
      if (GetParam().name == "io_uring") {
        auto uring = UringBackend::create(*descriptors, depth);
        if (!uring) {
          GTEST_SKIP() << uring.error().message;
        }
        backend = std::move(*uring);
      } else {
        auto threads = ThreadBackend::create(std::move(*descriptors), depth);
        ASSERT_TRUE(threads) << threads.error().message;
        backend = std::move(*threads);
      }
    }
    if (GetParam().direct && !backend->direct()) {
      GTEST_SKIP() << "no O_DIRECT in " << std::filesystem::temp_directory_path();
    }
    ASSERT_EQ(backend->direct(), GetParam().direct);
    ASSERT_EQ(backend->name(), GetParam().name);
    file_ = std::make_unique<File>(std::make_unique<WatchingBackend>(std::move(backend), watched_),
                                   "file", depth);
  }

  void TearDown() override {
    EXPECT_EQ(watched_.mixed, 0U);
    EXPECT_EQ(watched_.synchronous_overlap, 0U);
    EXPECT_LE(watched_.in_flight_max, depth);
  }

  void put(const Bytes &bytes, uint64_t offset) {
    const auto result = file_->write_at(bytes, HostOffset(offset));
    ASSERT_TRUE(result) << result.error().message;
  }

  Bytes get(size_t bytes, uint64_t offset) {
    Bytes read(bytes);
    const auto result = file_->read_at(read, HostOffset(offset));
    EXPECT_TRUE(result) << result.error().message;
    return read;
  }

  TemporaryFile temporary_;
  Watched watched_;
  std::unique_ptr<File> file_;
};

TEST_P(Backends, WritesAndReadsExactly) {
  const Bytes bytes = random_bytes(100'003, 1);
  put(bytes, 777);
  EXPECT_EQ(file_->size(), 777U + 100'003U);
  EXPECT_EQ(get(bytes.size(), 777), bytes);
  EXPECT_EQ(get(777, 0), Bytes(777));
  EXPECT_EQ(file_->bytes_written(), bytes.size());
  EXPECT_TRUE(file_->sync());
}

TEST_P(Backends, ReadPastTheEndFailsAndHarmsNothing) {
  const Bytes bytes = random_bytes(1000, 2);
  put(bytes, 0);
  Bytes read(1001);
  const auto result = file_->read_at(read, HostOffset(0));
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().code, ErrorCode::io);
  EXPECT_EQ(result.error().message,
            "file: cannot read 1001 bytes at offset 0: the file ends before");
  EXPECT_EQ(get(1000, 0), bytes);
}

TEST_P(Backends, ReadOrZeroFillsUpPastTheEnd) {
  const Bytes bytes = random_bytes(1000, 3);
  put(bytes, 0);
  Bytes expected(bytes.begin() + 600, bytes.end());
  expected.resize(2000);
  Bytes read(2000, std::byte{0xee});
  ASSERT_TRUE(file_->read_or_zero_at(read, HostOffset(600)));
  EXPECT_EQ(read, expected);
  std::ranges::fill(read, std::byte{0xee});
  ASSERT_TRUE(file_->read_or_zero_at(read, HostOffset(1 * mib)));
  EXPECT_EQ(read, Bytes(2000));
}

TEST_P(Backends, TransfersInFlightAllComeBackOnce) {
  constexpr size_t part = 64 * kib;
  constexpr unsigned count = 23;
  const Bytes bytes = random_bytes(part * count, 4);
  AlignedMemory memory(bytes);
  for (unsigned i = 0; i < count; ++i) {
    ASSERT_TRUE(file_->start_write(memory.span().subspan(i * part, part), HostOffset(i * part),
                                   no_buffer, 1000 + i));
    EXPECT_EQ(file_->pending(), i + 1);
  }
  std::set<uint64_t> cookies;
  while (file_->pending() > 0) {
    const auto cookie = file_->wait_any();
    ASSERT_TRUE(cookie) << cookie.error().message;
    EXPECT_TRUE(cookies.insert(*cookie).second);
  }
  EXPECT_EQ(cookies.size(), count);
  EXPECT_EQ(*cookies.begin(), 1000U);
  EXPECT_EQ(*cookies.rbegin(), 1000U + count - 1);
  EXPECT_EQ(file_->bytes_written(), bytes.size());
  EXPECT_EQ(watched_.in_flight_max, depth);
  EXPECT_EQ(watched_.started, count);
  EXPECT_EQ(GetParam().direct ? watched_.direct_started : watched_.buffered_started, count);
  EXPECT_EQ(get(bytes.size(), 0), bytes);

  AlignedMemory back(bytes.size());
  for (unsigned i = 0; i < count; ++i) {
    ASSERT_TRUE(
        file_->start_read(back.span().subspan(i * part, part), HostOffset(i * part), no_buffer, i));
  }
  ASSERT_TRUE(file_->drain());
  EXPECT_EQ(file_->pending(), 0U);
  EXPECT_EQ(back.copy(), bytes);
}

TEST_P(Backends, AsynchronousReadPastTheEndFails) {
  put(random_bytes(1000, 5), 0);
  AlignedMemory memory(4096);
  ASSERT_TRUE(file_->start_read(memory.span(), HostOffset(0), no_buffer, 0));
  const auto result = file_->wait_any();
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().message,
            "file: cannot read 4096 bytes at offset 0: the file ends before");
  EXPECT_EQ(file_->pending(), 0U);
}

TEST_P(Backends, UnalignedTransfersAreBufferedAndNeverMixWithDirectOnes) {
  constexpr size_t part = 8192;
  const Bytes bytes = random_bytes(16 * part, 6);
  AlignedMemory memory(bytes);
  AlignedMemory shifted(bytes.size() + 8);
  std::ranges::copy(bytes, shifted.span().begin() + 8);
  uint64_t at = 0;
  const auto write = [&](std::span<std::byte> from) {
    const auto result = file_->start_write(from, HostOffset(at), no_buffer, at);
    ASSERT_TRUE(result) << result.error().message;
    at += from.size();
  };
  write(memory.span().subspan(at, part));
  write(memory.span().subspan(at, part));
  write(shifted.span().subspan(at + 8, part));   // memory not aligned
  write(memory.span().subspan(at, part - 100));  // length not aligned
  write(memory.span().subspan(at, 100));         // offset and length not aligned
  while (at < bytes.size()) {
    write(memory.span().subspan(at, part));
  }
  ASSERT_TRUE(file_->drain());
  EXPECT_EQ(watched_.buffered_started, GetParam().direct ? 3U : 17U);
  EXPECT_EQ(watched_.direct_started, GetParam().direct ? 14U : 0U);
  EXPECT_EQ(get(bytes.size(), 0), bytes);
}

TEST_P(Backends, RegisteredBuffersCarryTheSameBytes) {
  auto pool = BufferPool::create(3, 64 * kib);
  ASSERT_TRUE(pool);
  file_->backend().register_buffers(pool->memory());
  const Bytes bytes = random_bytes(3 * 64 * kib, 7);
  for (unsigned i = 0; i < 3; ++i) {
    std::ranges::copy(std::span(bytes).subspan(i * 64 * kib, 64 * kib), pool->at(i).data);
    ASSERT_TRUE(file_->start_write({pool->at(i).data, 64 * kib}, HostOffset(i * 64 * kib), i, i));
  }
  ASSERT_TRUE(file_->drain());
  EXPECT_EQ(get(bytes.size(), 0), bytes);
  // Read back in reverse, one of them into memory that the index does not speak of.
  AlignedMemory other(64 * kib);
  ASSERT_TRUE(file_->start_read({pool->at(0).data, 64 * kib}, HostOffset(128 * kib), 0, 0));
  ASSERT_TRUE(file_->start_read({pool->at(1).data, 64 * kib}, HostOffset(64 * kib), 1, 1));
  ASSERT_TRUE(file_->start_read(other.span(), HostOffset(0), 2, 2));
  ASSERT_TRUE(file_->drain());
  EXPECT_TRUE(std::equal(bytes.begin() + 128 * kib, bytes.end(), pool->at(0).data));
  EXPECT_TRUE(std::equal(bytes.begin() + 64 * kib, bytes.begin() + 128 * kib, pool->at(1).data));
  EXPECT_TRUE(std::equal(bytes.begin(), bytes.begin() + 64 * kib, other.span().begin()));
  file_.reset();
}

TEST_P(Backends, SynchronousCallsWaitForWhatIsInFlight) {
  const Bytes bytes = random_bytes(1 * mib, 8);
  AlignedMemory memory(bytes);
  ASSERT_TRUE(file_->start_write(memory.span(), HostOffset(0), no_buffer, 42));
  EXPECT_EQ(get(bytes.size(), 0), bytes);
  EXPECT_EQ(watched_.in_flight, 0U);
  EXPECT_EQ(file_->pending(), 1U);
  EXPECT_EQ(file_->wait_any(), 42U);
}

TEST_P(Backends, ResizesBothWays) {
  put(random_bytes(10'000, 9), 0);
  ASSERT_TRUE(file_->resize(5000));
  EXPECT_EQ(file_->size(), 5000U);
  ASSERT_TRUE(file_->resize(10'000));
  EXPECT_EQ(get(5000, 5000), Bytes(5000));
}

TEST_P(Backends, PreallocateExtendsAndKeepsBytes) {
  const Bytes bytes = random_bytes(10'000, 10);
  put(bytes, 0);
  const auto reserved = file_->preallocate(HostOffset(4096), 1 * mib);
  ASSERT_TRUE(reserved) << reserved.error().message;
  if (!*reserved) {
    GTEST_SKIP() << "no fallocate in " << std::filesystem::temp_directory_path();
  }
  EXPECT_EQ(file_->size(), 4096 + 1 * mib);
  EXPECT_EQ(get(bytes.size(), 0), bytes);
  EXPECT_EQ(get(1000, 1 * mib), Bytes(1000));
}

TEST_P(Backends, PunchedRangesReadAsZerosAndTheSizeStays) {
  Bytes bytes = random_bytes(64 * kib, 11);
  put(bytes, 0);
  const auto punched = file_->punch_hole(HostOffset(8192), 16384);
  ASSERT_TRUE(punched) << punched.error().message;
  if (!*punched) {
    GTEST_SKIP() << "no hole punching in " << std::filesystem::temp_directory_path();
  }
  std::fill_n(bytes.begin() + 8192, 16384, std::byte{0});
  EXPECT_EQ(get(bytes.size(), 0), bytes);
  ASSERT_TRUE(file_->punch_hole(HostOffset(60 * kib), 1 * mib));
  EXPECT_EQ(file_->size(), 64 * kib);
}

TEST_P(Backends, DestructorWaitsForWhatIsInFlight) {
  AlignedMemory memory(random_bytes(1 * mib, 12));
  for (unsigned i = 0; i < depth; ++i) {
    ASSERT_TRUE(file_->start_write(memory.span(), HostOffset(i * mib), no_buffer, i));
  }
  file_.reset();
  EXPECT_EQ(watched_.in_flight, 0U);
}

INSTANTIATE_TEST_SUITE_P(All, Backends,
                         testing::Values(Kind{"io_uring", false}, Kind{"io_uring", true},
                                         Kind{"threads", false}, Kind{"threads", true},
                                         Kind{"fake", false}, Kind{"fake", true}),
                         name_of);

}  // namespace
}  // namespace qvmstate::io
