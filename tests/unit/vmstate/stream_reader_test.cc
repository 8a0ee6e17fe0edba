// Reading streams: as QEMU of several releases writes them, and hostile ones.

#include "vmstate/stream_reader.h"

#include <random>

#include "stream_fixture.h"
#include "vmstate/device_sections.h"

namespace qvmstate::vmstate::test {
namespace {

constexpr std::string_view json = R"({"page_size": 4096, "devices": []})";

struct Page {
  size_t block;
  uint64_t offset;
  int fill;  ///< -1: a zero page
  bool operator==(const Page &) const = default;
};

/// What the stream() below holds, section by section, so that a test can change one of them.
struct Parts {
  Bytes head = Bytes()
                   .text("QEVM")
                   .u32(3)
                   .u8(0x07)  // configuration
                   .u32(11)
                   .text("pc-q35-10.0");
  Bytes configuration_subsections;
  Bytes ram_start = Bytes()
                        .u8(0x01)  // START
                        .u32(2)    // id
                        .u8(3)
                        .text("ram")
                        .u32(0)             // instance
                        .u32(4)             // version
                        .u64(0x4000 | 0x4)  // MEM_SIZE
                        .u8(6)
                        .text("pc.ram")
                        .u64(0x3000)
                        .u8(4)
                        .text("vram")
                        .u64(0x1000)
                        .u64(0x10)  // EOS
                        .u8(0x7e)
                        .u32(2);
  Bytes ram_rounds = Bytes()
                         .u8(0x02)  // PART
                         .u32(2)
                         .u64(0x0008)  // PAGE
                         .u8(6)
                         .text("pc.ram")
                         .fill(4096, 0x41)
                         .u64(0x1022)  // ZERO, CONTINUE
                         .u8(0)
                         .u64(0x10)
                         .u8(0x7e)
                         .u32(2)
                         .u8(0x02)  // a second round, in the same block
                         .u32(2)
                         .u64(0x2028)  // PAGE, CONTINUE
                         .fill(4096, 0x42)
                         .u64(0x0002)  // ZERO
                         .u8(4)
                         .text("vram")
                         .u8(0)
                         .u64(0x10)
                         .u8(0x7e)
                         .u32(2);
  Bytes command = Bytes().u8(0x08).u16(11).u16(0);  // switchover-start
  Bytes ram_end = Bytes()
                      .u8(0x03)  // END
                      .u32(2)
                      .u64(0x0008)  // a page dirtied again
                      .u8(6)
                      .text("pc.ram")
                      .fill(4096, 0x43)
                      .u64(0x10)
                      .u8(0x7e)
                      .u32(2);
  Bytes devices = [] {
    Bytes bytes;
    add_section(bytes, 0, "timer", 0, 2, Bytes().fill(24, 1).done());
    add_section(bytes, 5, "cpu", 1, 12, Bytes().text("~registers").done());
    return bytes;
  }();
  Bytes tail = Bytes().u8(0x00).u8(0x06).u32(json.size()).text(json);

  Blob done() const {
    Bytes bytes;
    for (const Bytes *part : {&head, &configuration_subsections, &ram_start, &ram_rounds, &command,
                              &ram_end, &devices, &tail}) {
      bytes.blob(part->done());
    }
    return bytes.done();
  }
};

TEST(StreamReader, a_stream_of_qemu) {
  Parts parts;
  parts.configuration_subsections.u8(0x05)
      .u8(26)
      .text("configuration/capabilities")
      .u32(1)  // version
      .u32(1)  // count
      .u8(12)
      .text("postcopy-ram")
      .u8(0x05)
      .u8(18)
      .text("configuration/uuid")
      .u32(1)
      .fill(16, 0x99);
  Blob bytes = parts.done();
  const size_t exact = bytes.size();
  bytes.resize(exact + 3000, std::byte{0x04});  // a vmstate area goes on after its stream
  BlobSource source(bytes);
  std::vector<Page> pages;
  const auto summary = read_stream(
      source, [&](size_t block, uint64_t offset, uint64_t size, auto data) -> Result<void> {
        EXPECT_EQ(size, 4096U);
        EXPECT_TRUE(data.empty() || data.size() == 4096);
        pages.push_back({block, offset, data.empty() ? -1 : static_cast<int>(data[4095])});
        return {};
      });
  ASSERT_TRUE(summary) << summary.error().message;
  EXPECT_EQ(summary->machine_type, "pc-q35-10.0");
  EXPECT_EQ(summary->capabilities, std::vector<std::string>{"postcopy-ram"});
  EXPECT_FALSE(summary->target_page_bits);
  EXPECT_EQ(summary->page_bytes, 4096U);
  ASSERT_EQ(summary->blocks.size(), 2U);
  EXPECT_EQ(summary->blocks[0].idstr, "pc.ram");
  EXPECT_EQ(summary->blocks[0].used_bytes, 0x3000U);
  EXPECT_EQ(summary->blocks[1].idstr, "vram");
  EXPECT_EQ(summary->data_pages, 3U);
  EXPECT_EQ(summary->zero_pages, 2U);
  EXPECT_EQ(pages,
            (std::vector<Page>{
                {0, 0, 0x41}, {0, 0x1000, -1}, {0, 0x2000, 0x42}, {1, 0, -1}, {0, 0, 0x43}}));
  ASSERT_EQ(summary->devices.size(), 2U);
  EXPECT_EQ(summary->devices[1].idstr, "cpu");
  EXPECT_EQ(summary->devices[1].instance, 1U);
  EXPECT_EQ(summary->devices[1].version, 12U);
  EXPECT_EQ(summary->devices[1].bytes, 10U);
  EXPECT_EQ(bytes[summary->devices[1].offset], std::byte{'~'});
  EXPECT_EQ(summary->vmdescription, json);
  EXPECT_EQ(summary->stream_bytes, exact);
}

TEST(StreamReader, device_before_ram_and_no_vmdescription) {
  Parts parts;
  Bytes early = parts.head;
  add_section(early, 9, "0000:00:03.0/virtio-mem-device-early", 0, 1,
              Bytes().u8(0x7e).u32(9).u8(0x00).text("plugged").done());
  parts.head = early;
  const size_t without_tail = parts.done().size() - parts.tail.done().size();
  parts.tail = Bytes().u8(0x00).fill(100, 0x33);
  const Blob bytes = parts.done();
  BlobSource source(bytes);
  const auto summary = read_stream(source);
  ASSERT_TRUE(summary) << summary.error().message;
  ASSERT_EQ(summary->devices.size(), 3U);
  EXPECT_EQ(summary->devices[0].idstr, "0000:00:03.0/virtio-mem-device-early");
  EXPECT_EQ(summary->devices[2].idstr, "cpu");
  EXPECT_EQ(summary->vmdescription, "");
  EXPECT_EQ(summary->stream_bytes, without_tail + 1);
}

TEST(StreamReader, end_mark_inside_a_device_is_told_by_the_vmdescription) {
  Parts parts;
  add_section(parts.devices, 6, "tricky", 0, 1, Bytes().u8(0x7e).u32(6).u8(0).text("xyz").done());
  const Blob bytes = parts.done();
  BlobSource source(bytes);
  const auto summary = read_stream(source);
  ASSERT_TRUE(summary) << summary.error().message;
  ASSERT_EQ(summary->devices.size(), 3U);
  EXPECT_EQ(summary->devices[2].bytes, 9U);
  EXPECT_EQ(summary->stream_bytes, bytes.size());
}

TEST(StreamReader, devices_larger_than_the_first_window) {
  Parts parts;
  add_section(parts.devices, 6, "large", 0, 1, Bytes().fill(3 * mib, 0x7e).done());
  add_section(parts.devices, 7, "after", 0, 1, {});
  const Blob bytes = parts.done();
  BlobSource source(bytes);
  const auto summary = read_stream(source);
  ASSERT_TRUE(summary) << summary.error().message;
  ASSERT_EQ(summary->devices.size(), 4U);
  EXPECT_EQ(summary->devices[2].bytes, 3 * mib);
  EXPECT_EQ(summary->stream_bytes, bytes.size());
}

TEST(StreamReader, refused_by_name) {
  const auto message = [](const Parts &parts, ErrorCode code) -> std::string {
    const Blob bytes = parts.done();
    BlobSource source(bytes);
    const auto summary = read_stream(source);
    EXPECT_FALSE(summary);
    if (summary) {
      return "";
    }
    EXPECT_EQ(summary.error().code, code) << summary.error().message;
    return summary.error().message;
  };
  const auto has = [](const std::string &text, std::string_view part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  // RAM records that are not decoded.
  const std::pair<uint64_t, const char *> flags[] = {{0x80, "RDMA"}, {0x200, "multifd"}};
  for (const auto &[flag, name] : flags) {
    Parts parts;
    parts.ram_rounds = Bytes().u8(0x02).u32(2).u64(flag);
    has(message(parts, ErrorCode::not_supported), name);
  }
  Parts command;
  command.command = Bytes().u8(0x08).u16(8).u16(0);  // COLO
  has(message(command, ErrorCode::not_supported), "command 8");
  Parts iterative;
  iterative.ram_start = Bytes().u8(1).u32(3).u8(12).text("dirty-bitmap").u32(0).u32(1);
  has(message(iterative, ErrorCode::not_supported), "dirty-bitmap");
}

TEST(StreamReader, damaged) {
  const auto expect_bad = [](const char *what, auto &&change) {
    SCOPED_TRACE(what);
    Parts parts;
    change(parts);
    const Blob bytes = parts.done();
    BlobSource source(bytes);
    const auto summary = read_stream(source);
    ASSERT_FALSE(summary);
    EXPECT_EQ(summary.error().code, ErrorCode::bad_stream) << summary.error().message;
  };
  const auto round = [](uint64_t word) { return Bytes().u8(2).u32(2).u64(word); };
  expect_bad("magic", [](Parts &p) { p.head = Bytes().text("QFI\xfb").u32(3); });
  expect_bad("version", [](Parts &p) { p.head = Bytes().text("QEVM").u32(2); });
  expect_bad("machine length",
             [](Parts &p) { p.head = Bytes().text("QEVM").u32(3).u8(7).u32(0xffffffff); });
  expect_bad("page bits", [](Parts &p) {
    p.configuration_subsections.u8(5).u8(30).text("configuration/target-page-bits").u32(1).u32(63);
  });
  expect_bad("capability count", [](Parts &p) {
    p.configuration_subsections.u8(5).u8(26).text("configuration/capabilities").u32(1).u32(1 << 30);
  });
  expect_bad("unknown subsection",
             [](Parts &p) { p.configuration_subsections.u8(5).u8(1).text("x").u32(1); });
  expect_bad("RAM version 3",
             [](Parts &p) { p.ram_start = Bytes().u8(1).u32(2).u8(3).text("ram").u32(0).u32(3); });
  expect_bad("second RAM section", [](Parts &p) { p.ram_start.blob(Parts().ram_start.done()); });
  expect_bad("block larger than the total", [](Parts &p) {
    p.ram_start = Bytes().u8(1).u32(2).u8(3).text("ram").u32(0).u32(4);
    p.ram_start.u64(0x1000 | 4).u8(1).text("a").u64(0x2000);
  });
  expect_bad("block of no size", [](Parts &p) {
    p.ram_start = Bytes().u8(1).u32(2).u8(3).text("ram").u32(0).u32(4);
    p.ram_start.u64(0x1000 | 4).u8(1).text("a").u64(0);
  });
  expect_bad("block twice", [](Parts &p) {
    p.ram_start = Bytes().u8(1).u32(2).u8(3).text("ram").u32(0).u32(4);
    p.ram_start.u64(0x2000 | 4).u8(1).text("a").u64(0x1000).u8(1).text("a").u64(0x1000);
  });
  expect_bad("wrong footer",
             [](Parts &p) { p.ram_rounds = Bytes().u8(2).u32(2).u64(0x10).u8(0x7e).u32(3); });
  expect_bad("unknown section continues", [](Parts &p) { p.ram_rounds = Bytes().u8(2).u32(3); });
  expect_bad("CONTINUE without a block", [&](Parts &p) { p.ram_rounds = round(0x22).u8(0); });
  expect_bad("unknown block", [&](Parts &p) { p.ram_rounds = round(2).u8(1).text("z").u8(0); });
  expect_bad("page past the end",
             [&](Parts &p) { p.ram_rounds = round(0x3002).u8(6).text("pc.ram").u8(0); });
  expect_bad("offset near 2^64", [&](Parts &p) {
    p.ram_rounds = round(0xfffffffffffff002).u8(6).text("pc.ram").u8(0);
  });
  expect_bad("unknown flag", [&](Parts &p) { p.ram_rounds = round(0x400); });
  expect_bad("two kinds at once", [&](Parts &p) { p.ram_rounds = round(0x0a); });
  expect_bad("section type", [](Parts &p) { p.devices = Bytes().u8(0x55); });
  expect_bad("device without footer", [](Parts &p) {
    p.devices = Bytes().u8(4).u32(7).u8(1).text("x").u32(0).u32(1).text("body");
  });
}

TEST(StreamReader, every_truncation_is_an_error_or_lacks_the_tail) {
  const Parts parts;
  const Blob bytes = parts.done();
  const size_t tail_at = bytes.size() - parts.tail.done().size();
  for (size_t size = 0; size < bytes.size(); ++size) {
    BlobSource source({bytes.data(), size});
    const auto summary = read_stream(source);
    EXPECT_EQ(summary.has_value(), size > tail_at) << size;
    if (summary) {
      EXPECT_EQ(summary->vmdescription, "");
    }
  }
}

// Random damage must neither crash nor hang, which the sanitizer builds watch.
TEST(StreamReader, survives_random_damage) {
  Parts parts;
  parts.configuration_subsections.u8(0x05).u8(26).text("configuration/capabilities").u32(1);
  parts.configuration_subsections.u32(1).u8(12).text("postcopy-ram");
  parts.ram_rounds = Bytes().u8(2).u32(2).u64(2).u8(6).text("pc.ram").u8(0).u64(0x1022).u8(0);
  parts.ram_rounds.u64(0x10).u8(0x7e).u32(2);
  parts.ram_end = Bytes().u8(3).u32(2).u64(0x10).u8(0x7e).u32(2);
  const Blob stream = parts.done();
  Blob device_state = Bytes().text("QEVM").u32(3).blob(parts.devices.done()).u8(0).done();

  std::mt19937 random(1);
  size_t intact = 0;
  for (int i = 0; i < 10000; ++i) {
    for (const Blob *original : {&stream, static_cast<const Blob *>(&device_state)}) {
      Blob bytes = *original;
      for (unsigned flips = random() % 4; flips > 0; --flips) {
        bytes[random() % bytes.size()] ^= static_cast<std::byte>(1U << random() % 8);
      }
      if (random() % 4 == 0) {
        bytes.resize(random() % bytes.size());
      }
      if (random() % 4 == 0 && !bytes.empty()) {
        const size_t from = random() % bytes.size();
        bytes.insert(bytes.end(), bytes.begin() + static_cast<std::ptrdiff_t>(from), bytes.end());
      }
      BlobSource source(bytes);
      uint64_t pages = 0;
      const auto summary = read_stream(source, [&](size_t, uint64_t, uint64_t, auto) {
        pages += 1;
        return Result<void>();
      });
      if (summary) {
        EXPECT_EQ(pages, summary->data_pages + summary->zero_pages);
        EXPECT_LE(summary->stream_bytes, bytes.size());
        intact += 1;
      }
      if (const auto sections = split_device_sections(bytes)) {
        size_t total = 8 + 1;
        for (const DeviceSection &section : *sections) {
          total += section.whole.size();
        }
        EXPECT_EQ(total, bytes.size());
      }
    }
  }
  EXPECT_GT(intact, 100U);  // the damage must leave streams that are read to their end
}

}  // namespace
}  // namespace qvmstate::vmstate::test
