// Reading streams in the mapped-ram layout one page after the other, and hostile ones.

#include <random>

#include "mapped_fixture.h"
#include "qcow2/io/endian.h"

namespace qvmstate::vmstate::test {
namespace {

struct ReadBack {
  Result<StreamSummary> summary;
  std::vector<Blob> blocks;
};

/// Reads a stream, checking that the pages of each block come in order.
ReadBack read_back(StreamSource &source, uint64_t start = 0) {
  std::vector<Blob> blocks;
  auto summary = read_stream(
      source,
      [&](size_t block, uint64_t offset, uint64_t page_bytes, auto data) -> Result<void> {
        blocks.resize(std::max(blocks.size(), block + 1));
        EXPECT_EQ(block, blocks.size() - 1);
        EXPECT_EQ(offset, blocks[block].size());
        if (data.empty()) {
          blocks[block].resize(offset + page_bytes);
        } else {
          EXPECT_EQ(data.size(), page_bytes);
          blocks[block].insert(blocks[block].end(), data.begin(), data.end());
        }
        return {};
      },
      StreamOffset(start));
  return {std::move(summary), std::move(blocks)};
}

void expect_reads_back(MappedStream stream) {
  const Blob file = stream.build();
  BlobSource source(file);
  const ReadBack read = read_back(source, stream.start);
  ASSERT_TRUE(read.summary) << read.summary.error().message;
  EXPECT_EQ(read.summary->layout, Layout::mapped_ram);
  EXPECT_EQ(read.summary->page_bytes, stream.page_bytes);
  EXPECT_EQ(read.summary->stream_bytes, file.size() - stream.start);
  ASSERT_EQ(read.summary->blocks.size(), stream.blocks.size());
  ASSERT_EQ(read.blocks.size(), stream.blocks.size());
  uint64_t data_pages = 0;
  uint64_t pages = 0;
  for (size_t i = 0; i < stream.blocks.size(); ++i) {
    const StreamBlock &block = read.summary->blocks[i];
    EXPECT_EQ(block.idstr, stream.blocks[i].idstr);
    ASSERT_TRUE(block.mapped);
    EXPECT_EQ(block.mapped->page_bytes, stream.page_bytes);
    EXPECT_EQ(block.mapped->bitmap_offset.value, stream.places[i].bitmap);
    EXPECT_EQ(block.mapped->pages_offset.value, stream.places[i].pages);
    EXPECT_TRUE(read.blocks[i] == stream.expected(i)) << block.idstr;
    for (const uint8_t fill : stream.blocks[i].fill) {
      data_pages += fill != 0 || stream.all_bits;
      pages += 1;
    }
  }
  EXPECT_EQ(read.summary->data_pages, data_pages);
  EXPECT_EQ(read.summary->zero_pages, pages - data_pages);
  ASSERT_EQ(read.summary->devices.size(), 1U);
  EXPECT_EQ(file[read.summary->devices[0].offset], std::byte{'~'});
}

// Every byte before the pages, by its place.
TEST(MappedStream, golden_bytes) {
  const Blob head = Bytes()
                        .text("QEVM")
                        .u32(3)
                        .u8(7)  // configuration
                        .u32(2)
                        .text("pc")
                        .u8(5)  // at 15
                        .u8(26)
                        .text("configuration/capabilities")
                        .u32(1)
                        .u32(1)
                        .u8(10)
                        .text("mapped-ram")
                        .u8(1)  // START, at 62
                        .u32(2)
                        .u8(3)
                        .text("ram")
                        .u32(0)
                        .u32(4)
                        .u64(0x3004)  // 3 pages in all, MEM_SIZE
                        .u8(1)        // at 87
                        .text("a")
                        .u64(0x3000)
                        .u32(1)  // version of the header, at 97
                        .u64(0x1000)
                        .u64(125)     // the bitmap follows at once
                        .u64(0x1000)  // pages
                        .u8(0x05)     // bits 0 and 2: the bitmap is not big-endian
                        .fill(7, 0)
                        .done();
  ASSERT_EQ(head.size(), 133U);
  Blob file = head;
  file.resize(0x1000);
  file.resize(0x2000, std::byte{0x41});
  file.resize(0x3000, std::byte{stale_fill});
  file.resize(0x4000, std::byte{0x43});
  const Blob tail = Bytes().u64(0x10).u8(0x7e).u32(2).u8(0).done();
  file.insert(file.end(), tail.begin(), tail.end());
  BlobSource source(file);
  const ReadBack read = read_back(source);
  ASSERT_TRUE(read.summary) << read.summary.error().message;
  EXPECT_EQ(read.summary->data_pages, 2U);
  EXPECT_EQ(read.summary->zero_pages, 1U);
  Blob expected(0x1000, std::byte{0x41});
  expected.resize(0x2000);
  expected.resize(0x3000, std::byte{0x43});
  EXPECT_TRUE(read.blocks[0] == expected);
}

TEST(MappedStream, shapes_of_blocks) {
  expect_reads_back({.blocks = {{"one", {7}}}});
  expect_reads_back({.blocks = {{"one", {0}}}});
  expect_reads_back({.blocks = {{"word", page_fills(64)}}});
  expect_reads_back({.blocks = {{"two.words", page_fills(65)}}});
  expect_reads_back({.blocks = {{"more.than.1M", page_fills(300, 1)}, {"after", page_fills(3)}}});
  expect_reads_back(
      {.blocks = {{"a", page_fills(129, 5)}, {"b", {0}}, {"c", page_fills(700, 64)}}});
  expect_reads_back({.blocks = {{"arm", page_fills(70, 3)}}, .page_bytes = 65536});
  expect_reads_back({.blocks = {{"arm", page_fills(70, 3)}}, .page_bytes = 1024});
}

TEST(MappedStream, begins_inside_a_file) {
  expect_reads_back({.blocks = {{"a", page_fills(65)}, {"b", page_fills(2)}}, .start = 12345});
  expect_reads_back({.blocks = {{"a", page_fills(65)}}, .start = 3 << 20, .alignment = 4096});
}

TEST(MappedStream, all_bits_set) {
  expect_reads_back({.blocks = {{"a", page_fills(300, 7)}}, .all_bits = true});
}

/// Knows that some ranges of the file are zeros, in pieces.
class HoleySource : public BlobSource {
 public:
  HoleySource(std::span<const std::byte> bytes, uint64_t piece_bytes)
      : BlobSource(bytes), bytes_(bytes), piece_bytes_(piece_bytes) {}
  Result<StreamRun> run_at(StreamOffset offset, uint64_t bytes) override {
    const uint64_t end = round_down(offset.value, piece_bytes_) + piece_bytes_;
    const uint64_t piece = std::min(bytes, end - offset.value);
    const bool zeros = is_hole(end - piece_bytes_);
    return StreamRun{zeros ? StreamRun::Kind::zeros : StreamRun::Kind::other, piece, {}};
  }
  bool is_hole(uint64_t start) const {
    for (uint64_t at = start; at < start + piece_bytes_ && at < bytes_.size(); ++at) {
      if (bytes_[at] != std::byte{0}) {
        return false;
      }
    }
    return true;
  }

 private:
  std::span<const std::byte> bytes_;
  uint64_t piece_bytes_;
};

// What the source says is zero counts as such, down to clusters smaller than a page.
TEST(MappedStream, zeros_of_the_source) {
  MappedStream stream{.blocks = {{"a", page_fills(300, 7)}, {"b", page_fills(65, 64)}},
                      .all_bits = true};
  Blob file = stream.build();
  // A page with one byte only, and one half of another.
  file[stream.places[0].pages + 4096 + 4095] = std::byte{1};
  std::memset(&file[stream.places[0].pages + 2 * 4096], 0x33, 2048);
  for (const uint64_t piece_bytes : {512, 1024, 4096, 16384, 65536}) {
    SCOPED_TRACE(piece_bytes);
    HoleySource source(file, piece_bytes);
    const ReadBack read = read_back(source);
    ASSERT_TRUE(read.summary) << read.summary.error().message;
    Blob expected = stream.expected(0);
    expected[4096 + 4095] = std::byte{1};
    std::memset(&expected[2 * 4096], 0x33, 2048);
    EXPECT_TRUE(read.blocks[0] == expected);
    EXPECT_TRUE(read.blocks[1] == stream.expected(1));
    const uint64_t least = 43 + 2 + 2;  // those with data
    if (piece_bytes <= 4096) {
      EXPECT_EQ(read.summary->data_pages, least);
    }
    EXPECT_GE(read.summary->data_pages, least);
    EXPECT_EQ(read.summary->data_pages + read.summary->zero_pages, 365U);
    EXPECT_GT(read.summary->zero_pages, 0U);
  }
}

TEST(MappedStream, hostile_headers) {
  const auto expect_error = [](const char *what, ErrorCode code, uint64_t at, size_t bytes,
                               uint64_t value) {
    SCOPED_TRACE(what);
    MappedStream stream{.blocks = {{"a", page_fills(65)}, {"b", page_fills(2)}}, .start = 64};
    Blob file = stream.build();
    for (size_t i = 0; i < bytes; ++i) {
      file[stream.places[1].header + at + i] =
          static_cast<std::byte>(value >> (8 * (bytes - 1 - i)));
    }
    BlobSource source(file);
    const ReadBack read = read_back(source, 64);
    ASSERT_FALSE(read.summary);
    EXPECT_EQ(read.summary.error().code, code) << read.summary.error().message;
    EXPECT_TRUE(read.blocks.empty());  // the whole list is checked first
  };
  const auto bad = [&](const char *what, uint64_t at, uint64_t value) {
    expect_error(what, ErrorCode::bad_stream, at, 8, value);
  };
  MappedStream stream{.blocks = {{"a", page_fills(65)}, {"b", page_fills(2)}}, .start = 64};
  const uint64_t size = stream.build().size();
  const uint64_t bitmap = stream.places[1].bitmap;
  const uint64_t pages = stream.places[1].pages;
  expect_error("version 0", ErrorCode::not_supported, 0, 4, 0);
  expect_error("version 2", ErrorCode::not_supported, 0, 4, 2);
  bad("page size 0", 4, 0);
  bad("page size 8192", 4, 8192);
  bad("page size huge", 4, ~uint64_t{0});
  bad("bitmap at 0", 12, 0);
  bad("bitmap over the head", 12, 64);
  bad("bitmap over its own header", 12, bitmap - 1);
  bad("bitmap over another block's pages", 12, stream.places[0].pages);
  bad("bitmap over its own pages", 12, pages);
  bad("bitmap reaches into its pages", 12, pages - 7);
  bad("bitmap past the end", 12, size);
  bad("bitmap wraps", 12, ~uint64_t{0} - 3);
  bad("bitmap wraps exactly", 12, ~uint64_t{0} - 7);
  bad("pages at 0", 20, 0);
  bad("pages over another block's", 20, stream.places[0].pages);
  bad("pages over the bitmap", 20, round_down(bitmap, 4096));
  bad("pages not aligned", 20, pages - 512);
  bad("pages past the end", 20, round_up(size, 4096));
  bad("pages end past the end", 20, round_down(size, 4096));
  bad("pages wrap", 20, ~uint64_t{0} - 4095);
  bad("pages wrap exactly", 20, ~uint64_t{0} - 8191);
  bad("length not in pages", static_cast<uint64_t>(-8), 4095);
  bad("length huge", static_cast<uint64_t>(-8), ~uint64_t{0} - 4095);
  bad("length 0", static_cast<uint64_t>(-8), 0);
}

TEST(MappedStream, huge_blocks_in_a_short_file_are_refused_at_once) {
  MappedStream stream{.blocks = {{"a", page_fills(2)}}};
  Blob file = stream.build();
  const uint64_t used = uint64_t{1} << 62;
  // Total and used length agree; everything else fits the small file.
  store_be<uint64_t>(&file[stream.places[0].header - 8 - 2 - 8], used | 4);
  store_be<uint64_t>(&file[stream.places[0].header - 8], used);
  BlobSource source(file);
  const auto summary = read_stream(source);
  ASSERT_FALSE(summary);
  EXPECT_EQ(summary.error().code, ErrorCode::bad_stream);
  EXPECT_NE(summary.error().message.find("cut short"), std::string::npos)
      << summary.error().message;
}

TEST(MappedStream, records_of_pages_are_refused) {
  for (const uint64_t word : {0x0008ULL, 0x0002ULL, 0x0028ULL}) {
    MappedStream stream{.blocks = {{"a", page_fills(2)}}, .alignment = 4096};
    Blob file = stream.build();
    const Blob record = Bytes().u64(word).u8(1).text("a").fill(4096, 0).done();
    file.insert(file.begin() + static_cast<std::ptrdiff_t>(stream.ram_end), record.begin(),
                record.end());
    BlobSource source(file);
    const auto summary = read_stream(source);
    ASSERT_FALSE(summary);
    EXPECT_EQ(summary.error().code, ErrorCode::bad_stream);
    EXPECT_NE(summary.error().message.find("page record"), std::string::npos);
  }
}

TEST(MappedStream, start_past_the_end) {
  const Blob file(100);
  BlobSource source(file);
  EXPECT_FALSE(read_stream(source, {}, StreamOffset(100)));
  EXPECT_FALSE(read_stream(source, {}, StreamOffset(101)));
  EXPECT_FALSE(read_stream(source, {}, StreamOffset(~uint64_t{0})));
}

TEST(MappedStream, every_truncation_is_an_error) {
  MappedStream stream{.blocks = {{"a", page_fills(3)}, {"b", {1}}}, .alignment = 4096};
  const Blob file = stream.build();
  const size_t eof = file.size() - 1 - 1 - 4 - 2;
  for (size_t size = 0; size < file.size(); ++size) {
    BlobSource source({file.data(), size});
    EXPECT_EQ(read_back(source).summary.has_value(), size > eof) << size;
  }
}

// Random damage gives an error or a true result: pages in order, of blocks that are in the file.
TEST(MappedStream, survives_random_damage) {
  MappedStream stream{.blocks = {{"a", page_fills(65)}, {"b", page_fills(5)}}, .alignment = 4096};
  const Blob original = stream.build();
  // Damage where there is structure, not in the pages.
  std::vector<size_t> places;
  const uint64_t second_block = stream.places[0].pages + 65 * 4096;
  for (size_t i = 0; i < original.size(); ++i) {
    if (i < stream.places[0].pages || i >= stream.ram_end ||
        (i >= second_block && i < stream.places[1].pages)) {
      places.push_back(i);
    }
  }
  std::mt19937 random(7);
  size_t intact = 0;
  for (int round = 0; round < 3000; ++round) {
    Blob file = original;
    for (unsigned flips = 1 + random() % 3; flips > 0; --flips) {
      file[places[random() % places.size()]] ^= static_cast<std::byte>(1U << random() % 8);
    }
    if (random() % 8 == 0) {
      file.resize(random() % file.size());
    }
    BlobSource source(file);
    uint64_t pages = 0;
    const auto summary = read_stream(source, [&](size_t, uint64_t, uint64_t, auto) {
      pages += 1;
      return Result<void>();
    });
    if (summary) {
      EXPECT_EQ(pages, summary->data_pages + summary->zero_pages);
      EXPECT_LE(summary->stream_bytes, file.size());
      intact += 1;
    }
  }
  EXPECT_GT(intact, 100U);
}

}  // namespace
}  // namespace qvmstate::vmstate::test
