// What legacy streams held over the years, each by hand with a comment a field: pages as
// differences, compressed, filled; other page sizes and targets; postcopy; no footers.
#include <zlib.h>

#include <algorithm>
#include <bit>
#include <map>

#include "stream_fixture.h"
#include "vmstate/xbzrle.h"

namespace qvmstate::vmstate::test {
namespace {

/// RAM as the records leave it.
struct Loaded {
  Result<StreamSummary> summary = StreamSummary();
  std::map<std::string, Blob> memory;
};

Loaded load(const Bytes &bytes) {
  Loaded loaded;
  std::vector<Blob> blocks;
  std::vector<std::string> names;
  BlobSource source(bytes.done());
  StreamHooks hooks;
  hooks.blocks = [&](const StreamSummary &so_far) -> Result<void> {
    for (const StreamBlock &block : so_far.blocks) {
      blocks.emplace_back(block.used_bytes);
      names.push_back(block.idstr);
    }
    return {};
  };
  hooks.page = [&](size_t block, uint64_t offset, uint64_t page_bytes,
                   std::span<const std::byte> data) -> Result<void> {
    std::span<std::byte> to(blocks.at(block));
    to = to.subspan(offset, page_bytes);
    std::ranges::fill(to, std::byte{0});
    std::ranges::copy(data, to.begin());
    return {};
  };
  hooks.page_now = [&](size_t block, uint64_t offset, std::span<std::byte> to) -> Result<void> {
    std::ranges::copy(std::span(blocks.at(block)).subspan(offset, to.size()), to.begin());
    return {};
  };
  loaded.summary = read_stream(source, {}, hooks);
  for (size_t i = 0; i < blocks.size(); ++i) {
    loaded.memory[names[i]] = std::move(blocks[i]);
  }
  return loaded;
}

Bytes head(std::string_view machine = "pc-q35-7.2") {
  Bytes bytes;
  bytes.text("QEVM").u32(3);  // magic, version
  if (!machine.empty()) {
    bytes.u8(0x07).u32(static_cast<uint32_t>(machine.size())).text(machine);  // configuration
  }
  return bytes;
}

Bytes &ram_start(Bytes &bytes, uint64_t total) {
  return bytes
      .u8(0x01)  // START
      .u32(2)    // id
      .u8(3)
      .text("ram")
      .u32(0)              // instance
      .u32(4)              // version
      .u64(total | 0x04);  // MEM_SIZE
}

/// EOS, and the footer unless there are none.
Bytes &ram_body_end(Bytes &bytes, bool has_footer = true) {
  bytes.u64(0x10);
  return has_footer ? bytes.u8(0x7e).u32(2) : bytes;
}

/// A stream of one block "m": START, PART with these records, END, one device, the end mark.
Bytes stream_of(const Bytes &records, uint64_t bytes_of_block, Bytes bytes = head()) {
  ram_start(bytes, bytes_of_block).u8(1).text("m").u64(bytes_of_block);
  ram_body_end(bytes);
  bytes.u8(0x02).u32(2).blob(records.done());  // PART
  ram_body_end(bytes);
  bytes.u8(0x03).u32(2);  // END
  ram_body_end(bytes);
  add_section(bytes, 7, "dev", 0, 1, Bytes().text("state").done());
  return bytes.u8(0x00);  // EOF
}

Blob filled(size_t count, uint8_t value) {
  return Bytes().fill(count, value).done();
}

/// Page 0 of "m", full of 0x11.
Bytes first_page() {
  return Bytes()
      .u64(0x0008)  // PAGE, offset 0
      .u8(1)
      .text("m")
      .fill(4096, 0x11);
}

TEST(StreamVariants, XbzrleChangesThePageThatIsThere) {
  const Bytes records = first_page()
                            .u64(0x0060)  // XBZRLE, CONTINUE: page 0
                            .u8(1)        // encoding
                            .u16(9)       // bytes
                            .u8(2)        // keep 2
                            .u8(3)        // replace 3
                            .text("abc")
                            .u8(0x80 | 0x7a)  // keep 4090: low 7 bits
                            .u8(0x1f)         // high 7 bits
                            .u8(1)            // replace 1, the last
                            .text("z")
                            .u64(0x0060)  // and again, from the first byte on
                            .u8(1)
                            .u16(3)
                            .u8(0)  // keep none: allowed at the beginning
                            .u8(1)  // replace 1
                            .text("A")
                            .u64(0x0060)  // no change
                            .u8(1)
                            .u16(0);
  const Loaded loaded = load(stream_of(records, 4096));
  ASSERT_TRUE(loaded.summary) << loaded.summary.error().message;
  Blob expected = filled(4096, 0x11);
  expected[0] = std::byte{'A'};
  expected[2] = std::byte{'a'};
  expected[3] = std::byte{'b'};
  expected[4] = std::byte{'c'};
  expected[4095] = std::byte{'z'};
  EXPECT_TRUE(loaded.memory.at("m") == expected);
  EXPECT_EQ(loaded.summary->xbzrle_pages, 3U);
  EXPECT_EQ(loaded.summary->data_pages, 4U);
}

TEST(StreamVariants, XbzrleNeedsSomebodyWhoKnowsThePage) {
  const Bytes bytes = stream_of(first_page().u64(0x0060).u8(1).u16(0), 4096);
  BlobSource source(bytes.done());
  EXPECT_TRUE(read_stream(source));  // who does not ask for pages does not need it
  const auto refused =
      read_stream(source, [](size_t, uint64_t, uint64_t, auto) { return Result<void>(); });
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::not_supported);
}

TEST(StreamVariants, XbzrleThatIsDamaged) {
  const auto expect_bad = [](const Bytes &encoded) {
    Blob page(8);
    EXPECT_FALSE(apply_xbzrle(encoded.done(), page));
  };
  expect_bad(Bytes().u8(9));                                          // keeps more than the page
  expect_bad(Bytes().u8(1));                                          // nothing replaced
  expect_bad(Bytes().u8(1).u8(0));                                    // replaces none
  expect_bad(Bytes().u8(1).u8(2).u8(7));                              // ends early
  expect_bad(Bytes().u8(0).u8(9).fill(9, 7));                         // replaces more than the page
  expect_bad(Bytes().u8(0).u8(1).u8(7).u8(0).u8(1).u8(7));            // keeps none, later
  expect_bad(Bytes().u8(0x80));                                       // half a length
  expect_bad(Bytes().u8(0x80).u8(0x80).u8(0));                        // a length of three bytes
  for (const Bytes &record : {Bytes().u8(2).u16(0),                   // encoding
                              Bytes().u8(1).u16(4097).fill(4097, 0),  // longer than a page
                              Bytes().u8(1).u16(1).u8(1)}) {          // see above
    EXPECT_FALSE(load(stream_of(first_page().u64(0x0060).blob(record.done()), 4096)).summary);
  }
}

TEST(StreamVariants, CompressedPages) {
  Blob page = filled(4096, 0x5a);
  page[100] = std::byte{1};
  Blob compressed(compressBound(4096));
  uLongf bytes = compressed.size();
  ASSERT_EQ(compress(reinterpret_cast<Bytef *>(compressed.data()), &bytes,
                     reinterpret_cast<const Bytef *>(page.data()), page.size()),
            Z_OK);
  compressed.resize(bytes);
  const auto record = [](uint64_t offset, uint32_t length, const Blob &data) {
    return Bytes()
        .u64(offset | 0x100)  // COMPRESS_PAGE
        .u8(1)
        .text("m")
        .u32(length)
        .blob(data);
  };
  const auto length = static_cast<uint32_t>(bytes);
  const Loaded loaded = load(stream_of(record(0x1000, length, compressed), 0x2000));
  ASSERT_TRUE(loaded.summary) << loaded.summary.error().message;
  EXPECT_TRUE(std::ranges::equal(std::span(loaded.memory.at("m")).subspan(4096), page));
  EXPECT_EQ(loaded.summary->compressed_pages, 1U);

  EXPECT_FALSE(load(stream_of(record(0, length - 1, compressed), 0x2000)).summary);
  EXPECT_FALSE(load(stream_of(record(0, 0, {}), 0x2000)).summary);
  EXPECT_FALSE(load(stream_of(record(0, 0x10000000, compressed), 0x2000)).summary);
  Blob small(100);
  uLongf small_bytes = small.size();
  compress(reinterpret_cast<Bytef *>(small.data()), &small_bytes,
           reinterpret_cast<const Bytef *>(page.data()), 4095);  // not a whole page
  small.resize(small_bytes);
  EXPECT_FALSE(
      load(stream_of(record(0, static_cast<uint32_t>(small.size()), small), 0x2000)).summary);
}

TEST(StreamVariants, APageFilledWithOneByte) {
  const Loaded loaded =
      load(stream_of(Bytes().u64(0x1002).u8(1).text("m").u8(0x77), 0x2000));  // 7.2 takes any
  ASSERT_TRUE(loaded.summary) << loaded.summary.error().message;
  EXPECT_TRUE(loaded.memory.at("m") == Bytes().fill(4096, 0).fill(4096, 0x77).done());
}

TEST(StreamVariants, LaterRoundsSupersede) {
  Bytes records = first_page();
  ram_body_end(records);
  records.u8(0x02).u32(2).u64(0x0022).u8(0);  // another PART: ZERO, CONTINUE
  ram_body_end(records);
  records.u8(0x02).u32(2).u64(0x0028).fill(4096, 0x33);  // and another: PAGE, CONTINUE
  const Loaded loaded = load(stream_of(records, 4096));
  ASSERT_TRUE(loaded.summary) << loaded.summary.error().message;
  EXPECT_TRUE(loaded.memory.at("m") == filled(4096, 0x33));
  EXPECT_EQ(loaded.summary->blocks[0].page_records, 3U);
}

TEST(StreamVariants, PagesOfOtherTargets) {
  for (const uint64_t page_bytes : {1024U, 2048U, 4096U, 8192U, 16384U, 65536U}) {
    for (const bool is_told : {true, false}) {
      for (const bool has_data : {true, false}) {
        SCOPED_TRACE(testing::Message() << page_bytes << is_told << has_data);
        Bytes bytes = head("sun4u");
        if (is_told) {
          bytes.u8(0x05).u8(30).text("configuration/target-page-bits").u32(1);
          bytes.u32(static_cast<uint32_t>(std::countr_zero(page_bytes)));
        }
        Bytes records;
        Blob expected;
        for (uint64_t i = 0; i < 20; ++i) {
          const bool is_zero = !has_data || i % 5 == 0;
          records.u64(i * page_bytes | (is_zero ? 0x02 : 0x08) | (i > 0 ? 0x20 : 0));
          if (i == 0) {
            records.u8(1).text("m");
          }
          const auto value = static_cast<uint8_t>(is_zero ? 0 : i + 1);
          is_zero ? records.u8(0) : records.fill(page_bytes, value);
          expected.insert(expected.end(), page_bytes, std::byte{value});
        }
        const Loaded loaded = load(stream_of(records, 20 * page_bytes, bytes));
        ASSERT_TRUE(loaded.summary) << loaded.summary.error().message;
        EXPECT_EQ(loaded.summary->page_bytes, page_bytes);
        EXPECT_TRUE(loaded.memory.at("m") == expected);
        EXPECT_EQ(loaded.summary->data_pages + loaded.summary->zero_pages, 20U);
      }
    }
  }
}

// Whoever makes a table of the pages does it when it is told of the blocks.
TEST(StreamVariants, BlocksAreToldWithTheSizeOfPages) {
  for (const uint64_t page_bytes : {1024U, 4096U, 8192U}) {
    Bytes records;
    for (uint64_t i = 0; i < 20; ++i) {
      records.u64(i * page_bytes | 0x08).u8(1).text("m").fill(page_bytes, 1);
    }
    const Bytes stream = stream_of(records, 20 * page_bytes, head("sun4u"));
    BlobSource source(stream.done());
    std::vector<uint64_t> told;
    size_t pages = 0;
    StreamHooks hooks;
    hooks.blocks = [&](const StreamSummary &so_far) -> Result<void> {
      EXPECT_EQ(so_far.blocks.size(), 1U);
      EXPECT_EQ(pages, 0U);
      told.push_back(so_far.page_bytes);
      return {};
    };
    hooks.page = [&](size_t, uint64_t, uint64_t, std::span<const std::byte>) {
      ++pages;
      return Result<void>();
    };
    const auto summary = read_stream(source, {}, hooks);
    ASSERT_TRUE(summary) << summary.error().message;
    EXPECT_EQ(told, std::vector<uint64_t>{page_bytes});
    EXPECT_EQ(pages, 20U);
  }
}

TEST(StreamVariants, BlocksAreToldWithoutAnyPage) {
  const Bytes stream = stream_of(Bytes(), 8192);
  BlobSource source(stream.done());
  size_t told = 0;
  StreamHooks hooks;
  hooks.blocks = [&](const StreamSummary &) -> Result<void> {
    ++told;
    return {};
  };
  ASSERT_TRUE(read_stream(source, {}, hooks));
  EXPECT_EQ(told, 1U);
}

TEST(StreamVariants, TheSizeOfPagesStays) {
  for (const uint64_t page_bytes : {1024U, 4096U}) {
    Bytes bytes = head();
    ram_start(bytes, 0x2000).u8(1).text("m").u64(0x2000);
    ram_body_end(bytes);
    bytes.u8(0x02).u32(2).blob(first_page().done());
    ram_body_end(bytes);
    bytes.u8(0x08).u16(3).u16(16).u64(0x1000).u64(page_bytes);  // advise, too late
    bytes.u8(0x03).u32(2).u64(0x1008).u8(1).text("m").fill(page_bytes, 0x22);
    ram_body_end(bytes);
    bytes.u8(0x00);
    const Loaded loaded = load(bytes);
    EXPECT_EQ(loaded.summary.has_value(), page_bytes == 4096);
    if (!loaded.summary) {
      EXPECT_EQ(loaded.summary.error().code, ErrorCode::bad_stream);
      EXPECT_NE(loaded.summary.error().message.find("1024 bytes"), std::string::npos);
    }
  }
}

TEST(StreamVariants, SharedMemoryThatIsLeftOut) {
  Bytes bytes = head();
  bytes.u8(0x05).u8(26).text("configuration/capabilities").u32(1).u32(1);
  bytes.u8(15).text("x-ignore-shared");
  ram_start(bytes, 0x2000);
  bytes.u8(1).text("m").u64(0x1000).u64(0);             // name, length, address
  bytes.u8(3).text("shm").u64(0x1000).u64(0xfebc0000);  // the same of another
  ram_body_end(bytes);
  bytes.u8(0x03).u32(2).blob(first_page().done());
  ram_body_end(bytes);
  bytes.u8(0x00);
  const Loaded loaded = load(bytes);
  ASSERT_TRUE(loaded.summary) << loaded.summary.error().message;
  EXPECT_TRUE(loaded.memory.at("m") == filled(4096, 0x11));
  EXPECT_EQ(loaded.summary->blocks[1].address, 0xfebc0000U);
  EXPECT_FALSE(is_left_out(*loaded.summary, 0));
  EXPECT_TRUE(is_left_out(*loaded.summary, 1));
}

TEST(StreamVariants, Postcopy) {
  Bytes bytes = head();
  bytes.u8(0x08).u16(1).u16(0);                             // open the return path
  bytes.u8(0x08).u16(2).u16(4).u32(1);                      // ping 1
  bytes.u8(0x08).u16(3).u16(16).u64(0x201000).u64(0x1000);  // advise: host pages, target page
  ram_start(bytes, 0x402000);
  bytes.u8(1).text("m").u64(0x1000);                     // of usual pages: no size of them
  bytes.u8(4).text("huge").u64(0x400000).u64(0x200000);  // of host pages of 2 MiB
  bytes.u8(4).text("last").u64(0x1000);                  // and EOS, which is no size of pages
  ram_body_end(bytes);
  bytes.u8(0x02).u32(2).blob(first_page().done());
  ram_body_end(bytes);
  bytes.u8(0x08).u16(6).u16(12).u8(0).u8(1).text("m").u8(0).u64(0);  // discard some
  Bytes package;
  package.u8(0x08).u16(4).u16(0);  // listen
  add_section(package, 7, "dev", 0, 1, Bytes().text("state").done());
  add_section(package, 8, "dev", 1, 1, Bytes().text("more").done());
  package.u8(0x08).u16(5).u16(0);                                                  // run
  bytes.u8(0x08).u16(7).u16(4).u32(static_cast<uint32_t>(package.done().size()));  // packaged
  bytes.blob(package.done());
  bytes.u8(0x02).u32(2).u64(0x0028).fill(4096, 0x22);  // the page that the guest waited for
  ram_body_end(bytes);
  bytes.u8(0x03).u32(2);
  ram_body_end(bytes);
  bytes.u8(0x00);
  const Loaded loaded = load(bytes);
  ASSERT_TRUE(loaded.summary) << loaded.summary.error().message;
  EXPECT_TRUE(loaded.memory.at("m") == filled(4096, 0x22));
  EXPECT_EQ(loaded.memory.at("huge").size(), 0x400000U);
  EXPECT_EQ(loaded.summary->devices.size(), 2U);
  EXPECT_EQ(loaded.summary->stream_bytes, bytes.done().size());
}

TEST(StreamVariants, NoFooters) {
  const std::string json =
      R"({"page_size": 4096, "devices": [)"
      R"({"name": "dev", "instance_id": 0, "fields": [{"name": "a", "type": "uint32", "size": 4},)"
      R"({"name": "b", "type": "uint8", "size": 1, "array_len": 3}],)"
      R"("subsections": [{"vmsd_name": "dev/s", "fields": [{"name": "c", "size": 2}]}]},)"
      R"({"name": "dev", "instance_id": 1, "size": 5, "fields": [{"name": "data", "size": 5}]}]})";
  const auto build = [&](bool with_json, std::string_view machine) {
    Bytes bytes = head(machine);
    ram_start(bytes, 0x1000).u8(1).text("m").u64(0x1000);
    ram_body_end(bytes, false);
    bytes.u8(0x02).u32(2).blob(first_page().done());
    ram_body_end(bytes, false);
    bytes.u8(0x03).u32(2);
    ram_body_end(bytes, false);
    bytes.u8(0x04).u32(7).u8(3).text("dev").u32(0).u32(1);  // FULL
    bytes.u32(0xffffffff).text("abc");                      // a, b
    bytes.u8(5).u8(5).text("dev/s").u32(1).u16(0x0006);     // subsection, c
    bytes.u8(0x04).u32(8).u8(3).text("dev").u32(1).u32(1);  // FULL
    bytes.u8(0).u8(6).text("\x04~~");                       // looks like a tail, and like a section
    bytes.u8(0x00);
    if (with_json) {
      bytes.u8(0x06).u32(static_cast<uint32_t>(json.size())).text(json);
    }
    return bytes;
  };
  for (const std::string_view machine : {"pc-i440fx-2.3", ""}) {  // and without configuration
    const Bytes bytes = build(true, machine);
    const Loaded loaded = load(bytes);
    ASSERT_TRUE(loaded.summary) << loaded.summary.error().message;
    EXPECT_EQ(loaded.summary->machine_type, machine);
    EXPECT_TRUE(loaded.memory.at("m") == filled(4096, 0x11));
    ASSERT_EQ(loaded.summary->devices.size(), 2U);
    EXPECT_EQ(loaded.summary->devices[0].bytes, 4U + 3 + (6 + 5 + 2));
    EXPECT_EQ(loaded.summary->devices[1].bytes, 5U);
    EXPECT_EQ(loaded.summary->stream_bytes, bytes.done().size());
  }
  const Loaded refused = load(build(false, "pc-i440fx-2.2"));
  EXPECT_FALSE(refused.summary);
}

TEST(StreamVariants, SectionsInAnyOrder) {
  Bytes bytes = head();
  add_section(bytes, 7, "early", 0, 1, Bytes().text("a").done());
  bytes.u8(0x04).u32(2).u8(3).text("ram").u32(0).u32(4);  // all RAM in one FULL section
  bytes.u64(0x1000 | 4).u8(1).text("m").u64(0x1000).blob(first_page().done());
  ram_body_end(bytes);
  add_section(bytes, 8, "between", 0, 1, Bytes().text("b").done());
  bytes.u8(0x02).u32(2).u64(0x0022).u8(0);  // the page again
  ram_body_end(bytes);
  bytes.u8(0x08).u16(11).u16(0);  // switchover start
  add_section(bytes, 9, "late", 0, 1, Bytes().text("c").done());
  bytes.u8(0x00);
  const Loaded loaded = load(bytes);
  ASSERT_TRUE(loaded.summary) << loaded.summary.error().message;
  EXPECT_TRUE(loaded.memory.at("m") == filled(4096, 0));
  EXPECT_EQ(loaded.summary->devices.size(), 3U);
}

TEST(StreamVariants, BigEndianTargets) {
  // Integers of the stream are big-endian everywhere; RAM is as the guest has it.
  const Bytes records =
      Bytes().u64(0x0008).u8(1).text("m").u32(0x01020304).fill(4092, 0);  // a word of the guest's
  const Loaded loaded = load(stream_of(records, 4096, head("s390-ccw-virtio-7.2")));
  ASSERT_TRUE(loaded.summary) << loaded.summary.error().message;
  EXPECT_EQ(loaded.memory.at("m")[0], std::byte{1});
  EXPECT_EQ(loaded.memory.at("m")[3], std::byte{4});
  // What spapr saves in rounds of its own has no length.
  Bytes iterative = head("pseries-7.2");
  iterative.u8(0x01).u32(3).u8(10).text("spapr/htab").u32(0).u32(1).fill(8, 0);
  const Loaded refused = load(iterative);
  ASSERT_FALSE(refused.summary);
  EXPECT_NE(refused.summary.error().message.find("spapr/htab"), std::string::npos);
}

TEST(StreamVariants, MultifdIsRefusedByName) {
  const auto message = [](const Bytes &bytes) {
    const Loaded loaded = load(bytes);
    EXPECT_FALSE(loaded.summary);
    if (loaded.summary) {
      return std::string();
    }
    EXPECT_EQ(loaded.summary.error().code, ErrorCode::not_supported);
    return loaded.summary.error().message;
  };
  // A channel: magic, version, uuid, id.
  EXPECT_NE(message(Bytes().u32(0x11223344).u32(1).fill(16, 0).u8(0)).find("multifd"),
            std::string::npos);
  // The main stream, where the other channels have the pages.
  EXPECT_NE(message(stream_of(Bytes().u64(0x200), 4096)).find("multifd"), std::string::npos);
}

}  // namespace
}  // namespace qvmstate::vmstate::test
