// A stored state read page by page, and written anew in each layout.
#include "vmstate/stored_state.h"

#include <gtest/gtest.h>
#include <zlib.h>

#include "mapped_fixture.h"
#include "qcow2/io/file_placement.h"
#include "stream_fixture.h"
#include "vmstate/state_transfer.h"

namespace qvmstate::vmstate::test {
namespace {

constexpr uint32_t ram_id = 2;

SourceOpener opener_of(const Blob &bytes) {
  return [&bytes]() -> Result<std::unique_ptr<StreamSource>> {
    return std::make_unique<BlobSource>(bytes);
  };
}

/// A legacy stream in rounds, out of order, a page sent twice; and what memory it means.
Blob legacy(Blob &memory) {
  constexpr size_t pages = 300;
  memory.assign(pages * page, std::byte{0});
  Bytes stream;
  stream.text("QEVM").u32(3).u8(7).u32(2).text("pc");
  stream.u8(1).u32(ram_id).u8(3).text("ram").u32(0).u32(4);
  stream.u64(pages * page | 4).u8(1).text("m").u64(pages * page);
  const auto put = [&](size_t number, uint8_t fill) {
    stream.u64(number * page | (fill == 0 ? 2 : 8)).u8(1).text("m");
    fill == 0 ? stream.u8(0) : stream.fill(page, fill);
    std::memset(&memory[number * page], fill, page);
  };
  for (size_t i = 0; i < pages; ++i) {
    put(i, i % 4 == 0 ? 0 : static_cast<uint8_t>(i % 250 + 1));
  }
  stream.u64(0x10).u8(0x7e).u32(ram_id).u8(3).u32(ram_id);  // another round
  put(7, 0);
  put(8, 77);
  put(299, 78);
  stream.u64(0x10).u8(0x7e).u32(ram_id);
  add_section(stream, 5, "cpu", 1, 12, Bytes().text("registers").done());
  add_section(stream, 6, "timer", 0, 2, Blob(24, std::byte{1}));
  stream.u8(0).u8(6).u32(2).text("{}");
  return stream.done();
}

Bytes head_of_one_block(uint64_t pages) {
  Bytes stream;
  stream.text("QEVM").u32(3).u8(7).u32(2).text("pc");
  stream.u8(1).u32(ram_id).u8(3).text("ram").u32(0).u32(4);
  return stream.u64(pages * page | 4).u8(1).text("m").u64(pages * page);
}

/// Pages in all the ways that records hold them; and what memory it means.
Blob encoded(Blob &memory) {
  const auto difference = [](Bytes &stream, size_t number, uint8_t kept, std::string_view text) {
    stream.u64(number * page | 0x40).u8(1).text("m").u8(1);  // XBZRLE, in encoding 1
    stream.u16(static_cast<uint16_t>(2 + text.size()));
    stream.u8(kept).u8(static_cast<uint8_t>(text.size())).text(text);
  };
  const auto put = [&memory](size_t number, size_t at, std::string_view text) {
    std::memcpy(&memory[number * page + at], text.data(), text.size());
  };
  Blob deflated(compressBound(page));
  uLongf bytes = deflated.size();
  const Blob plain(page, std::byte{0x44});
  EXPECT_EQ(compress(reinterpret_cast<Bytef *>(deflated.data()), &bytes,
                     reinterpret_cast<const Bytef *>(plain.data()), plain.size()),
            Z_OK);
  deflated.resize(bytes);
  const auto put_compressed = [&](Bytes &stream, size_t number) {
    stream.u64(number * page | 0x100).u8(1).text("m").u32(static_cast<uint32_t>(bytes));
    stream.blob(deflated);
  };
  constexpr size_t pages = 7;
  memory.assign(pages * page, std::byte{0});
  Bytes stream = head_of_one_block(pages);
  stream.u64(0 * page | 8).u8(1).text("m").fill(page, 0x11);  // as they are
  stream.u64(1 * page | 8).u8(1).text("m").fill(page, 0x22);
  stream.u64(2 * page | 2).u8(1).text("m").u8(0);     // zero
  stream.u64(3 * page | 2).u8(1).text("m").u8(0x33);  // full of another byte
  put_compressed(stream, 4);
  put_compressed(stream, 5);
  put_compressed(stream, 6);
  difference(stream, 0, 1, "abc");
  difference(stream, 0, 2, "X");
  difference(stream, 2, 0, "zero");
  difference(stream, 3, 100, "filled");
  difference(stream, 4, 9, "deflated");
  difference(stream, 1, 0, "gone");
  stream.u64(1 * page | 8).u8(1).text("m").fill(page, 0x55);  // and as it is once more
  difference(stream, 5, 0, "gone");
  stream.u64(5 * page | 2).u8(1).text("m").u8(0);
  stream.u64(0x10).u8(0x7e).u32(ram_id);
  add_section(stream, 6, "timer", 0, 2, Blob(24, std::byte{1}));
  for (const auto &[number, fill] :
       {std::pair(0, 0x11), {1, 0x55}, {3, 0x33}, {4, 0x44}, {6, 0x44}}) {
    std::memset(&memory[static_cast<size_t>(number) * page], fill, page);
  }
  put(0, 1, "aXc");
  put(2, 0, "zero");
  put(3, 100, "filled");
  put(4, 9, "deflated");
  return stream.u8(0).u8(6).u32(2).text("{}").done();
}

Blob read_all(const StoredState &state, size_t block, size_t stride) {
  const auto ram = state.ram();
  EXPECT_TRUE(ram);
  const uint64_t used_bytes = state.blocks()[block].used_bytes;
  Blob memory(used_bytes);
  for (uint64_t offset = 0; offset < used_bytes;) {
    const auto presence = (*ram)->presence(block, offset);
    EXPECT_TRUE(presence);
    EXPECT_GT(presence->bytes, 0U);
    if (presence->touched) {
      Blob part(presence->bytes / page * stride);
      EXPECT_TRUE(
          (*ram)->read_pages(block, offset, presence->bytes / page, page, part.data(), stride));
      for (uint64_t at = 0; at < presence->bytes; at += page) {
        std::memcpy(&memory[offset + at], &part[at / page * stride], page);
      }
    }
    offset += presence->bytes;
  }
  return memory;
}

Blob write_anew(const StoredState &state, Layout layout) {
  auto backend = std::make_unique<io::MemoryBackend>();
  io::MemoryBackend &memory = *backend;
  io::File file(std::move(backend), "memory", 4);
  io::FilePlacement placement(0);
  const TransferTarget target = {
      .file = &file, .sequential = &placement, .fixed = &placement, .checksum = true};
  const auto stats = write_state_anew(state, layout, target, [] { return Result<void>(); });
  EXPECT_TRUE(stats) << stats.error().message;
  Blob bytes = memory.contents();
  bytes.resize(stats->stream_bytes);
  StreamDigest digest;
  digest.add(bytes);
  EXPECT_EQ(stats->checksum, digest.finish());
  return bytes;
}

TEST(StoredState, IsTheSameInEachLayout) {
  Blob memory;
  const Blob original = legacy(memory);
  auto state = StoredState::open(opener_of(original));
  ASSERT_TRUE(state) << state.error().message;
  Blob converted = original;
  // To mapped-ram, back, and each again.
  for (const Layout layout : {Layout::mapped_ram, Layout::legacy, Layout::legacy,
                              Layout::mapped_ram, Layout::mapped_ram}) {
    const Blob next = write_anew(**state, layout);
    converted = next;
    state = StoredState::open(opener_of(converted));
    ASSERT_TRUE(state) << state.error().message;
    EXPECT_EQ((*state)->summary().layout, layout);
    EXPECT_TRUE(read_all(**state, 0, page) == memory);
    EXPECT_TRUE(read_all(**state, 0, page + 8) == memory);
    EXPECT_EQ((*state)->configuration().machine_type, "pc");
    EXPECT_EQ((*state)->configuration().vmdescription, "{}");
    ASSERT_EQ((*state)->devices().size(), 2U);
    const DeviceSection &cpu = (*state)->devices()[0];
    EXPECT_EQ(cpu.idstr, "cpu");
    EXPECT_EQ(cpu.id, 5U);
    EXPECT_EQ(cpu.instance, 1U);
    EXPECT_EQ(cpu.version, 12U);
    EXPECT_EQ(Blob(cpu.body.begin(), cpu.body.end()), Bytes().text("registers").done());
    EXPECT_EQ(cpu.whole.size(), 1 + 4 + 1 + 3 + 4 + 4 + 9 + 5U);
  }
}

// Streams of old machine types do not say how large pages are before the first one comes.
TEST(StoredState, PagesOfASizeThatIsFoundOut) {
  for (const uint64_t page_bytes : {1024U, 8192U}) {
    Bytes stream = head_of_one_block(16);
    const uint64_t pages = 16 * page / page_bytes;
    for (uint64_t i = 0; i < pages; ++i) {
      stream.u64(i * page_bytes | 8).u8(1).text("m").fill(page_bytes, static_cast<uint8_t>(i + 1));
    }
    stream.u64(0x10).u8(0x7e).u32(ram_id).u8(0);
    const auto state = StoredState::open(opener_of(stream.done()));
    ASSERT_TRUE(state) << state.error().message;
    EXPECT_EQ((*state)->summary().page_bytes, page_bytes);
    const auto ram = (*state)->ram();
    ASSERT_TRUE(ram);
    for (uint64_t i = 0; i < pages; ++i) {
      Blob read(page_bytes);
      ASSERT_TRUE((*ram)->read_pages(0, i * page_bytes, 1, page_bytes, read.data(), page_bytes));
      EXPECT_EQ(read, Blob(page_bytes, static_cast<std::byte>(i + 1))) << i;
    }
  }
}

TEST(StoredState, EncodedPagesBecomePlainOnes) {
  Blob memory;
  const Blob original = encoded(memory);
  const auto state = StoredState::open(opener_of(original));
  ASSERT_TRUE(state) << state.error().message;
  EXPECT_EQ((*state)->summary().xbzrle_pages, 7U);
  EXPECT_EQ((*state)->summary().compressed_pages, 3U);
  EXPECT_FALSE(can_be_copied((*state)->summary(), Layout::legacy));
  EXPECT_TRUE(read_all(**state, 0, page) == memory);
  EXPECT_TRUE(read_all(**state, 0, page + 8) == memory);
  for (const Layout layout : {Layout::legacy, Layout::mapped_ram}) {
    const Blob anew = write_anew(**state, layout);
    const auto again = StoredState::open(opener_of(anew));
    ASSERT_TRUE(again) << again.error().message;
    EXPECT_EQ((*again)->summary().layout, layout);
    EXPECT_TRUE(has_plain_pages((*again)->summary()));
    EXPECT_TRUE(read_all(**again, 0, page) == memory);
  }
}

TEST(StoredState, ReadsMappedRamAnywhereInAFile) {
  MappedStream mapped;
  mapped.start = 5000;
  mapped.blocks = {{"a", page_fills(600)}, {"b", page_fills(3, 3)}};
  const Blob bytes = mapped.build();
  const auto state = StoredState::open(opener_of(bytes), StreamOffset(5000));
  ASSERT_TRUE(state) << state.error().message;
  for (const size_t block : {0U, 1U}) {
    EXPECT_TRUE(read_all(**state, block, page) == mapped.expected(block));
    EXPECT_TRUE(read_all(**state, block, page + 8) == mapped.expected(block));
  }
}

TEST(StoredState, RefusesWhatItCannotWriteAnew) {
  Blob memory;
  const Blob good = legacy(memory);
  Blob cut(good.begin(), good.end() - 40);
  EXPECT_EQ(StoredState::open(opener_of(cut)).error().code, ErrorCode::bad_stream);
  Bytes missing = head_of_one_block(2);
  missing.u64(page | 2).u8(1).text("m").u8(0).u64(0x10).u8(0x7e).u32(ram_id).u8(0);
  const auto refused = StoredState::open(opener_of(missing.done()));
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().message.find("1 pages have no record"), std::string::npos);
  // A difference to nothing.
  Bytes difference = head_of_one_block(1);
  difference.u64(0x40).u8(1).text("m").u8(1).u16(0).u64(0x10).u8(0x7e).u32(ram_id).u8(0);
  const auto baseless = StoredState::open(opener_of(difference.done()));
  ASSERT_FALSE(baseless);
  EXPECT_NE(baseless.error().message.find("a page that has no record"), std::string::npos);
  // 2^60 bytes, whose pages would take 2^51 to keep track of.
  Bytes huge = head_of_one_block(uint64_t{1} << 48);
  huge.u64(0x10).u8(0x7e).u32(ram_id).u8(0);
  const auto too_large = StoredState::open(opener_of(huge.done()));
  ASSERT_FALSE(too_large);
  EXPECT_NE(too_large.error().message.find("more pages than"), std::string::npos);
}

}  // namespace
}  // namespace qvmstate::vmstate::test
