// Reading ahead gives the same bytes as the source, in any order of reads.
#include "vmstate/read_ahead_source.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "qcow2/io/memory_backend.h"

namespace qvmstate::vmstate {
namespace {

constexpr uint64_t unit = 48 * kib;  // runs of each kind, which do not fit pieces of 1 MiB

/// Runs in turn in the file, zeros, and neither; in the file each at its own distance.
class Mixed : public StreamSource {
 public:
  explicit Mixed(uint64_t bytes) : bytes_(bytes) {
    auto backend = std::make_unique<io::MemoryBackend>();
    file_ = std::make_unique<io::File>(std::move(backend), "memory", 8);
    std::mt19937 random(7);
    for (uint64_t at = 0; at < bytes; ++at) {
      stream_.push_back(at / unit % 3 == 1 ? std::byte{0} : static_cast<std::byte>(random()));
    }
    const Result<void> written = file_->write_at(stream_, HostOffset(shift));
    EXPECT_TRUE(written);
  }
  Result<void> read(StreamOffset offset, std::span<std::byte> to) override {
    if (offset.value > bytes_ || to.size() > bytes_ - offset.value) {
      return fail(ErrorCode::bad_stream, "past the end");
    }
    std::copy_n(stream_.begin() + static_cast<ptrdiff_t>(offset.value), to.size(), to.begin());
    return {};
  }
  uint64_t bytes_max() const override { return bytes_; }
  Result<StreamRun> run_at(StreamOffset offset, uint64_t bytes) override {
    const uint64_t index = offset.value / unit;
    const auto kind = index % 3 == 0   ? StreamRun::Kind::in_file
                      : index % 3 == 1 ? StreamRun::Kind::zeros
                                       : StreamRun::Kind::other;
    return StreamRun{kind, std::min(bytes, (index + 1) * unit - offset.value),
                     HostOffset(offset.value + shift)};
  }
  io::File *file() override { return file_.get(); }
  const std::vector<std::byte> &stream() const { return stream_; }

 private:
  static constexpr uint64_t shift = 777;
  uint64_t bytes_;
  std::vector<std::byte> stream_;
  std::unique_ptr<io::File> file_;
};

TEST(ReadAhead, AnyOrderOfReadsGivesTheBytesOfTheSource) {
  const uint64_t bytes = 9 * mib + 12345;
  auto owned = std::make_unique<Mixed>(bytes);
  const std::vector<std::byte> stream = owned->stream();
  const auto ahead = ReadAheadSource::create(std::move(owned));
  ASSERT_TRUE(ahead);
  std::mt19937_64 random(1);
  uint64_t offset = 0;
  for (int i = 0; i < 150; ++i) {
    if (i % 10 == 0) {
      offset = random() % bytes;
    }
    std::vector<std::byte> part(std::min<uint64_t>(random() % (3 * mib), bytes - offset));
    ASSERT_TRUE((*ahead)->read(StreamOffset(offset), part));
    ASSERT_TRUE(
        std::equal(part.begin(), part.end(), stream.begin() + static_cast<ptrdiff_t>(offset)))
        << offset;
    offset = (offset + part.size()) % bytes;
  }
}

TEST(ReadAhead, PastTheEndIsWhatTheSourceSays) {
  const auto ahead = ReadAheadSource::create(std::make_unique<Mixed>(mib));
  ASSERT_TRUE(ahead);
  std::vector<std::byte> part(2);
  EXPECT_TRUE((*ahead)->read(StreamOffset(mib - 2), part));
  EXPECT_FALSE((*ahead)->read(StreamOffset(mib - 1), part));
  EXPECT_FALSE((*ahead)->read(StreamOffset(UINT64_MAX), part));
  EXPECT_TRUE((*ahead)->read(StreamOffset(0), part));
}

}  // namespace
}  // namespace qvmstate::vmstate
