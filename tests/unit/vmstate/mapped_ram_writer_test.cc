// The bytes of the mapped-ram layout, by hand from the format; channels, rounds, and what stays
// unwritten.
#include "vmstate/mapped_ram_writer.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <mutex>

#include "qcow2/io/file_placement.h"
#include "stream_fixture.h"

namespace qvmstate::vmstate::test {
namespace {

const StreamConfiguration pc = {"pc-test", {}, page};

/// A real file, because several channels write it.
class Target {
 public:
  Target() : path_(::testing::TempDir() + "mapped-ram-" + std::to_string(::getpid())) {
    std::filesystem::remove(path_);
    std::ofstream(path_).close();
  }
  ~Target() { std::filesystem::remove(path_); }

  std::unique_ptr<io::File> open(unsigned depth) const {
    io::OpenOptions options;
    options.writable = true;
    options.depth = depth;
    auto file = io::File::open(path_, options);
    EXPECT_TRUE(file) << file.error().message;
    return std::move(*file);
  }
  Blob bytes() const {
    Blob bytes(std::filesystem::file_size(path_));
    std::ifstream(path_, std::ios::binary)
        .read(reinterpret_cast<char *>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    return bytes;
  }
  static constexpr std::byte filler{0xaa};
  /// What is not written shows.
  void fill(size_t bytes) const {
    std::ofstream(path_, std::ios::binary) << std::string(bytes, static_cast<char>(filler));
  }
  uint64_t blocks() const {
    struct stat status = {};
    ::stat(path_.c_str(), &status);
    return static_cast<uint64_t>(status.st_blocks) * 512;
  }

 private:
  std::string path_;
};

/// Files, pools and sources of some channels over one target.
class Channels {
 public:
  Channels(const Target &target, std::span<FakeRam> sources) {
    for (FakeRam &source : sources) {
      files_.push_back(target.open(8));
      auto pool = io::BufferPool::create(2, 1 * mib);
      EXPECT_TRUE(pool);
      pools_.push_back(std::make_unique<io::BufferPool>(std::move(*pool)));
      channels_.push_back({files_.back().get(), &source, pools_.back().get()});
    }
  }
  std::span<const RamChannel> all() const { return channels_; }

 private:
  std::vector<std::unique_ptr<io::File>> files_;
  std::vector<std::unique_ptr<io::BufferPool>> pools_;
  std::vector<RamChannel> channels_;
};

std::vector<Touch> pattern(size_t pages, std::initializer_list<Touch> repeated) {
  std::vector<Touch> touch;
  while (touch.size() < pages) {
    touch.insert(touch.end(), repeated);
  }
  touch.resize(pages);
  return touch;
}

Blob slice(const Blob &bytes, uint64_t at, uint64_t count) {
  return {bytes.begin() + static_cast<ptrdiff_t>(at),
          bytes.begin() + static_cast<ptrdiff_t>(at + count)};
}

struct Saved {
  Result<StreamStats> stats;
  Blob bytes;
};

Saved save(const Target &target, std::span<FakeRam> sources, const MappedWriteOptions &options) {
  Channels channels(target, sources);
  io::FilePlacement placement(options.start_bytes);
  auto writer = MappedRamWriter::plan(pc, sources[0].blocks(), {}, options);
  EXPECT_TRUE(writer) << writer.error().message;
  auto written = writer->write_pages(channels.all(), placement, {});
  EXPECT_TRUE(written) << written.error().message;
  const auto file = target.open(1);
  auto stats = writer->finish(*file, placement, {});
  return {std::move(stats), target.bytes()};
}

TEST(MappedRamWriter, WritesTheBytesOfTheFormat) {
  FakeRam ram(true);
  const auto three = pattern(3, {Touch::data, Touch::zero, Touch::data});
  const auto one = pattern(1, {Touch::untouched});
  ram.add_block("a.ram", three, 1);
  ram.add_block("rom", one, 2);
  const Target target;
  const Saved saved = save(target, std::span(&ram, 1), {});
  ASSERT_TRUE(saved.stats);

  // The head: QEVM, version 3, configuration with the capability, RAM START with its block list.
  Bytes head;
  head.u32(0x5145564d).u32(3);
  head.u8(0x07).u32(7).text("pc-test");
  head.u8(0x05).u8(26).text("configuration/capabilities").u32(1).u32(1).u8(10).text("mapped-ram");
  head.u8(0x01).u32(0x7fffffff).u8(3).text("ram").u32(0).u32(4);
  head.u64(4 * page | 0x004);
  const uint64_t first_header = head.done().size();
  const uint64_t first_bitmap = first_header + 1 + 5 + 8 + 28;
  head.u8(5).text("a.ram").u64(3 * page);
  head.u32(1).u64(page).u64(first_bitmap).u64(1 * mib);
  head.u8(0b101).fill(7, 0);  // pages 0 and 2, least significant bit first
  EXPECT_EQ(slice(saved.bytes, 0, head.done().size()), head.done());

  const Blob memory = ram.expected(0);
  EXPECT_EQ(slice(saved.bytes, 1 * mib, page), slice(memory, 0, page));
  EXPECT_EQ(slice(saved.bytes, 1 * mib + 2 * page, page), slice(memory, 2 * page, page));

  Bytes second;
  const uint64_t second_header = 1 * mib + 3 * page;
  second.u8(3).text("rom").u64(page).u32(1).u64(page);
  second.u64(second_header + 1 + 3 + 8 + 28).u64(2 * mib);
  second.fill(8, 0);
  EXPECT_EQ(slice(saved.bytes, second_header, second.done().size()), second.done());

  Bytes tail;
  tail.u64(0x010).u8(0x7e).u32(0x7fffffff);
  tail.u8(0x03).u32(0x7fffffff).u64(0x010).u8(0x7e).u32(0x7fffffff);
  tail.u8(0x00).u8(0x06);
  EXPECT_EQ(slice(saved.bytes, 2 * mib + page, tail.done().size()), tail.done());

  EXPECT_EQ(saved.stats->data_pages, 2U);
  EXPECT_EQ(saved.stats->zero_pages, 1U);
  EXPECT_EQ(saved.stats->untouched_pages, 1U);
  EXPECT_EQ(saved.stats->copied_bytes, 0U);
  EXPECT_EQ(saved.stats->stream_bytes, saved.bytes.size());
}

TEST(MappedRamWriter, OffsetsCountFromTheStartOfTheFile) {
  FakeRam ram(true);
  ram.add_block("a.ram", pattern(2, {Touch::data}), 1);
  const Target target;
  MappedWriteOptions options;
  options.start_bytes = 3 * mib + 512;
  const Saved saved = save(target, std::span(&ram, 1), options);
  ASSERT_TRUE(saved.stats);
  EXPECT_EQ(slice(saved.bytes, 0, options.start_bytes), Blob(options.start_bytes));
  EXPECT_EQ(load_be<uint32_t>(&saved.bytes[options.start_bytes]), 0x5145564dU);
  EXPECT_EQ(slice(saved.bytes, 4 * mib, 2 * page), ram.expected(0));
  EXPECT_EQ(saved.stats->stream_bytes, saved.bytes.size() - options.start_bytes);
}

TEST(MappedRamWriter, AllPagesPresentSetsExactlyThePagesBits) {
  FakeRam ram(true);
  ram.add_block("a.ram", pattern(65, {Touch::zero}), 1);
  const Target target;
  MappedWriteOptions options;
  options.all_pages_present = true;
  const Saved saved = save(target, std::span(&ram, 1), options);
  ASSERT_TRUE(saved.stats);
  Bytes bitmap;
  bitmap.fill(8, 0xff).u8(0x01).fill(7, 0);
  const std::string name =
      "\x05"
      "a.ram";
  const auto *begin = reinterpret_cast<const char *>(saved.bytes.data());
  const size_t header = std::string_view(begin, 4096).find(name);
  ASSERT_NE(header, std::string_view::npos);
  EXPECT_EQ(slice(saved.bytes, header + 6 + 8 + 28, 16), bitmap.done());
  EXPECT_EQ(saved.stats->zero_pages, 65U);
  EXPECT_LT(target.blocks(), 64 * kib);  // no page was written
}

TEST(MappedRamWriter, ChannelsWriteTheSameFileAsOne) {
  for (const bool has_view : {true, false}) {
    std::vector<FakeRam> sources;
    for (int i = 0; i < 4; ++i) {
      FakeRam ram(has_view);
      // Not a multiple of 64 pages, of 1 MiB, nor of a cluster.
      ram.add_block(
          "big",
          pattern(2500, {Touch::data, Touch::data, Touch::zero, Touch::untouched, Touch::data}), 7);
      ram.add_block("one", pattern(1, {Touch::data}), 8);
      ram.add_block("odd", pattern(321, {Touch::untouched, Touch::data}), 9);
      sources.push_back(std::move(ram));
    }
    const Target one;
    const Saved alone = save(one, std::span(sources).first(1), {});
    const Target four;
    const Saved together = save(four, sources, {});
    ASSERT_TRUE(alone.stats && together.stats);
    EXPECT_TRUE(alone.bytes == together.bytes);
    EXPECT_EQ(alone.stats->data_pages, together.stats->data_pages);
    EXPECT_EQ(alone.stats->untouched_pages, together.stats->untouched_pages);
    EXPECT_EQ(alone.stats->copied_bytes, together.stats->copied_bytes);
    EXPECT_EQ(alone.stats->copied_bytes == 0, has_view);
    // Pages are at a multiple of 1 MiB after a head of a few hundred bytes.
    const Blob expected = sources[0].expected(0);
    EXPECT_TRUE(slice(together.bytes, 1 * mib, expected.size()) == expected);
  }
}

TEST(MappedRamWriter, ALaterRoundSupersedesAndClears) {
  FakeRam ram(true);
  ram.add_block("a.ram", pattern(5, {Touch::data}), 1);
  const Target target;
  io::FilePlacement placement(0);
  auto writer = MappedRamWriter::plan(pc, ram.blocks(), {}, {});
  ASSERT_TRUE(writer);
  {
    Channels channels(target, std::span(&ram, 1));
    ASSERT_TRUE(writer->write_pages(channels.all(), placement, {}));
    std::fill_n(ram.memory(0).begin() + 1 * page, page, std::byte{0});     // became zero
    std::fill_n(ram.memory(0).begin() + 2 * page, page, std::byte{0x77});  // changed
    std::fill_n(ram.memory(0).begin() + 3 * page, page, std::byte{0x33});  // not said to be dirty
    const uint64_t words[] = {0b00110};
    const uint64_t *const bitmaps[] = {words};
    const DirtyPages dirty(bitmaps);
    ASSERT_TRUE(writer->write_pages(channels.all(), placement, {}, &dirty));
  }
  const auto file = target.open(1);
  const auto stats = writer->finish(*file, placement, {});
  ASSERT_TRUE(stats);
  const Blob bytes = target.bytes();
  EXPECT_EQ(stats->data_pages, 4U);
  EXPECT_EQ(slice(bytes, 1 * mib + page, page), Blob(page));
  EXPECT_EQ(slice(bytes, 1 * mib + 2 * page, page), Blob(page, std::byte{0x77}));
  EXPECT_NE(slice(bytes, 1 * mib + 3 * page, page), Blob(page, std::byte{0x33}));
  const auto *begin = reinterpret_cast<const char *>(bytes.data());
  const size_t header = std::string_view(begin, 4096)
                            .find(
                                "\x05"
                                "a.ram");
  EXPECT_EQ(bytes[header + 6 + 8 + 28], std::byte{0b11101});
}

/// Zero pages between others: written with them only when they cannot change meanwhile.
TEST(MappedRamWriter, NothingIsBridgedWhileRamChanges) {
  for (const bool ram_changes : {false, true}) {
    FakeRam ram(true);
    ram.add_block("a.ram", pattern(9, {Touch::data, Touch::zero, Touch::data}), 1);
    const Target target;
    target.fill(2 * mib);
    MappedWriteOptions options;
    options.ram_changes = ram_changes;
    const Saved saved = save(target, std::span(&ram, 1), options);
    ASSERT_TRUE(saved.stats);
    EXPECT_EQ(slice(saved.bytes, 1 * mib + page, page),
              Blob(page, ram_changes ? Target::filler : std::byte{0}));
  }
}

TEST(MappedRamWriter, WhatLandedIsToldOnce) {
  for (const bool has_view : {true, false}) {
    std::vector<FakeRam> sources;
    for (int i = 0; i < 2; ++i) {
      FakeRam ram(has_view);
      ram.add_block("big", pattern(2500, {Touch::data, Touch::zero, Touch::untouched}), 7);
      ram.add_block("zero", pattern(300, {Touch::zero}), 8);
      sources.push_back(std::move(ram));
    }
    const Target target;
    std::mutex mutex;
    std::vector<std::vector<int>> landed = {std::vector<int>(2500), std::vector<int>(300)};
    MappedWriteOptions options;
    options.on_landed = [&](size_t block, uint64_t offset, uint64_t bytes) {
      const std::lock_guard lock(mutex);
      for (uint64_t at = offset; at < offset + bytes; at += page) {
        landed[block].at(at / page) += 1;
      }
    };
    ASSERT_TRUE(save(target, sources, options).stats);
    EXPECT_EQ(landed[0], std::vector<int>(2500, 1));
    EXPECT_EQ(landed[1], std::vector<int>(300, 1));
  }
}

TEST(MappedRamWriter, TheChecksumIsThatOfTheBytesInTheFile) {
  // Blocks whose ends share a MiB with what follows them, one of whole MiBs, one all zero.
  for (const bool has_view : {true, false}) {
    for (const size_t count : {1U, 3U}) {
      std::vector<FakeRam> sources;
      for (size_t i = 0; i < count; ++i) {
        FakeRam ram(has_view);
        ram.add_block("odd", pattern(1000, {Touch::data, Touch::zero, Touch::untouched}), 1);
        ram.add_block("small", pattern(3, {Touch::zero, Touch::data}), 2);
        ram.add_block("whole", pattern(512, {Touch::data}), 3);
        ram.add_block("zero", pattern(700, {Touch::untouched, Touch::zero}), 4);
        ram.add_block("last", pattern(257, {Touch::data, Touch::data, Touch::zero}), 5);
        sources.push_back(std::move(ram));
      }
      const Target target;
      MappedWriteOptions options;
      options.checksum = true;
      options.all_pages_present = has_view;
      const Saved saved = save(target, sources, options);
      ASSERT_TRUE(saved.stats);
      StreamDigest digest;
      digest.add(slice(saved.bytes, 0, saved.stats->stream_bytes));
      EXPECT_EQ(saved.stats->checksum, digest.finish());
    }
  }
}

TEST(MappedRamWriter, AnErrorOfOneChannelStopsAll) {
  std::vector<FakeRam> sources;
  for (int i = 0; i < 2; ++i) {
    FakeRam ram(false);
    ram.add_block("big", pattern(5000, {Touch::data}), 7);
    sources.push_back(std::move(ram));
  }
  const Target target;
  Channels channels(target, sources);
  io::FilePlacement placement(0);
  auto writer = MappedRamWriter::plan(pc, sources[0].blocks(), {}, {});
  ASSERT_TRUE(writer);
  uint64_t done_at_error = 0;
  const auto written =
      writer->write_pages(channels.all(), placement, [&](uint64_t done, uint64_t) -> Result<void> {
        if (done >= 4 * mib) {
          done_at_error = done_at_error == 0 ? done : done_at_error;
          return fail(ErrorCode::cancelled, "enough");
        }
        return {};
      });
  ASSERT_FALSE(written);
  EXPECT_EQ(written.error().code, ErrorCode::cancelled);
  EXPECT_EQ(written.error().message, "enough");
  EXPECT_EQ(done_at_error, 4 * mib);
}

TEST(MappedRamWriter, AFailedWriteIsReported) {
  FakeRam ram(true);
  ram.add_block("a.ram", pattern(600, {Touch::data}), 1);
  io::MemoryOptions options;
  options.faults.push_back({io::FileOperation::write, 1, -EIO});
  io::File file(std::make_unique<io::MemoryBackend>(Blob{}, options), "memory", 4);
  auto pool = io::BufferPool::create(2, 1 * mib);
  const RamChannel channel = {&file, &ram, &*pool};
  io::FilePlacement placement(0);
  auto writer = MappedRamWriter::plan(pc, ram.blocks(), {}, {});
  ASSERT_TRUE(writer);
  const auto written = writer->write_pages(std::span(&channel, 1), placement, {});
  ASSERT_FALSE(written);
  EXPECT_EQ(written.error().sys_errno, EIO);
}

}  // namespace
}  // namespace qvmstate::vmstate::test
