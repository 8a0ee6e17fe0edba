// The layout stream-aligned: golden bytes of groups, and streams read back by the readers.
#include "vmstate/aligned_writer.h"

#include <algorithm>
#include <map>

#include "stream_fixture.h"
#include "vmstate/aligned_group.h"
#include "vmstate/state_check.h"
#include "vmstate/stored_state.h"

namespace qvmstate::vmstate::test {
namespace {

constexpr auto U = Touch::untouched;
constexpr auto Z = Touch::zero;
constexpr auto D = Touch::data;

/// A group without the bytes of its pages, which are left as they are here: 0xcc.
Blob group_of(const RamBlock &block, uint64_t first_page, uint64_t pages, size_t bytes) {
  Blob group(bytes, std::byte{0xcc});
  const std::byte *first = begin_group(group, {&block, first_page, pages});
  EXPECT_EQ(first - group.data(), static_cast<ptrdiff_t>(bytes - pages * group_page_stride + 8));
  return group;
}

TEST(AlignedGroup, Golden) {
  const RamBlock block = {"pc.ram", 1 * mib, page};
  Bytes expected;
  expected.u64(15 * 4096 | 0x002);  // ZERO at the first page
  expected.u8(6).text("pc.ram");    // with the block's name
  expected.u8(0);                   // filled with this byte
  expected.u64(15 * 4096 | 0x060);  // XBZRLE, CONTINUE at the same page
  expected.u8(1);                   // encoding
  expected.u16(3949);               // bytes of the difference: 65536 - 15 * 4104 - 16 - 11
  expected.u8(0);                   // none unchanged
  expected.u8(0x80 | (3946 & 0x7f)).u8(3946 >> 7);  // then so many bytes
  expected.fill(3946, 0);
  for (uint64_t i = 15; i < 30; ++i) {
    expected.u64(i * 4096 | 0x028).fill(4096, 0xcc);  // PAGE, CONTINUE
  }
  EXPECT_EQ(group_of(block, 15, 15, 64 * kib), expected.done());
}

TEST(AlignedGroup, GoldenLastOneOfABlock) {
  const RamBlock block = {"rom", 5 * page, page};
  Bytes expected;
  expected.u64(0x002).u8(3).text("rom").u8(0);  // ZERO with the name
  // 65536 - 13 - 5 * 4104 = 45003 bytes are left: ten differences as long as they can be, and one.
  for (int i = 0; i < 10; ++i) {
    expected.u64(0x060).u8(1).u16(4096).u8(0).u8(0xfd).u8(0x1f).fill(4093, 0);
  }
  expected.u64(0x060).u8(1).u16(3922).u8(0).u8(0x80 | (3919 & 0x7f)).u8(3919 >> 7).fill(3919, 0);
  for (uint64_t i = 0; i < 5; ++i) {
    expected.u64(i * 4096 | 0x028).fill(4096, 0xcc);
  }
  EXPECT_EQ(group_of(block, 0, 5, 64 * kib), expected.done());
}

TEST(AlignedGroup, PagesFollowFromTheSize) {
  const std::map<uint64_t, uint64_t> pages = {{64 * kib, 15},   {128 * kib, 31}, {256 * kib, 63},
                                              {512 * kib, 127}, {1 * mib, 255},  {2 * mib, 510}};
  for (const auto &[bytes, count] : pages) {
    EXPECT_EQ(pages_per_group(bytes), count) << bytes;
  }
}

/// Applies the records of a group to a page full of `before`, as a loader does; what is there then.
std::map<uint64_t, Blob> applied(const Blob &group) {
  std::map<uint64_t, Blob> pages;
  for (size_t at = 0; at < group.size();) {
    uint64_t word = 0;
    for (size_t i = 0; i < 8; ++i) {
      word = word << 8 | static_cast<uint64_t>(group.at(at + i));
    }
    at += 8;
    Blob &now = pages[word / page];
    switch (word % page) {
      case 0x002:
        at += 1 + static_cast<size_t>(group.at(at)) + 1;
        now.assign(page, std::byte{0});
        break;
      case 0x060: {
        const size_t bytes =
            static_cast<size_t>(group.at(at + 1)) << 8 | static_cast<size_t>(group.at(at + 2));
        EXPECT_TRUE(
            decode_page(PageCoding::difference, std::span(group).subspan(at + 3, bytes), now))
            << at;
        at += 3 + bytes;
        break;
      }
      case 0x028:
        now.assign(group.begin() + static_cast<ptrdiff_t>(at),
                   group.begin() + static_cast<ptrdiff_t>(at + page));
        at += page;
        break;
      default:
        ADD_FAILURE() << "flags " << word % page;
        return pages;
    }
  }
  return pages;
}

// Every number of pages, names from the shortest to the longest.
TEST(AlignedGroup, AlwaysFull) {
  for (const size_t name_bytes : {1U, 6U, 100U, 255U}) {
    const RamBlock block = {std::string(name_bytes, 'n'), 64 * mib, page};
    for (const size_t group_bytes : {64 * kib, 128 * kib, 2 * mib}) {
      const uint64_t most = pages_per_group(group_bytes);
      for (uint64_t pages = 1; pages <= most; pages += group_bytes == 2 * mib ? 101 : 1) {
        const auto found = applied(group_of(block, 7, pages, group_bytes));
        ASSERT_EQ(found.size(), pages);
        for (const auto &[number, bytes] : found) {
          ASSERT_EQ(bytes, Blob(page, std::byte{0xcc})) << number;
        }
      }
    }
  }
}

TEST(AlignedGroup, FillingOfAnyLength) {
  const RamBlock block = {"pc.ram", 64 * mib, page};
  const uint64_t least = filling_bytes_min(block);
  for (uint64_t bytes = least; bytes < least + 9000; ++bytes) {
    Blob filling(bytes, std::byte{0xcc});
    put_filling(filling, block, 3);
    const auto found = applied(filling);
    ASSERT_EQ(found.size(), 1U);
    ASSERT_EQ(found.begin()->second, Blob(page)) << bytes;
  }
}

class AlignedWriter : public testing::TestWithParam<bool> {};

INSTANTIATE_TEST_SUITE_P(Sources, AlignedWriter, testing::Values(true, false),
                         [](const auto &info) { return info.param ? "view" : "read_pages"; });

std::vector<Touch> pattern(size_t pages, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<Touch> touch;
  while (touch.size() < pages) {
    const Touch kind = std::array{U, Z, D, D}[random() % 4];
    touch.insert(touch.end(), 1 + random() % 40, kind);
  }
  touch.resize(pages);
  return touch;
}

/// RAM with whole groups that are zero, untouched, mixed, and blocks that end inside of one.
FakeRam some_ram(bool has_view) {
  FakeRam ram(has_view);
  ram.add_block("pc.ram", pattern(1000, 1), 1);
  ram.add_block("empty", std::vector<Touch>(100, U), 2);
  ram.add_block("zeros", std::vector<Touch>(31, Z), 3);
  ram.add_block("one", std::vector<Touch>(1, D), 4);
  return ram;
}

Blob timer_bytes() {
  Bytes timer;
  add_section(timer, 3, "timer", 0, 2, Bytes().u32(0xdeadbeef).done());
  return timer.done();
}

TEST_P(AlignedWriter, ReadBack) {
  for (const uint64_t group_bytes : {64 * kib, 128 * kib, 2 * mib}) {
    SCOPED_TRACE(group_bytes);
    FakeRam ram = some_ram(GetParam());
    const Blob timer = timer_bytes();
    const Blob body = Bytes().u32(0xdeadbeef).done();
    const std::vector<DeviceSection> devices = {{3, "timer", 0, 2, body, timer}};
    uint64_t told = 0;
    const Written written =
        write_aligned(ram, {"pc", {}, 4096}, devices, group_bytes, 256 * kib, [&](uint64_t bytes) {
          told = bytes;
          return Result<void>();
        });
    ASSERT_TRUE(written.stats) << written.stats.error().message;
    const StreamStats &stats = *written.stats;
    EXPECT_EQ(told, stats.ram_bytes);
    EXPECT_EQ(stats.ram_bytes, 1132 * page);
    EXPECT_EQ(stats.data_pages + stats.zero_pages + stats.untouched_pages, 1132U);

    // What a loader has at the end, whatever was there before.
    std::vector<Blob> found;
    for (size_t block = 0; block < 4; ++block) {
      found.emplace_back(ram.blocks()[block].used_bytes, std::byte{0xcc});
    }
    StreamHooks hooks;
    hooks.page = [&](size_t block, uint64_t offset, uint64_t, std::span<const std::byte> data) {
      std::byte *to = &found[block][offset];
      data.empty() ? std::memset(to, 0, page) : std::memcpy(to, data.data(), page);
      return Result<void>();
    };
    hooks.page_now = [&](size_t block, uint64_t offset, std::span<std::byte> to) {
      std::memcpy(to.data(), &found[block][offset], page);
      return Result<void>();
    };
    BlobSource source(std::span(written.bytes).first(stats.stream_bytes));
    const auto summary = read_stream(source, StreamOffset(0), hooks);
    ASSERT_TRUE(summary) << summary.error().message;
    EXPECT_EQ(summary->stream_bytes, stats.stream_bytes);
    EXPECT_EQ(summary->devices.size(), 1U);
    for (size_t block = 0; block < 4; ++block) {
      EXPECT_TRUE(found[block] == ram.expected(block)) << block;
    }

    // Its checksum is that of the bytes, and what is kept are the digests of its pieces.
    StreamDigest digest(group_bytes);
    digest.add(std::span(written.bytes).first(stats.stream_bytes));
    StateChecksum expected = digest.finish();
    expected.kept_offset = round_up(stats.stream_bytes, 4096);
    EXPECT_EQ(stats.checksum, expected);
    const auto kept = std::as_bytes(digest.digests());
    ASSERT_GE(written.bytes.size(), expected.kept_offset + kept.size());
    EXPECT_TRUE(std::ranges::equal(
        kept, std::span(written.bytes).subspan(expected.kept_offset, kept.size())));

    // For those who check and convert states.
    const auto open = [&]() -> Result<std::unique_ptr<StreamSource>> {
      return std::unique_ptr<StreamSource>(std::make_unique<BlobSource>(written.bytes));
    };
    qcow2::Findings findings;
    const auto check = check_state(open, stats.checksum, "it", findings);
    ASSERT_TRUE(check);
    EXPECT_EQ(check->checksum, ChecksumResult::right);
    EXPECT_EQ(findings.list().size(), 0U);
    const auto stored = StoredState::open(open);
    ASSERT_TRUE(stored) << stored.error().message;
    auto stored_ram = (*stored)->ram();
    ASSERT_TRUE(stored_ram);
    for (size_t block = 0; block < 4; ++block) {
      Blob bytes(ram.blocks()[block].used_bytes);
      ASSERT_TRUE(
          (*stored_ram)->read_pages(block, 0, bytes.size() / page, page, bytes.data(), page));
      EXPECT_TRUE(bytes == ram.expected(block)) << block;
    }
  }
}

/// The groups of a stream by what they say first: block and page.
std::map<std::string, Blob> groups_of(const Written &written, uint64_t group_bytes) {
  std::map<std::string, Blob> groups;
  const Blob &bytes = written.bytes;
  for (uint64_t at = group_bytes; at + group_bytes <= written.stats->stream_bytes;
       at += group_bytes) {
    const uint64_t flags = static_cast<uint64_t>(bytes[at + 7]) & 0xff;
    if (flags == 0x02 && static_cast<uint64_t>(bytes[at + 6]) % 16 == 0) {
      const auto name_bytes = static_cast<size_t>(bytes[at + 8]);
      const std::string key(reinterpret_cast<const char *>(&bytes[at]), 9 + name_bytes);
      groups[key].assign(bytes.begin() + static_cast<ptrdiff_t>(at),
                         bytes.begin() + static_cast<ptrdiff_t>(at + group_bytes));
    }
  }
  return groups;
}

// A page changes, a group becomes zeros, another is not zeros any more: all others are the same
// bytes at another place.
TEST_P(AlignedWriter, UnchangedGroupsAreTheSameBytes) {
  FakeRam ram(GetParam());
  ram.add_block("pc.ram", std::vector<Touch>(30 * 15, D), 1);
  std::memset(ram.memory(0).data() + 3 * 15 * page, 0, 15 * page);
  const Written before = write_aligned(ram, {"pc", {}, 4096}, {}, 64 * kib);
  ASSERT_TRUE(before.stats);
  EXPECT_EQ(before.stats->written_groups, 29U);
  ram.memory(0)[20 * 15 * page] ^= std::byte{1};
  std::memset(ram.memory(0).data(), 0, 15 * page);
  ram.memory(0)[3 * 15 * page] = std::byte{1};
  const Written after = write_aligned(ram, {"pc", {}, 4096}, {}, 64 * kib);
  ASSERT_TRUE(after.stats);
  const auto old_groups = groups_of(before, 64 * kib);
  const auto new_groups = groups_of(after, 64 * kib);
  EXPECT_EQ(old_groups.size(), 29U);
  EXPECT_EQ(new_groups.size(), 29U);
  size_t same = 0;
  for (const auto &[key, bytes] : new_groups) {
    const auto old = old_groups.find(key);
    same += old != old_groups.end() && old->second == bytes;
  }
  EXPECT_EQ(same, 27U);
}

TEST(AlignedWriterArguments, OtherPagesAreRefused) {
  FakeRam ram(true);
  ram.add_block("pc.ram", std::vector<Touch>(16, D), 1);
  const Written written = write_aligned(ram, {"pc", {}, 16384}, {}, 64 * kib);
  ASSERT_FALSE(written.stats);
  EXPECT_EQ(written.stats.error().code, ErrorCode::not_supported);
}

}  // namespace
}  // namespace qvmstate::vmstate::test
