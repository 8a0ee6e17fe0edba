// The legacy stream: golden bytes, and random RAM decoded again by a decoder of the test's own.

#include "vmstate/legacy_writer.h"

#include <algorithm>
#include <map>

#include "stream_fixture.h"

namespace qvmstate::vmstate::test {
namespace {

constexpr auto U = Touch::untouched;
constexpr auto Z = Touch::zero;
constexpr auto D = Touch::data;

/// Both kinds of source, and a hook that must see all RAM.
class LegacyWriter : public testing::TestWithParam<bool> {};

INSTANTIATE_TEST_SUITE_P(Sources, LegacyWriter, testing::Values(true, false),
                         [](const auto &info) { return info.param ? "view" : "read_pages"; });

TEST_P(LegacyWriter, golden) {
  FakeRam ram(GetParam());
  const Touch a[] = {D, Z};
  const Touch b[] = {U, D};
  ram.add_block("a.ram", a, 1);
  ram.add_block("b.ram", b, 2);
  std::memset(ram.memory(0).data(), 0x11, page);
  std::memset(ram.memory(1).data() + page, 0x22, page);

  const Blob timer_body = Bytes().u32(0xdeadbeef).done();
  Bytes timer;
  add_section(timer, 3, "timer", 0, 2, timer_body);
  const Blob early_body = Bytes().u8(0xee).done();
  Bytes early;
  add_section(early, 7, "0000:00:03.0/virtio-mem-device-early", 0, 1, early_body);
  const std::vector<DeviceSection> devices = {
      {3, "timer", 0, 2, timer_body, timer.done()},
      {7, "0000:00:03.0/virtio-mem-device-early", 0, 1, early_body, early.done()}};
  const std::string json =
      R"({"configuration": {"vmsd_name": "configuration", "version": 1, "fields": [)"
      R"({"name": "len", "type": "uint32", "size": 4}, )"
      R"({"name": "name", "type": "buffer", "size": 4}], )"
      R"("subsections": [{"vmsd_name": "configuration/target-page-bits", "version": 1, )"
      R"("fields": [{"name": "target_page_bits", "type": "uint32", "size": 4}]}]}, )"
      R"("page_size": 4096, "devices": [)"
      R"({"name": "0000:00:03.0/virtio-mem-device-early", "instance_id": 0, "version": 1, )"
      R"("size": 1, "fields": [{"name": "data", "type": "buffer", "size": 1}]}, )"
      R"({"name": "timer", "instance_id": 0, "version": 2, "size": 4, )"
      R"("fields": [{"name": "data", "type": "buffer", "size": 4}]}]})";

  Bytes expected;
  expected.text("QEVM").u32(3);           // file header
  expected.u8(0x07).u32(4).text("virt");  // configuration: machine type
  expected.u8(0x05);                      // its subsection
  expected.u8(30).text("configuration/target-page-bits");
  expected.u32(1);                  // subsection version
  expected.u32(12);                 // 4 KiB pages
  expected.u8(0x04).u32(7).u8(36);  // FULL: early section, before RAM
  expected.text("0000:00:03.0/virtio-mem-device-early");
  expected.u32(0).u32(1).u8(0xee).u8(0x7e).u32(7);      // instance, version, body, footer
  expected.u8(0x01).u32(0x7fffffff).u8(3).text("ram");  // START
  expected.u32(0).u32(4);                               // instance, version
  expected.u64(4 * 4096 | 0x004);                       // total size, MEM_SIZE
  expected.u8(5).text("a.ram").u64(2 * 4096);           // first block
  expected.u8(5).text("b.ram").u64(2 * 4096);           // second block
  expected.u64(0x010);                                  // EOS
  expected.u8(0x7e).u32(0x7fffffff);                    // footer
  expected.u8(0x02).u32(0x7fffffff);                    // PART
  expected.u64(0x008).u8(5).text("a.ram");              // PAGE at 0, with the block's name
  expected.fill(4096, 0x11);
  expected.u64(4096 | 0x022).u8(0);               // ZERO, CONTINUE at 4096
  expected.u64(0x002).u8(5).text("b.ram").u8(0);  // ZERO at 0, with the block's name
  expected.u64(4096 | 0x028).fill(4096, 0x22);    // PAGE, CONTINUE at 4096
  expected.u64(0x010);                            // EOS
  expected.u8(0x7e).u32(0x7fffffff);              // footer
  expected.u8(0x03).u32(0x7fffffff);              // END
  expected.u64(0x010);                            // EOS
  expected.u8(0x7e).u32(0x7fffffff);              // footer
  expected.u8(0x04).u32(3).u8(5).text("timer");   // FULL: the device as it was
  expected.u32(0).u32(2).u32(0xdeadbeef).u8(0x7e).u32(3);
  expected.u8(0x00);                                                     // EOF
  expected.u8(0x06).u32(static_cast<uint32_t>(json.size())).text(json);  // vmdescription

  const Written written = write_stream(ram, {"virt", 12, 4096}, devices);
  ASSERT_TRUE(written.stats) << written.stats.error().message;
  EXPECT_EQ(written.bytes, expected.done());
  EXPECT_EQ(written.stats->stream_bytes, expected.done().size());
  EXPECT_EQ(written.stats->ram_bytes, 4 * page);
  EXPECT_EQ(written.stats->data_pages, 2U);
  EXPECT_EQ(written.stats->zero_pages, 1U);
  EXPECT_EQ(written.stats->untouched_pages, 1U);
}

TEST_P(LegacyWriter, goldenRounds) {
  FakeRam ram(GetParam());
  const Touch pages[] = {D, Z, D};
  ram.add_block("a", pages, 1);
  ram.add_block("b", pages, 2);
  for (size_t block = 0; block < 2; ++block) {
    std::memset(ram.memory(block).data(), 0x11, page);
    std::memset(ram.memory(block).data() + 2 * page, 0x33, page);
  }
  io::File file(std::make_unique<io::MemoryBackend>(), "memory", 4);
  auto pool = io::BufferPool::create(3, 1 * mib);
  ASSERT_TRUE(pool);
  IdentityPlacement placement;
  io::StreamBuffer out(file, *pool, placement);
  auto writer = vmstate::LegacyWriter::begin(out, {"pc", {}, 4096}, ram.blocks(), {});
  ASSERT_TRUE(writer) << writer.error().message;
  ASSERT_TRUE(writer->put_pages(ram, {}));
  const uint64_t first_end = out.tell();

  std::memset(ram.memory(1).data() + 2 * page, 0x44, page);
  const uint64_t words = 0b110;
  const uint64_t *const bitmaps[] = {nullptr, &words};
  const DirtyPages dirty(bitmaps);
  uint64_t told = 0;
  ASSERT_TRUE(writer->put_pages(
      ram,
      [&](uint64_t bytes) {
        told = bytes;
        return Result<void>();
      },
      &dirty));
  EXPECT_EQ(told, 2 * page);
  const uint64_t second_end = out.tell();
  ASSERT_TRUE(writer->finish({}));

  Bytes round;
  round.u8(0x02).u32(0x7fffffff);                 // PART
  round.u64(4096 | 0x002).u8(1).text("b").u8(0);  // ZERO at 4096, with the name of the block
  round.u64(8192 | 0x028).fill(4096, 0x44);       // PAGE, CONTINUE
  round.u64(0x010).u8(0x7e).u32(0x7fffffff);      // EOS, footer
  round.u8(0x03).u32(0x7fffffff);                 // END
  Blob bytes(round.done().size());
  ASSERT_TRUE(file.read_at(bytes, HostOffset(first_end)));
  EXPECT_EQ(bytes, round.done());
  EXPECT_EQ(second_end - first_end, round.done().size() - 5);
}

/// Wants the last page of "b" first, then all of "a", then the rest of "b".
class OrderedRam : public FakeRam, private RamOrder {
 public:
  OrderedRam() : FakeRam(false) {}
  RamOrder *order() override { return this; }

 private:
  Result<std::optional<RamRange>> next() override {
    constexpr RamRange ranges[] = {
        {1, 2 * page, page}, {0, 0, page}, {1, 0, page}, {1, page, page}};
    return step_ < std::size(ranges) ? std::optional(ranges[step_++]) : std::nullopt;
  }
  size_t step_ = 0;
};

TEST(LegacyWriterOrder, golden) {
  OrderedRam ram;
  const Touch a[] = {D};
  const Touch b[] = {D, U, D};
  ram.add_block("a", a, 1);
  ram.add_block("b", b, 2);
  std::memset(ram.memory(0).data(), 0x11, page);
  std::memset(ram.memory(1).data(), 0x22, page);
  std::memset(ram.memory(1).data() + 2 * page, 0x33, page);
  Bytes part;
  part.u8(0x02).u32(0x7fffffff);                            // PART
  part.u64(8192 | 0x008).u8(1).text("b").fill(4096, 0x33);  // PAGE, with the name of the block
  part.u64(0x008).u8(1).text("a").fill(4096, 0x11);         // PAGE of another block
  part.u64(0x008).u8(1).text("b").fill(4096, 0x22);         // PAGE of the first one again
  part.u64(4096 | 0x022).u8(0);                             // ZERO, CONTINUE
  part.u64(0x010).u8(0x7e).u32(0x7fffffff);                 // EOS, footer
  const Written written = write_stream(ram, {"pc", {}, 4096}, {});
  ASSERT_TRUE(written.stats) << written.stats.error().message;
  const Blob expected = part.done();
  EXPECT_NE(
      std::search(written.bytes.begin(), written.bytes.end(), expected.begin(), expected.end()),
      written.bytes.end());
  EXPECT_EQ(written.stats->data_pages, 3U);
  EXPECT_EQ(written.stats->untouched_pages, 1U);
}

uint64_t be(std::span<const std::byte> bytes, size_t at, size_t count) {
  uint64_t value = 0;
  for (size_t i = 0; i < count; ++i) {
    value = value << 8 | static_cast<uint64_t>(bytes[at + i]);
  }
  return value;
}

std::string text_at(std::span<const std::byte> bytes, size_t at, size_t count) {
  return {reinterpret_cast<const char *>(bytes.data() + at), count};
}

struct Decoded {
  std::map<std::string, Blob> ram;
  size_t records = 0;
  size_t repeated = 0;  ///< pages with more than one record
  size_t end = 0;       ///< where the sections after RAM begin
};

/// Decodes a stream of machine type "pc" with no devices before RAM. Pages without a record are
/// filled with 0xcc.
Decoded decode(std::span<const std::byte> bytes) {
  Decoded decoded;
  std::map<std::string, std::vector<bool>> seen;
  std::string name;
  size_t at = 8 + 5 + 2;
  for (int type = 1; type <= 3; ++type) {
    EXPECT_EQ(be(bytes, at, 1), static_cast<uint64_t>(type));
    at += type == 1 ? 5 + 4 + 8 : 5;
    for (;;) {
      const uint64_t word = be(bytes, at, 8);
      const uint64_t offset = word / page * page;
      const uint64_t flags = word % page;
      at += 8;
      if (flags == 0x10) {
        break;
      }
      if (flags == 0x04) {
        for (uint64_t total = 0; total < offset;) {
          const size_t length = be(bytes, at, 1);
          const std::string block = text_at(bytes, at + 1, length);
          const uint64_t used = be(bytes, at + 1 + length, 8);
          decoded.ram[block].assign(used, std::byte{0xcc});
          seen[block].assign(used / page, false);
          total += used;
          at += 1 + length + 8;
        }
        continue;
      }
      if ((flags & 0x20) == 0) {
        const size_t length = be(bytes, at, 1);
        name = text_at(bytes, at + 1, length);
        at += 1 + length;
      }
      decoded.records += 1;
      decoded.repeated += seen.at(name).at(offset / page) ? 1 : 0;
      seen.at(name).at(offset / page) = true;
      std::byte *to = &decoded.ram.at(name).at(offset);
      if ((flags & ~uint64_t{0x20}) == 0x02) {
        EXPECT_EQ(bytes[at], std::byte{0});
        std::memset(to, 0, page);
        at += 1;
      } else {
        EXPECT_EQ(flags & ~uint64_t{0x20}, 0x08U);
        std::memcpy(to, &bytes[at], page);
        at += page;
      }
    }
    EXPECT_EQ(be(bytes, at, 1), 0x7eU);
    at += 5;
  }
  decoded.end = at;
  return decoded;
}

void expect_round_trip(FakeRam &ram, size_t buffer_bytes) {
  uint64_t last_done = 0;
  const RamHook hook = [&](uint64_t done) -> Result<void> {
    EXPECT_GT(done, last_done);
    last_done = done;
    return {};
  };
  const Written written = write_stream(ram, {"pc", {}, page}, {}, buffer_bytes, hook);
  ASSERT_TRUE(written.stats) << written.stats.error().message;
  EXPECT_EQ(last_done, written.stats->ram_bytes);
  const Decoded decoded = decode(written.bytes);
  EXPECT_EQ(decoded.repeated, 0U);
  EXPECT_EQ(decoded.records * page, written.stats->ram_bytes);
  EXPECT_EQ(decoded.records,
            written.stats->data_pages + written.stats->zero_pages + written.stats->untouched_pages);
  ASSERT_EQ(decoded.ram.size(), ram.blocks().size());
  for (size_t i = 0; i < ram.blocks().size(); ++i) {
    EXPECT_TRUE(decoded.ram.at(ram.blocks()[i].idstr) == ram.expected(i)) << i;
  }
  EXPECT_EQ(be(written.bytes, decoded.end, 1), 0U);

  // Our own reader must see the same.
  BlobSource source(written.bytes);
  std::map<std::string, Blob> read;
  for (const RamBlock &block : ram.blocks()) {
    read[block.idstr].assign(block.used_bytes, std::byte{0xcc});
  }
  const auto summary = read_stream(
      source, [&](size_t block, uint64_t offset, uint64_t bytes, auto data) -> Result<void> {
        std::span<std::byte> to(&read.at(ram.blocks()[block].idstr).at(offset), bytes);
        std::ranges::fill(to, std::byte{0});
        std::ranges::copy(data, to.begin());
        return {};
      });
  ASSERT_TRUE(summary) << summary.error().message;
  EXPECT_EQ(summary->stream_bytes, written.stats->stream_bytes);
  EXPECT_EQ(summary->data_pages, written.stats->data_pages);
  EXPECT_TRUE(read == decoded.ram);
}

std::vector<Touch> mixture(std::mt19937 &random, size_t pages) {
  std::vector<Touch> touch;
  while (touch.size() < pages) {
    const auto kind = static_cast<Touch>(random() % 3);
    const size_t run = random() % 4 == 0 ? random() % 200 + 1 : random() % 3 + 1;
    touch.insert(touch.end(), std::min(run, pages - touch.size()), kind);
  }
  return touch;
}

TEST_P(LegacyWriter, random_ram) {
  std::mt19937 random(42);
  for (int round = 0; round < 40; ++round) {
    SCOPED_TRACE(round);
    FakeRam ram(GetParam());
    const size_t blocks = random() % 4 + 1;
    for (size_t i = 0; i < blocks; ++i) {
      const size_t pages = random() % 5 == 0 ? 1 : random() % 700 + 1;
      const std::string idstr(random() % 5 == 0 ? 255 : 1 + random() % 30,
                              static_cast<char>('a' + i));
      ram.add_block(idstr, mixture(random, pages), random());
    }
    // Small buffers make many records straddle.
    const size_t buffer_bytes = size_t{4096} << (random() % 9);
    expect_round_trip(ram, buffer_bytes);
  }
}

TEST_P(LegacyWriter, all_of_one_kind) {
  for (const Touch kind : {U, Z, D}) {
    FakeRam ram(GetParam());
    // More records of each kind than a buffer holds, and no multiple of a batch.
    ram.add_block("big", std::vector<Touch>(kind == D ? 1001 : 8001, kind), 5);
    ram.add_block("one page", std::vector<Touch>(1, kind), 6);
    expect_round_trip(ram, 64 * kib);
  }
}

TEST(LegacyWriterSources, both_kinds_write_the_same) {
  std::mt19937 random(7);
  const auto touch = mixture(random, 3000);
  FakeRam view(true);
  FakeRam read(false);
  view.add_block("pc.ram", touch, 3);
  read.add_block("pc.ram", touch, 3);
  const Written a = write_stream(view, {"pc", {}, page}, {});
  const Written b = write_stream(read, {"pc", {}, page}, {});
  ASSERT_TRUE(a.stats && b.stats);
  EXPECT_TRUE(a.bytes == b.bytes);
  EXPECT_EQ(a.stats->zero_pages, b.stats->zero_pages);
}

TEST(LegacyWriterSources, target_pages_of_64_kib) {
  // Untouched 4 KiB pieces of a larger target page: it is read whole, or skipped whole.
  FakeRam ram(true);
  std::vector<Touch> touch(16 * 4, Z);
  touch[16 + 3] = D;
  std::fill_n(touch.begin() + 32, 16, U);
  ram.add_block("m", touch, 1);
  std::memset(ram.memory(0).data() + 32 * page, 0, 16 * page);
  const Written written = write_stream(ram, {"virt", 16, 65536}, {});
  ASSERT_TRUE(written.stats) << written.stats.error().message;
  EXPECT_EQ(written.stats->data_pages, 1U);
  EXPECT_EQ(written.stats->zero_pages, 2U);
  EXPECT_EQ(written.stats->untouched_pages, 1U);
  BlobSource source(written.bytes);
  const auto summary = read_stream(source);
  ASSERT_TRUE(summary) << summary.error().message;
  EXPECT_EQ(summary->page_bytes, 65536U);
  EXPECT_EQ(summary->zero_pages, 3U);
}

TEST(LegacyWriterArguments, refused) {
  const auto code = [](FakeRam &ram, const StreamConfiguration &configuration) {
    const Written written = write_stream(ram, configuration, {});
    EXPECT_FALSE(written.stats);
    return written.stats ? ErrorCode::io : written.stats.error().code;
  };
  const StreamConfiguration pc{"pc", {}, page};
  const Touch one[] = {D};
  FakeRam empty(true);
  EXPECT_EQ(code(empty, pc), ErrorCode::bad_argument);
  FakeRam no_name(true);
  no_name.add_block("", one, 1);
  EXPECT_EQ(code(no_name, pc), ErrorCode::bad_argument);
  FakeRam long_name(true);
  long_name.add_block(std::string(256, 'x'), one, 1);
  EXPECT_EQ(code(long_name, pc), ErrorCode::bad_argument);
  FakeRam same_name(true);
  same_name.add_block("a", one, 1);
  same_name.add_block("a", one, 1);
  EXPECT_EQ(code(same_name, pc), ErrorCode::bad_argument);
  FakeRam odd_size(true);
  odd_size.add_block("a", one, 1);
  odd_size.block_list()[0].used_bytes = 4095;
  EXPECT_EQ(code(odd_size, pc), ErrorCode::bad_argument);
  odd_size.block_list()[0].used_bytes = 0;
  EXPECT_EQ(code(odd_size, pc), ErrorCode::bad_argument);
  FakeRam fine(true);
  fine.add_block("a", one, 1);
  EXPECT_EQ(code(fine, {"pc", {}, 1024}), ErrorCode::bad_argument);
  EXPECT_EQ(code(fine, {"pc", {}, 5000}), ErrorCode::bad_argument);
}

TEST(LegacyWriterArguments, a_failing_hook_stops_it) {
  FakeRam ram(true);
  ram.add_block("a", std::vector<Touch>(5000, Z), 1);
  uint64_t calls = 0;
  const Written written = write_stream(ram, {"pc", {}, page}, {}, 1 * mib, [&](uint64_t) {
    calls += 1;
    return Result<void>(fail(ErrorCode::cancelled, "cancelled"));
  });
  ASSERT_FALSE(written.stats);
  EXPECT_EQ(written.stats.error().code, ErrorCode::cancelled);
  EXPECT_EQ(calls, 1U);
}

}  // namespace
}  // namespace qvmstate::vmstate::test
