// Reading ahead: the same bytes as without, in any order, and nothing behind what was expected.

#include "vmstate/read_ahead.h"

#include <random>

#include "stream_fixture.h"
#include "vmstate/file_source.h"

namespace qvmstate::vmstate::test {
namespace {

constexpr size_t file_bytes = 5 * 1024 * 1024 + 12345;

Blob random_blob(size_t bytes) {
  std::mt19937 random(7);
  Blob blob(bytes);
  for (std::byte &byte : blob) {
    byte = static_cast<std::byte>(random());
  }
  return blob;
}

/// A file in memory.
struct Fixture {
  explicit Fixture(uint64_t expected_bytes, io::MemoryOptions options = {})
      : contents(random_blob(file_bytes)) {
    auto file = std::make_unique<io::File>(
        std::make_unique<io::MemoryBackend>(contents, std::move(options)), "memory", 4);
    source = std::move(*FileSource::create(std::move(file)));
    ahead = std::move(*ReadAhead::create(*source, expected_bytes));
  }
  void expect(uint64_t offset, size_t bytes) const {
    Blob got(bytes);
    const auto read = ahead->read(StreamOffset(offset), got);
    ASSERT_TRUE(read) << read.error().message;
    EXPECT_TRUE(std::equal(got.begin(), got.end(), contents.begin() + static_cast<long>(offset)))
        << offset;
  }
  Blob contents;
  std::unique_ptr<FileSource> source;
  std::unique_ptr<ReadAhead> ahead;
};

TEST(ReadAhead, FromBeginToEnd) {
  for (const uint64_t expected :
       {uint64_t{0}, uint64_t{3000000}, uint64_t{file_bytes}, UINT64_MAX}) {
    const Fixture fixture(expected);
    for (uint64_t at = 0; at < file_bytes; at += 100000) {
      fixture.expect(at, std::min<uint64_t>(100000, file_bytes - at));
    }
  }
}

TEST(ReadAhead, InAnyOrder) {
  const Fixture fixture(file_bytes);
  std::mt19937 random(3);
  for (int i = 0; i < 60; ++i) {
    const uint64_t at = random() % file_bytes;
    fixture.expect(at, std::min<uint64_t>(random() % 3000000, file_bytes - at));
  }
}

TEST(ReadAhead, ErrorsAreThoseOfTheFile) {
  io::MemoryOptions options;
  options.faults.push_back({io::FileOperation::read, 3, -EIO});
  const Fixture fixture(file_bytes, options);
  Blob all(file_bytes);
  const auto read = fixture.ahead->read(StreamOffset(0), all);
  ASSERT_FALSE(read);
  EXPECT_EQ(read.error().sys_errno, EIO);
}

}  // namespace
}  // namespace qvmstate::vmstate::test
