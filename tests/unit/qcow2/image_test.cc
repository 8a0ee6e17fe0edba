#include "qcow2/image.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "qcow2/limits.h"
#include "test_images.h"

namespace qvmstate::qcow2 {
namespace {

using test::Bytes;
using testing::HasSubstr;

class ImageTest : public testing::Test {
 protected:
  Result<Image> open(const Bytes &bytes) {
    test::write_file(folder_.path("image"), bytes);
    return open_existing("image");
  }
  Result<Image> open_existing(const std::string &name) {
    file_ = test::open_file(folder_.path(name));
    return Image::open(*file_);
  }
  void run(const std::vector<std::string> &words) {
    const auto result = test::run_command(words);
    ASSERT_EQ(result.status, 0) << words[0] << " " << words[1] << ": " << result.output;
  }

  test::ScratchFolder folder_;
  std::unique_ptr<io::File> file_;
};

template <class T>
Bytes patched(Bytes bytes, uint64_t offset, T value) {
  store_be<T>(bytes.data() + offset, value);
  return bytes;
}

/// The minimal image with a snapshot table appended in whole clusters.
Bytes with_snapshots(const std::vector<Snapshot> &snapshots) {
  Bytes bytes = test::minimal_image();
  const Bytes table = format_snapshot_table(snapshots).value();
  store_be<uint32_t>(bytes.data() + 60, static_cast<uint32_t>(snapshots.size()));
  store_be<uint64_t>(bytes.data() + 64, bytes.size());
  bytes.insert(bytes.end(), table.begin(), table.end());
  bytes.resize(round_up(bytes.size(), 512));
  return bytes;
}

Snapshot snapshot_named(const std::string &name) {
  Snapshot snapshot;
  snapshot.id = "1";
  snapshot.name = name;
  snapshot.l1_offset = HostOffset(3 * 512);
  snapshot.l1_entries = 4;
  snapshot.disk_bytes = 65536;
  return snapshot;
}

TEST_F(ImageTest, ReadsTheTables) {
  const auto image = open(test::minimal_image());
  ASSERT_TRUE(image) << image.error().message;
  EXPECT_EQ(image->name(), folder_.path("image"));
  ASSERT_EQ(image->refcount_table().size(), 64U);
  EXPECT_EQ(image->refcount_table()[0], 1024U);
  EXPECT_EQ(image->refcount_table()[1], 0U);
  EXPECT_TRUE(image->snapshots().empty());
  EXPECT_EQ(image->snapshot_table_bytes(), 0U);

  uint64_t entries[3] = {1, 1, 1};
  ASSERT_TRUE(image->read_l1(image->header().l1_offset, 0, entries));
  EXPECT_EQ(entries[0], 0x8000000000000800U);
  EXPECT_EQ(entries[1], 0U);
  uint64_t last = 1;
  ASSERT_TRUE(image->read_l1(image->header().l1_offset, 3, std::span(&last, 1)));
  EXPECT_EQ(last, 0U);

  Bytes l2(512);
  ASSERT_TRUE(image->read_l2(entries[0], l2));
  EXPECT_EQ(load_be<uint64_t>(l2.data()), 0x8000000000000a00U);
}

TEST_F(ImageTest, BadL1EntriesAreRefused) {
  const auto image = open(test::minimal_image());
  ASSERT_TRUE(image) << image.error().message;
  Bytes l2(512);
  for (const uint64_t entry : {uint64_t{0}, uint64_t{0x800 | 1}, uint64_t{0x800 | 0x100},
                               uint64_t{1} << 62 | 0x800, uint64_t{1} << 56 | 0x800}) {
    const auto result = image->read_l2(entry, l2);
    ASSERT_FALSE(result) << entry;
    EXPECT_EQ(result.error().code, ErrorCode::bad_image);
    EXPECT_THAT(result.error().message, HasSubstr("L1 table entry"));
  }
  const auto result = image->read_l2(8 * 512, l2);
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().code, ErrorCode::bad_image);
  EXPECT_THAT(result.error().message, HasSubstr("cut short"));
}

TEST_F(ImageTest, AnL2TableThatDoesNotStartAtAClusterIsRefused) {
  const auto image = open(test::minimal_image(12));
  ASSERT_TRUE(image) << image.error().message;
  Bytes l2(4096);
  EXPECT_TRUE(image->read_l2(4 * 4096, l2));
  EXPECT_FALSE(image->read_l2(4 * 4096 + 512, l2));
}

TEST_F(ImageTest, TheFileMayEndInsideItsLastL2Table) {
  Bytes bytes = test::minimal_image();
  bytes.resize(4 * 512 + 24);  // header to L1, and three L2 entries
  const auto image = open(bytes);
  ASSERT_TRUE(image) << image.error().message;
  Bytes l2(512, std::byte{0xff});
  ASSERT_TRUE(image->read_l2(0x800, l2));
  EXPECT_EQ(load_be<uint64_t>(l2.data() + 16), 0x8000000000000e00U);
  EXPECT_EQ(load_be<uint64_t>(l2.data() + 24), 0U);
}

TEST_F(ImageTest, BadRefcountTableEntriesAreRefused) {
  for (const uint64_t entry : {uint64_t{0x401}, uint64_t{0x500}, uint64_t{1} << 56, UINT64_MAX}) {
    const auto image = open(patched<uint64_t>(test::minimal_image(), 512 + 5 * 8, entry));
    ASSERT_FALSE(image) << entry;
    EXPECT_EQ(image.error().code, ErrorCode::bad_image);
    EXPECT_THAT(image.error().message, HasSubstr("refcount table entry 5"));
  }
  // In an image of larger clusters, an offset between two of them.
  const auto image = open(patched<uint64_t>(test::minimal_image(12), 4096, 512));
  ASSERT_FALSE(image);
  EXPECT_THAT(image.error().message, HasSubstr("refcount table entry 0"));
}

TEST_F(ImageTest, ReadsSnapshotTablesLargerThanOnePiece) {
  std::vector<Snapshot> snapshots;
  for (int i = 1; i <= 700; ++i) {
    snapshots.push_back(snapshot_named("snapshot " + std::string(i, 'n')));
    snapshots.back().id = std::to_string(i);
  }
  const auto image = open(with_snapshots(snapshots));
  ASSERT_TRUE(image) << image.error().message;
  ASSERT_EQ(image->snapshots().size(), 700U);
  EXPECT_EQ(image->snapshots()[0].name, "snapshot n");
  EXPECT_EQ(image->snapshots()[699].name, "snapshot " + std::string(700, 'n'));
  EXPECT_EQ(image->snapshots()[699].id, "700");
  EXPECT_EQ(image->snapshot_table_bytes(), format_snapshot_table(snapshots)->size());
}

TEST_F(ImageTest, SnapshotTablesCutShortAreRefused) {
  Bytes bytes = with_snapshots({snapshot_named("a"), snapshot_named(std::string(600, 'b'))});
  bytes.resize(9 * 512);
  const auto image = open(bytes);
  ASSERT_FALSE(image);
  EXPECT_EQ(image.error().code, ErrorCode::bad_image);
  EXPECT_THAT(image.error().message, HasSubstr("snapshot table goes on past the end of the file"));
}

TEST_F(ImageTest, HugeExtraDataIsRefusedBeforeItIsRead) {
  Bytes bytes = with_snapshots({snapshot_named("a")});
  bytes.resize(bytes.size() + 4096);
  for (const uint32_t extra : {1025U, 0xffffffffU}) {
    const auto image = open(patched<uint32_t>(bytes, 8 * 512 + 36, extra));
    ASSERT_FALSE(image);
    EXPECT_EQ(image.error().code, ErrorCode::bad_image);
    EXPECT_THAT(image.error().message, HasSubstr("bytes of extra data"));
  }
}

TEST_F(ImageTest, BadSnapshotL1TablesNameTheSnapshot) {
  struct Case {
    uint64_t offset;
    uint32_t entries;
    const char *why;
  };
  const Case cases[] = {
      {3 * 512 + 8, 4, "does not start at a cluster"},
      {3 * 512, 4194305, "is larger than"},
      {3 * 512, 0xffffffff, "is larger than"},
      {3 * 512, 1000, "ends past the end of the file"},
      {UINT64_MAX << 9, 4, "ends past the end of the file"},
  };
  for (const Case &bad : cases) {
    Snapshot snapshot = snapshot_named("good bad");
    snapshot.l1_offset = HostOffset(bad.offset);
    snapshot.l1_entries = bad.entries;
    const auto image = open(with_snapshots({snapshot_named("a"), snapshot}));
    ASSERT_FALSE(image);
    EXPECT_EQ(image.error().code, ErrorCode::bad_image);
    EXPECT_THAT(image.error().message, HasSubstr("snapshot 'good bad'"));
    EXPECT_THAT(image.error().message, HasSubstr(bad.why));
  }
}

TEST_F(ImageTest, OpensWhatQemuMakes) {
  if (!test::have_tool("qemu-img")) {
    GTEST_SKIP() << "qemu-img is missing";
  }
  struct Variant {
    const char *options;
    uint32_t version, cluster_bits, refcount_bits;
  };
  const Variant variants[] = {
      {"compat=0.10", 2, 16, 16},
      {"compat=0.10,cluster_size=512", 2, 9, 16},
      {"compat=1.1,cluster_size=512", 3, 9, 16},
      {"compat=1.1,cluster_size=4k,refcount_bits=2", 3, 12, 2},
      {"compat=1.1,refcount_bits=1", 3, 16, 1},
      {"compat=1.1,refcount_bits=64,lazy_refcounts=on", 3, 16, 64},
      {"compat=1.1,cluster_size=2M,refcount_bits=32", 3, 21, 32},
      {"compat=1.1,cluster_size=128k,extended_l2=on", 3, 17, 16},
  };
  for (const Variant &variant : variants) {
    SCOPED_TRACE(variant.options);
    const std::string path = folder_.path("qemu.qcow2");
    run({"qemu-img", "create", "-q", "-f", "qcow2", "-o", variant.options, path, "20M"});
    const auto image = open_existing("qemu.qcow2");
    ASSERT_TRUE(image) << image.error().message;
    EXPECT_EQ(image->header().version, variant.version);
    EXPECT_EQ(image->geometry().cluster_bits, variant.cluster_bits);
    EXPECT_EQ(image->geometry().refcount_bits(), variant.refcount_bits);
    EXPECT_EQ(image->header().disk_bytes, 20 * mib);
    EXPECT_NE(image->refcount_table()[0], 0U);
    std::filesystem::remove(path);
  }
}

TEST_F(ImageTest, ReloadSeesQemusSnapshots) {
  if (!test::have_tool("qemu-img")) {
    GTEST_SKIP() << "qemu-img is missing";
  }
  const std::string path = folder_.path("qemu.qcow2");
  run({"qemu-img", "create", "-q", "-f", "qcow2", path, "20M"});
  auto image = open_existing("qemu.qcow2");
  ASSERT_TRUE(image) << image.error().message;
  EXPECT_TRUE(image->snapshots().empty());
  run({"qemu-img", "snapshot", "-c", "first", path});
  run({"qemu-img", "resize", "-q", path, "21M"});
  run({"qemu-img", "snapshot", "-c", "second", path});
  EXPECT_TRUE(image->snapshots().empty());
  ASSERT_TRUE(image->reload());
  ASSERT_EQ(image->snapshots().size(), 2U);
  EXPECT_EQ(image->snapshots()[0].name, "first");
  EXPECT_EQ(image->snapshots()[0].id, "1");
  EXPECT_EQ(image->snapshots()[0].disk_bytes, 20 * mib);
  EXPECT_EQ(image->snapshots()[0].vmstate_bytes, 0U);
  EXPECT_EQ(image->snapshots()[1].name, "second");
  EXPECT_EQ(image->snapshots()[1].id, "2");
  EXPECT_EQ(image->snapshots()[1].disk_bytes, 21 * mib);
}

}  // namespace
}  // namespace qvmstate::qcow2
