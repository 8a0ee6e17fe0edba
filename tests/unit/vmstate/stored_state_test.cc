// A stored state read page by page, and written anew in each layout.
#include "vmstate/stored_state.h"

#include <gtest/gtest.h>

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
  Bytes missing;
  missing.text("QEVM").u32(3).u8(7).u32(2).text("pc");
  missing.u8(1).u32(ram_id).u8(3).text("ram").u32(0).u32(4);
  missing.u64(2 * page | 4).u8(1).text("m").u64(2 * page);
  missing.u64(page | 2).u8(1).text("m").u8(0).u64(0x10).u8(0x7e).u32(ram_id).u8(0);
  const auto refused = StoredState::open(opener_of(missing.done()));
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().message.find("1 pages have no record"), std::string::npos);
}

}  // namespace
}  // namespace qvmstate::vmstate::test
