#include "qcow2/snapshot_table.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "qcow2/limits.h"

namespace qvmstate::qcow2 {
namespace {

using testing::HasSubstr;

// Entry with 24 bytes of extra data, as QEMU writes it, padded, and then one with none and another
// with 40 bytes.
constexpr uint8_t three_entries[] = {
    0x00, 0x00, 0x00, 0x00, 0x00, 0x05, 0x00, 0x00,  // 0   L1 table at 0x50000
    0x00, 0x00, 0x00, 0x07,                          // 8   of 7 entries
    0x00, 0x01, 0x00, 0x04,                          // 12  id of 1 byte, name of 4
    0x65, 0x00, 0x00, 0x01,                          // 16  date in seconds
    0x00, 0x00, 0x02, 0x03,                          // 20  and nanoseconds
    0x00, 0x00, 0x00, 0x01, 0x02, 0x03, 0x04, 0x05,  // 24  VM clock
    0x00, 0x00, 0x00, 0x00,                          // 32  vmstate size: see below
    0x00, 0x00, 0x00, 0x18,                          // 36  24 bytes of extra data
    0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00, 0x09,  // 40  vmstate of 8 GiB + 9
    0x00, 0x00, 0x00, 0x00, 0x40, 0x00, 0x00, 0x00,  // 48  disk of 1 GiB
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x2a,  // 56  icount 42
    '1',  'b',  'o',  'o',  't',  0x00, 0x00, 0x00,  // 64  id, name, 3 bytes of padding

    0x00, 0x00, 0x00, 0x00, 0x00, 0x06, 0x00, 0x00,  // 72  L1 table at 0x60000
    0x00, 0x00, 0x00, 0x01,                          // 80  of 1 entry
    0x00, 0x02, 0x00, 0x01,                          // 84  id of 2 bytes, name of 1
    0x00, 0x00, 0x00, 0x00,                          // 88  date
    0x00, 0x00, 0x00, 0x00,                          // 92
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,  // 96  VM clock
    0x80, 0x00, 0x00, 0x01,                          // 104 vmstate of 2 GiB + 1
    0x00, 0x00, 0x00, 0x00,                          // 108 no extra data
    '1',  '7',  'x',  0x00, 0x00, 0x00, 0x00, 0x00,  // 112 id, name, padding

    0x00, 0x00, 0x00, 0x00, 0x00, 0x07, 0x00, 0x00,  // 120 L1 table at 0x70000
    0x00, 0x00, 0x00, 0x02,                          // 128 of 2 entries
    0x00, 0x01, 0x00, 0x02,                          // 132 id of 1 byte, name of 2
    0x00, 0x00, 0x00, 0x00,                          // 136 date
    0x00, 0x00, 0x00, 0x00,                          // 140
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,  // 144 VM clock
    0x00, 0x00, 0x00, 0x05,                          // 152 vmstate size: overridden by 0
    0x00, 0x00, 0x00, 0x28,                          // 156 40 bytes of extra data
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,  // 160 vmstate of 0 bytes
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x02, 0x00,  // 168 disk of 512 bytes
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,  // 176 no icount
    0xde, 0xad, 0xbe, 0xef, 0x01, 0x02, 0x03, 0x04,  // 184 data nobody knows
    0x05, 0x06, 0x07, 0x08, 0x09, 0x0a, 0x0b, 0x0c,  // 192
    '9',  'd',  'o',                                 // 200 id, name; the last is not padded
};
static_assert(sizeof three_entries == 203);

std::span<const std::byte> bytes_of(std::span<const uint8_t> bytes) {
  return std::as_bytes(bytes);
}

/// The second entry of above alone, with `extra` as its extra data.
std::vector<uint8_t> entry_with_extra(const std::vector<uint8_t> &extra) {
  std::vector<uint8_t> entry(40 + extra.size() + 3);
  auto end = std::copy_n(three_entries + 72, 40, entry.begin());
  end = std::copy(extra.begin(), extra.end(), end);
  std::copy_n(three_entries + 112, 3, end);  // id, name
  entry[39] = static_cast<uint8_t>(extra.size());
  return entry;
}

Snapshot named(std::string id, std::string name) {
  Snapshot snapshot;
  snapshot.id = std::move(id);
  snapshot.name = std::move(name);
  return snapshot;
}

TEST(SnapshotTable, ReadsEntriesOfAllExtraSizes) {
  const auto snapshots = parse_snapshot_table(bytes_of(three_entries), 3, 12345, "image");
  ASSERT_TRUE(snapshots) << snapshots.error().message;
  ASSERT_EQ(snapshots->size(), 3U);

  const Snapshot &boot = (*snapshots)[0];
  EXPECT_EQ(boot.id, "1");
  EXPECT_EQ(boot.name, "boot");
  EXPECT_EQ(boot.l1_offset, HostOffset(0x50000));
  EXPECT_EQ(boot.l1_entries, 7U);
  EXPECT_EQ(boot.date_seconds, 0x65000001U);
  EXPECT_EQ(boot.date_nanos, 0x203U);
  EXPECT_EQ(boot.clock_nanos, 0x102030405U);
  EXPECT_EQ(boot.vmstate_bytes, 0x200000009U);
  EXPECT_EQ(boot.disk_bytes, 0x40000000U);
  EXPECT_EQ(boot.icount, 42U);
  EXPECT_TRUE(boot.more_extra.empty());

  const Snapshot &plain = (*snapshots)[1];
  EXPECT_EQ(plain.id, "17");
  EXPECT_EQ(plain.name, "x");
  EXPECT_EQ(plain.l1_offset, HostOffset(0x60000));
  EXPECT_EQ(plain.vmstate_bytes, 0x80000001U);
  EXPECT_EQ(plain.disk_bytes, 12345U);
  EXPECT_EQ(plain.icount, icount_none);

  const Snapshot &more = (*snapshots)[2];
  EXPECT_EQ(more.id, "9");
  EXPECT_EQ(more.name, "do");
  EXPECT_EQ(more.vmstate_bytes, 0U);
  EXPECT_EQ(more.disk_bytes, 512U);
  EXPECT_EQ(more.icount, icount_none);
  ASSERT_EQ(more.more_extra.size(), 16U);
  EXPECT_EQ(more.more_extra[0], std::byte{0xde});
  EXPECT_EQ(more.more_extra[15], std::byte{0x0c});
}

TEST(SnapshotTable, ReadsShortExtraData) {
  // 4 bytes: not even the first field, so nothing is overridden.
  auto snapshots =
      parse_snapshot_table(bytes_of(entry_with_extra({0xff, 0xff, 0xff, 0xff})), 1, 12345, "image");
  ASSERT_TRUE(snapshots) << snapshots.error().message;
  EXPECT_EQ((*snapshots)[0].vmstate_bytes, 0x80000001U);
  EXPECT_EQ((*snapshots)[0].name, "x");

  // 16 bytes: 64-bit vmstate size and disk size, no icount.
  snapshots = parse_snapshot_table(bytes_of(entry_with_extra({0, 0, 0, 3, 0, 0, 0, 0,  //
                                                              0, 0, 0, 0, 0, 0, 4, 0})),
                                   1, 12345, "image");
  ASSERT_TRUE(snapshots) << snapshots.error().message;
  EXPECT_EQ((*snapshots)[0].vmstate_bytes, 0x300000000U);
  EXPECT_EQ((*snapshots)[0].disk_bytes, 1024U);
  EXPECT_EQ((*snapshots)[0].icount, icount_none);
  EXPECT_EQ((*snapshots)[0].id, "17");
}

TEST(SnapshotTable, EveryTruncationIsRefused) {
  for (size_t bytes = 0; bytes < sizeof three_entries; ++bytes) {
    // A copy of exactly this size lets the sanitizer see reads past it.
    const std::vector<uint8_t> table(three_entries, three_entries + bytes);
    const auto snapshots = parse_snapshot_table(bytes_of(table), 3, 0, "image");
    ASSERT_FALSE(snapshots) << bytes;
    EXPECT_EQ(snapshots.error().code, ErrorCode::bad_image);
    EXPECT_THAT(snapshots.error().message, HasSubstr("image: snapshot table entry "));
    EXPECT_THAT(snapshots.error().message, HasSubstr(bytes < 69    ? "entry 1 of 3"
                                                     : bytes < 115 ? "entry 2 of 3"
                                                                   : "entry 3 of 3"));
  }
}

TEST(SnapshotTable, HostileLengthsAreRefused) {
  std::vector<uint8_t> table(three_entries, three_entries + 69);
  table[14] = 0xff;  // name of 65284 bytes
  auto snapshots = parse_snapshot_table(bytes_of(table), 1, 0, "image");
  ASSERT_FALSE(snapshots);
  EXPECT_THAT(snapshots.error().message, HasSubstr("cut short"));

  table[14] = 0;
  table[36] = 0xff;  // 0xff000018 bytes of extra data
  snapshots = parse_snapshot_table(bytes_of(table), 1, 0, "image");
  ASSERT_FALSE(snapshots);
  EXPECT_THAT(snapshots.error().message, HasSubstr("extra data"));

  table.resize(4096);
  table[36] = 0;
  table[38] = 4;
  table[39] = 1;  // 1025 bytes of extra data, and they are there
  snapshots = parse_snapshot_table(bytes_of(table), 1, 0, "image");
  ASSERT_FALSE(snapshots);
  EXPECT_THAT(snapshots.error().message, HasSubstr("1025 bytes of extra data"));
  table[39] = 0;
  EXPECT_TRUE(parse_snapshot_table(bytes_of(table), 1, 0, "image"));

  snapshots = parse_snapshot_table(bytes_of(table), 65537, 0, "image");
  ASSERT_FALSE(snapshots);
  EXPECT_THAT(snapshots.error().message, HasSubstr("65537 snapshots"));
}

TEST(SnapshotTable, WritesTheBytesThatQemuWould) {
  Snapshot boot = named("1", "boot");
  boot.l1_offset = HostOffset(0x50000);
  boot.l1_entries = 7;
  boot.date_seconds = 0x65000001;
  boot.date_nanos = 0x203;
  boot.clock_nanos = 0x102030405;
  boot.vmstate_bytes = 0x200000009;
  boot.disk_bytes = 0x40000000;
  boot.icount = 42;
  Snapshot more = named("9", "do");
  more.l1_offset = HostOffset(0x70000);
  more.l1_entries = 2;
  more.disk_bytes = 512;
  for (const uint8_t byte : {0xde, 0xad, 0xbe, 0xef, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}) {
    more.more_extra.push_back(std::byte{byte});
  }
  const auto table = format_snapshot_table(std::vector{boot, more});
  ASSERT_TRUE(table) << table.error().message;

  std::vector<uint8_t> expected(three_entries, three_entries + 72);
  expected.insert(expected.end(), three_entries + 120, std::end(three_entries));
  expected[72 + 35] = 0;  // the 32-bit vmstate size agrees with the 64-bit one
  ASSERT_EQ(table->size(), expected.size());
  EXPECT_EQ(std::memcmp(table->data(), expected.data(), expected.size()), 0);
}

TEST(SnapshotTable, Writes32BitSizesTwice) {
  Snapshot snapshot = named("1", "a");
  snapshot.vmstate_bytes = 0xffffffff;
  auto table = format_snapshot_table(std::vector{snapshot});
  ASSERT_TRUE(table);
  EXPECT_EQ(load_be<uint32_t>(table->data() + 32), 0xffffffffU);
  EXPECT_EQ(load_be<uint64_t>(table->data() + 40), 0xffffffffU);
  snapshot.vmstate_bytes = 0x100000000;
  table = format_snapshot_table(std::vector{snapshot});
  ASSERT_TRUE(table);
  EXPECT_EQ(load_be<uint32_t>(table->data() + 32), 0U);
  EXPECT_EQ(load_be<uint64_t>(table->data() + 40), 0x100000000U);
}

TEST(SnapshotTable, AnEmptyTableHasNoBytes) {
  const auto table = format_snapshot_table({});
  ASSERT_TRUE(table);
  EXPECT_TRUE(table->empty());
}

TEST(SnapshotTable, WhatDoesNotFitIsNotWritten) {
  const auto too_many = format_snapshot_table(std::vector<Snapshot>(snapshots_max + 1));
  ASSERT_FALSE(too_many);
  EXPECT_EQ(too_many.error().code, ErrorCode::no_space);

  Snapshot snapshot = named("1", "a");
  snapshot.more_extra.resize(1000);
  EXPECT_TRUE(format_snapshot_table(std::vector{snapshot}));
  snapshot.more_extra.resize(1001);
  const auto extra = format_snapshot_table(std::vector{snapshot});
  ASSERT_FALSE(extra);
  EXPECT_EQ(extra.error().code, ErrorCode::bad_argument);

  const auto long_name = format_snapshot_table(std::vector{named("1", std::string(65536, 'n'))});
  ASSERT_FALSE(long_name);
  EXPECT_EQ(long_name.error().code, ErrorCode::bad_argument);

  // 1025 entries of more than 64 KiB each are more than 64 MiB.
  const auto too_large =
      format_snapshot_table(std::vector<Snapshot>(1025, named("1", std::string(65535, 'n'))));
  ASSERT_FALSE(too_large);
  EXPECT_EQ(too_large.error().code, ErrorCode::no_space);
}

TEST(SnapshotName, RulesOfQemuAreKept) {
  const std::vector<Snapshot> others = {named("7", "boot"), named("build-7", "other"),
                                        named(std::string("cut\0off", 7), "third")};
  EXPECT_TRUE(check_snapshot_name("a", others));
  EXPECT_TRUE(check_snapshot_name("boot", others));
  EXPECT_TRUE(check_snapshot_name("after 2 days", others));
  EXPECT_TRUE(check_snapshot_name("v1.2", others));
  EXPECT_TRUE(check_snapshot_name("größe", others));
  EXPECT_TRUE(check_snapshot_name(std::string(255, 'n'), others));

  const std::pair<std::string, const char *> refused[] = {
      {"", "at least one character"},
      {std::string(256, 'n'), "256 bytes"},
      {std::string("a\0b", 3), "control characters"},
      {"a\nb", "control characters"},
      {"a\x7f", "control characters"},
      {"2", "is a number"},
      {"0123456789", "is a number"},
      {"build-7", "is the id of the snapshot 'other'"},
      {"cut", "is the id of the snapshot 'third'"},
  };
  for (const auto &[name, why] : refused) {
    const auto result = check_snapshot_name(name, others);
    ASSERT_FALSE(result) << name;
    EXPECT_EQ(result.error().code, ErrorCode::bad_argument);
    EXPECT_THAT(result.error().message, HasSubstr(why));
  }
}

TEST(SnapshotId, IsOneMoreThanTheLargest) {
  EXPECT_EQ(next_snapshot_id({}), "1");
  EXPECT_EQ(next_snapshot_id(std::vector{named("3", "a"), named("1", "b")}), "4");
  EXPECT_EQ(next_snapshot_id(std::vector{named("9", "a"), named("10", "b")}), "11");
  EXPECT_EQ(next_snapshot_id(std::vector{named("abc", "a")}), "1");
}

TEST(SnapshotId, IsNobodysName) {
  EXPECT_EQ(next_snapshot_id(std::vector{named("1", "2"), named("x", "3")}), "4");
  EXPECT_EQ(next_snapshot_id(std::vector{named("1", std::string("2\0z", 3))}), "3");
}

TEST(SnapshotId, StartsOverAfterTheLargestNumber) {
  EXPECT_EQ(next_snapshot_id(std::vector{named("18446744073709551615", "a")}), "1");
  EXPECT_EQ(next_snapshot_id(std::vector{named("18446744073709551615", "a"), named("1", "b")}),
            "2");
  // More than 64 bits hold.
  EXPECT_EQ(next_snapshot_id(std::vector{named("99999999999999999999", "a")}), "1");
}

TEST(FindSnapshot, FindsTheFirstThatQemuWouldTake) {
  const std::vector<Snapshot> snapshots = {named("1", "a"), named("2", "b"), named("3", "b"),
                                           named("4", std::string("c\0d", 3)),
                                           named("5", std::string(300, 'n'))};
  EXPECT_EQ(find_snapshot(snapshots, "a"), 0);
  EXPECT_EQ(find_snapshot(snapshots, "b"), 1);
  EXPECT_EQ(find_snapshot(snapshots, "c"), 3);
  EXPECT_EQ(find_snapshot(snapshots, std::string("c\0d", 3)), 3);
  EXPECT_EQ(find_snapshot(snapshots, std::string(255, 'n')), 4);
  EXPECT_EQ(find_snapshot(snapshots, std::string(300, 'n')), 4);
  EXPECT_EQ(find_snapshot(snapshots, "2"), -1);
  EXPECT_EQ(find_snapshot(snapshots, ""), -1);
}

}  // namespace
}  // namespace qvmstate::qcow2
