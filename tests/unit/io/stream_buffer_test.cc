// The stream over the fake: the whole content, whatever is cut, split or reordered.
#include "qcow2/io/stream_buffer.h"

#include "qcow2/io/memory_backend.h"
#include "tests/unit/io/support.h"

namespace qvmstate::io {
namespace {

constexpr size_t buffer_bytes = 16 * kib;
constexpr uint64_t unit = 512;

/// Runs of given sizes, in turn, each laid `gap` bytes behind the one before; writes down what it
/// was asked, and gathers the stream again from the file.
class ScatteredPlacement : public Placement {
 public:
  ScatteredPlacement(std::vector<uint64_t> run_bytes, uint64_t gap)
      : run_bytes_(std::move(run_bytes)), gap_(gap) {}

  Result<void> place(StreamOffset from, uint64_t bytes, std::vector<HostRun> &runs) override {
    if (asked.size() == fail_at) {
      return fail(ErrorCode::no_space, "no place");
    }
    EXPECT_EQ(from.value, placed_);
    asked.push_back(bytes);
    placed_ += bytes;
    while (bytes > 0) {
      const uint64_t count = std::min(bytes, left_in_run_);
      if (count > 0) {
        runs.push_back({HostOffset(next_), count});
        all_runs_.push_back(runs.back());
      }
      next_ += count;
      left_in_run_ -= count;
      bytes -= count;
      if (left_in_run_ == 0) {
        next_ += gap_;
        left_in_run_ = run_bytes_[turn_++ % run_bytes_.size()];
      }
    }
    return {};
  }
  uint64_t unit_bytes() const override { return unit; }

  Bytes gather(const Bytes &file) const {
    Bytes stream;
    for (const HostRun &run : all_runs_) {
      EXPECT_LE(run.offset.value + run.bytes, file.size());
      const auto begin = file.begin() + static_cast<ptrdiff_t>(run.offset.value);
      stream.insert(stream.end(), begin, begin + static_cast<ptrdiff_t>(run.bytes));
    }
    return stream;
  }

  /// Whether the stream in the file begins like this, as far as it was placed.
  bool begins_with(const Bytes &file, const Bytes &stream) const {
    size_t at = 0;
    for (const HostRun &run : all_runs_) {
      const size_t count = std::min<size_t>(run.bytes, stream.size() - at);
      if (count > 0 && (run.offset.value + count > file.size() ||
                        !std::equal(stream.begin() + static_cast<ptrdiff_t>(at),
                                    stream.begin() + static_cast<ptrdiff_t>(at + count),
                                    file.begin() + static_cast<ptrdiff_t>(run.offset.value)))) {
        return false;
      }
      at += count;
    }
    return at == stream.size();
  }

  std::vector<uint64_t> asked;
  size_t fail_at = SIZE_MAX;

 private:
  std::vector<uint64_t> run_bytes_;
  uint64_t gap_;
  uint64_t placed_ = 0;
  uint64_t next_ = 0;
  uint64_t left_in_run_ = 0;
  size_t turn_ = 0;
  std::vector<HostRun> all_runs_;
};

struct Stream {
  explicit Stream(MemoryOptions options = {}, size_t buffers = 4, unsigned depth = 4,
                  FlushHook hook = {}, std::vector<uint64_t> run_bytes = {1 * mib})
      : placement(std::move(run_bytes), 4096),
        pool(BufferPool::create(buffers, buffer_bytes).value()) {
    auto backend = std::make_unique<MemoryBackend>(Bytes{}, std::move(options));
    memory = backend.get();
    file = std::make_unique<File>(std::make_unique<WatchingBackend>(std::move(backend), watched),
                                  "file", depth);
    stream.emplace(*file, pool, placement, std::move(hook));
  }

  void expect_all_free() {
    EXPECT_EQ(file->pending(), 0U);
    EXPECT_EQ(watched.in_flight, 0U);
    for (unsigned i = 0; i < pool.count(); ++i) {
      EXPECT_EQ(pool.at(i).state, BufferState::free) << i;
    }
  }

  Watched watched;
  ScatteredPlacement placement;
  BufferPool pool;
  MemoryBackend *memory;
  std::unique_ptr<File> file;
  std::optional<StreamBuffer> stream;
};

class SeededStream : public testing::TestWithParam<uint64_t> {};

TEST_P(SeededStream, WholeContentArrivesWhateverHappensToTransfers) {
  const uint64_t seed = GetParam();
  MemoryOptions options;
  options.seed = seed;
  options.short_percent = 20;
  options.interrupted_percent = 10;
  options.again_percent = 10;
  options.out_of_order = true;
  // Runs end in the middle of buffers; some buffers lie in several.
  Stream s(options, 2 + seed % 4, 1 + static_cast<unsigned>(seed) % 6, {},
           {10 * kib, 512, 40 * kib, 1536});
  std::mt19937_64 random(seed);
  const Bytes bytes = random_bytes(40 * buffer_bytes + random() % buffer_bytes, seed);
  size_t at = 0;
  while (at < bytes.size()) {
    if (random() % 2 == 0) {
      const size_t count = std::min<size_t>(random() % 40'000, bytes.size() - at);
      ASSERT_TRUE(s.stream->put(std::span(bytes).subspan(at, count)));
      at += count;
    } else {
      const auto room = s.stream->space();
      ASSERT_TRUE(room);
      ASSERT_FALSE(room->empty());
      const size_t count = std::min({random() % room->size() + 1, bytes.size() - at});
      std::copy_n(bytes.begin() + static_cast<ptrdiff_t>(at), count, room->begin());
      ASSERT_TRUE(s.stream->advance(count));
      at += count;
    }
    ASSERT_EQ(s.stream->tell(), at);
    ASSERT_LE(s.stream->landed(), at);
    // The file holds what landed.
    const Bytes landed(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(s.stream->landed()));
    ASSERT_TRUE(s.placement.begins_with(s.memory->contents(), landed));
  }
  ASSERT_TRUE(s.stream->finish());
  s.expect_all_free();
  Bytes padded = bytes;
  padded.resize(round_up(bytes.size(), unit));
  EXPECT_EQ(s.placement.gather(s.memory->contents()), padded);
  EXPECT_EQ(s.stream->tell(), bytes.size());
  EXPECT_LE(s.watched.in_flight_max, 1 + seed % 6);
}

INSTANTIATE_TEST_SUITE_P(Seeds, SeededStream, testing::Range<uint64_t>(0, 30));

TEST(StreamBuffer, OnlyTheLastBufferIsPartialAndPadded) {
  Stream s;
  ASSERT_TRUE(s.stream->put(Bytes(2 * buffer_bytes + 700, std::byte{0x11})));
  EXPECT_EQ(s.placement.asked, (std::vector<uint64_t>{buffer_bytes, buffer_bytes}));
  EXPECT_EQ(s.stream->tell(), 2 * buffer_bytes + 700);
  ASSERT_TRUE(s.stream->finish());
  EXPECT_EQ(s.placement.asked, (std::vector<uint64_t>{buffer_bytes, buffer_bytes, 1024}));
  Bytes expected(2 * buffer_bytes + 700, std::byte{0x11});
  expected.resize(2 * buffer_bytes + 1024);
  EXPECT_EQ(s.placement.gather(s.memory->contents()), expected);
  EXPECT_EQ(s.stream->tell(), 2 * buffer_bytes + 700);
}

TEST(StreamBuffer, PaddingIsZeroInAReusedBuffer) {
  Stream s({}, 2);
  ASSERT_TRUE(s.stream->put(Bytes(4 * buffer_bytes + 1, std::byte{0xff})));
  ASSERT_TRUE(s.stream->finish());
  Bytes expected(4 * buffer_bytes + 1, std::byte{0xff});
  expected.resize(4 * buffer_bytes + 512);
  EXPECT_EQ(s.placement.gather(s.memory->contents()), expected);
}

TEST(StreamBuffer, AnEmptyStreamWritesNothing) {
  Stream s;
  ASSERT_TRUE(s.stream->space());
  ASSERT_TRUE(s.stream->finish());
  EXPECT_TRUE(s.placement.asked.empty());
  EXPECT_TRUE(s.memory->journal().empty());
  s.expect_all_free();
}

TEST(StreamBuffer, AFlushWaitsForNothingWhileBuffersAreFree) {
  Stream s({}, 4, 4);
  ASSERT_TRUE(s.stream->put(Bytes(3 * buffer_bytes)));
  EXPECT_EQ(s.watched.in_flight, 3U);
  ASSERT_TRUE(s.stream->put(Bytes(buffer_bytes)));
  EXPECT_EQ(s.watched.in_flight, 4U);
  EXPECT_TRUE(s.memory->journal().empty());
  EXPECT_EQ(s.stream->landed(), 0U);
  ASSERT_TRUE(s.stream->put(Bytes(1)));  // Needs a buffer: waits for one transfer, no more.
  EXPECT_EQ(s.watched.in_flight, 3U);
  EXPECT_EQ(s.stream->landed(), buffer_bytes);
}

TEST(StreamBuffer, TheHookHearsOfEachFlushAndStopsTheStream) {
  std::vector<uint64_t> heard;
  Stream s({}, 4, 4, [&heard](uint64_t flushed) -> Result<void> {
    heard.push_back(flushed);
    if (heard.size() == 3) {
      return fail(ErrorCode::cancelled, "stopped by the user");
    }
    return {};
  });
  const auto result = s.stream->put(Bytes(10 * buffer_bytes));
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().code, ErrorCode::cancelled);
  EXPECT_EQ(heard, (std::vector<uint64_t>{buffer_bytes, 2 * buffer_bytes, 3 * buffer_bytes}));
  s.expect_all_free();
  EXPECT_EQ(s.stream->space().error().code, ErrorCode::cancelled);
  EXPECT_EQ(s.stream->put(Bytes(1)).error().code, ErrorCode::cancelled);
  EXPECT_EQ(s.stream->advance(0).error().code, ErrorCode::cancelled);
  EXPECT_EQ(s.stream->finish().error().code, ErrorCode::cancelled);
  EXPECT_EQ(heard.size(), 3U);
  EXPECT_TRUE(s.file->sync()) << "the file itself has no error";
}

TEST(StreamBuffer, TheDataHookSeesTheStreamWithoutPadding) {
  auto backend = std::make_unique<MemoryBackend>();
  File file(std::move(backend), "memory", 4);
  auto pool = BufferPool::create(2, buffer_bytes);
  ScatteredPlacement placement({1 * mib}, 0);
  Bytes seen;
  std::vector<size_t> parts;
  StreamBuffer out(file, *pool, placement, {}, [&](std::span<const std::byte> data) {
    seen.insert(seen.end(), data.begin(), data.end());
    parts.push_back(data.size());
  });
  const Bytes content = random_bytes(2 * buffer_bytes + 700, 9);
  ASSERT_TRUE(out.put(content));
  ASSERT_TRUE(out.finish());
  EXPECT_EQ(seen, content);
  EXPECT_EQ(parts, (std::vector<size_t>{buffer_bytes, buffer_bytes, 700}));
}

TEST(StreamBuffer, AWriteErrorStopsTheStream) {
  for (uint64_t nth = 0; nth < 12; ++nth) {
    MemoryOptions options;
    options.faults = {{FileOperation::write, nth, -ENOSPC}};
    options.out_of_order = true;
    options.seed = nth;
    Stream s(options, 3, 2, {}, {10 * kib});
    Result<void> result = s.stream->put(Bytes(6 * buffer_bytes + 5));
    if (result) {
      result = s.stream->finish();
    }
    // 97 KiB in runs of 10 KiB that are cut at buffer borders: more than 12 transfers.
    ASSERT_FALSE(result) << nth;
    EXPECT_EQ(result.error().code, ErrorCode::no_space);
    s.expect_all_free();
    EXPECT_EQ(s.stream->put(Bytes(1)).error().code, ErrorCode::no_space);
    const size_t changes = s.memory->journal().size();
    s.stream.reset();
    EXPECT_EQ(s.memory->journal().size(), changes);
  }
}

TEST(StreamBuffer, APlacementErrorStopsTheStream) {
  Stream s;
  s.placement.fail_at = 2;
  const auto result = s.stream->put(Bytes(5 * buffer_bytes));
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().message, "no place");
  s.expect_all_free();
  EXPECT_EQ(s.stream->finish().error().message, "no place");
}

TEST(StreamBuffer, TheDestructorWaitsAndGivesBack) {
  Stream s;
  ASSERT_TRUE(s.stream->put(Bytes(3 * buffer_bytes + 9)));
  EXPECT_EQ(s.watched.in_flight, 3U);
  s.stream.reset();
  s.expect_all_free();
  EXPECT_EQ(s.memory->journal().size(), 3U);
}

}  // namespace
}  // namespace qvmstate::io
