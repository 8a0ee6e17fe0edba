#include <gtest/gtest.h>

#include <algorithm>

#include "qcow2/cluster_reader.h"
#include "test_images.h"
#include "tools/libqcow_reader.h"

namespace qvmstate::qcow2 {
namespace {

using test::Bytes;

class Libqcow : public testing::TestWithParam<const char *> {
 protected:
  void SetUp() override {
    if (!test::have_tool("qemu-img") || !test::have_tool("qemu-io")) {
      GTEST_SKIP() << "qemu-img or qemu-io is missing";
    }
  }
  void run(const std::vector<std::string> &words) {
    const auto result = test::run_command(words);
    ASSERT_EQ(result.status, 0) << words[0] << " " << words[1] << ": " << result.output;
  }

  test::ScratchFolder folder_;
};

TEST_P(Libqcow, ReadsDisksAndSnapshotsAsOurReaderDoes) {
  const std::string path = folder_.path("disk.qcow2"), noise = folder_.path("noise");
  constexpr uint64_t disk_bytes = 6 * mib;
  Bytes contents = test::compressible_bytes(disk_bytes, 5);
  // A hole that stays unallocated; libqcow does not know clusters with the zero flag.
  std::fill_n(contents.begin() + 3 * mib, 2 * mib, std::byte{0});
  test::write_file(noise, contents);
  run({"qemu-img", "convert", "-t", "unsafe", "-f", "raw", "-O", "qcow2", "-o", GetParam(), noise,
       path});
  run({"qemu-io", "-t", "unsafe", "-f", "qcow2", "-c", "write -q -P 0x11 1M 600k", path});
  run({"qemu-img", "snapshot", "-c", "one", path});
  run({"qemu-io", "-t", "unsafe", "-f", "qcow2", "-c", "write -q -P 0x22 0 3M", path});

  const auto file = test::open_file(path);
  const auto image = Image::open(*file);
  ASSERT_TRUE(image) << image.error().message;
  ASSERT_EQ(image->snapshots().size(), 1U);
  const Snapshot &snapshot = image->snapshots()[0];
  Bytes active;
  for (const auto &[l1_offset, l1_entries] :
       {std::pair(image->header().l1_offset, image->header().l1_entries),
        std::pair(snapshot.l1_offset, snapshot.l1_entries)}) {
    auto libqcow = tools::LibqcowReader::open(path, l1_offset, l1_entries);
    ASSERT_TRUE(libqcow) << libqcow.error().message;
    ClusterReader ours(*image, l1_offset, l1_entries);
    Bytes theirs_bytes(disk_bytes), our_bytes(disk_bytes);
    auto result = libqcow->read(GuestOffset(0), theirs_bytes);
    ASSERT_TRUE(result) << result.error().message;
    result = ours.read(GuestOffset(0), our_bytes);
    ASSERT_TRUE(result) << result.error().message;
    EXPECT_TRUE(theirs_bytes == our_bytes);
    // The two tables hold different disks, so the overlay took effect.
    EXPECT_FALSE(theirs_bytes == active);
    active = std::move(theirs_bytes);
  }
}

INSTANTIATE_TEST_SUITE_P(Variants, Libqcow,
                         testing::Values("compat=0.10", "compat=1.1", "cluster_size=512",
                                         "cluster_size=4k", "cluster_size=2M", "refcount_bits=64"));

TEST(LibqcowOverlay, ReadsTheAreaPastTheDisk) {
  // The vmstate area of the minimal image starts at L1 entry 2: let that point at the L2 table.
  test::ScratchFolder folder;
  const std::string path = folder.path("image");
  Bytes bytes = test::minimal_image();
  store_be<uint64_t>(bytes.data() + 3 * 512 + 2 * 8, uint64_t{1} << 63 | 4 * 512);
  store_be<uint64_t>(bytes.data() + 3 * 512, 0);
  test::write_file(path, bytes);
  auto libqcow = tools::LibqcowReader::open(path, HostOffset(3 * 512), 4);
  ASSERT_TRUE(libqcow) << libqcow.error().message;
  Bytes read(4);
  const auto result = libqcow->read(GuestOffset(2 * 32768 + 510), read);
  ASSERT_TRUE(result) << result.error().message;
  EXPECT_EQ(read, (Bytes{std::byte{0x55}, std::byte{0x55}, std::byte{0x66}, std::byte{0x66}}));
  // And past the table there is nothing.
  EXPECT_FALSE(libqcow->read(GuestOffset(4 * 32768), read));
}

TEST(LibqcowOverlay, OtherFilesAreErrors) {
  test::ScratchFolder folder;
  EXPECT_EQ(tools::LibqcowReader::open(folder.path("none"), HostOffset(0), 1).error().code,
            ErrorCode::not_found);
  test::write_file(folder.path("text"), Bytes(4096, std::byte{'x'}));
  EXPECT_EQ(tools::LibqcowReader::open(folder.path("text"), HostOffset(0), 1).error().code,
            ErrorCode::bad_image);
}

}  // namespace
}  // namespace qvmstate::qcow2
