#include "qcow2/suitability.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "test_images.h"

namespace qvmstate::qcow2 {
namespace {

using testing::HasSubstr;

class Suitability : public testing::Test {
 protected:
  void SetUp() override {
    if (!test::have_tool("qemu-img") || !test::have_tool("qemu-io")) {
      GTEST_SKIP() << "qemu-img or qemu-io is missing";
    }
  }

  void create(const std::vector<std::string> &options) {
    std::vector<std::string> words = {"qemu-img", "create", "-q", "-f", "qcow2"};
    words.insert(words.end(), options.begin(), options.end());
    words.insert(words.end(), {path_, "4M"});
    run(words);
  }
  void run(const std::vector<std::string> &words) {
    const auto result = test::run_command(words);
    ASSERT_EQ(result.status, 0) << words[0] << " " << words[1] << ": " << result.output;
  }

  Result<void> suits(ImageRole role = ImageRole::vmstate, ImageUse use = ImageUse::ours) {
    const auto file = test::open_file(path_);
    const auto image = Image::open(*file);
    if (!image) {
      ADD_FAILURE() << image.error().message;
      return {};
    }
    return check_image_suits(*image, role, Bitmaps::refuse, use);
  }
  void expect_refused(const std::string &why, const std::string &remedy,
                      ImageRole role = ImageRole::vmstate) {
    const auto result = suits(role);
    ASSERT_FALSE(result);
    EXPECT_EQ(result.error().code, ErrorCode::not_supported);
    EXPECT_THAT(result.error().message, HasSubstr(path_ + ": "));
    EXPECT_THAT(result.error().message, HasSubstr(why));
    EXPECT_THAT(result.error().message, HasSubstr(remedy));
  }
  void set_incompatible(uint64_t bits) {
    const auto bytes = test::read_file(path_);
    test::patch_file<uint64_t>(path_, 72, load_be<uint64_t>(bytes.data() + 72) | bits);
  }

  test::ScratchFolder folder_;
  const std::string path_ = folder_.path("disk.qcow2");
};

TEST_F(Suitability, PlainImagesSuit) {
  for (const char *options : {"compat=0.10", "compat=1.1", "lazy_refcounts=on", "refcount_bits=2",
                              "cluster_size=512", "cluster_size=2M", "extended_l2=on"}) {
    create({"-o", options});
    EXPECT_TRUE(suits()) << options;
    EXPECT_TRUE(suits(ImageRole::disk_only)) << options;
  }
}

TEST_F(Suitability, DirtyIsRefused) {
  create({});
  set_incompatible(1);
  expect_refused("marked dirty", "qemu-img check -r all " + path_);
  // Without lazy refcounts nobody sets the bit by design.
  EXPECT_FALSE(suits(ImageRole::vmstate, ImageUse::held_by_qemu));
  run({"qemu-img", "check", "-r", "all", path_});
  EXPECT_TRUE(suits());
}

TEST_F(Suitability, DirtyIsNormalWhileQemuHoldsAnImageWithLazyRefcounts) {
  create({"-o", "lazy_refcounts=on"});
  test::RunningCommand qemu_io({"qemu-io", "-f", "qcow2", path_});
  ASSERT_TRUE(qemu_io.wait_for_output("qemu-io> "));
  qemu_io.send("write 0 64k");
  ASSERT_TRUE(qemu_io.wait_for_output("qemu-io> "));
  EXPECT_TRUE(suits(ImageRole::vmstate, ImageUse::held_by_qemu));
  EXPECT_FALSE(suits(ImageRole::vmstate, ImageUse::ours));
  qemu_io.send("quit");
  qemu_io.finish();
  EXPECT_TRUE(suits(ImageRole::vmstate, ImageUse::ours));
}

TEST_F(Suitability, CorruptIsRefused) {
  create({});
  set_incompatible(2);
  expect_refused("marked corrupt", "qemu-img check -r all " + path_);
  run({"qemu-img", "check", "-r", "all", path_});
  EXPECT_TRUE(suits());
}

TEST_F(Suitability, ExternalDataFileIsRefused) {
  create({"-o", "data_file=" + folder_.path("data")});
  expect_refused("external file", "qemu-img convert");
  create({"-o", "data_file_raw=on,data_file=" + folder_.path("raw")});
  expect_refused("external file", "qemu-img convert", ImageRole::disk_only);
}

TEST_F(Suitability, LuksMayTakePartWithItsDiskOnly) {
  // QEMU measures the CPU to choose the rounds of its key function, which can fail on a busy one.
  test::CommandResult created;
  for (int attempt = 0; attempt < 20 && created.status != 0; ++attempt) {
    created = test::run_command(
        {"qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=key,data=secret", "-o",
         "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=50", path_, "4M"});
  }
  ASSERT_EQ(created.status, 0) << created.output;
  expect_refused("LUKS", "--vmstate-node");
  EXPECT_TRUE(suits(ImageRole::disk_only));
}

TEST_F(Suitability, AesIsRefused) {
  create({});
  test::patch_file<uint32_t>(path_, 32, 1);  // encryption method
  expect_refused("AES", "qemu-img convert");
  expect_refused("AES", "qemu-img convert", ImageRole::disk_only);
}

TEST_F(Suitability, PersistentBitmapsAreRefused) {
  create({});
  run({"qemu-img", "bitmap", "--add", path_, "one"});
  expect_refused("has 1 persistent dirty bitmap,", "qemu-img bitmap --remove " + path_);
  run({"qemu-img", "bitmap", "--add", path_, "two"});
  expect_refused("has 2 persistent dirty bitmaps,", "qemu-img bitmap --remove " + path_,
                 ImageRole::disk_only);
  run({"qemu-img", "bitmap", "--remove", path_, "one"});
  run({"qemu-img", "bitmap", "--remove", path_, "two"});
  EXPECT_TRUE(suits());
}

TEST_F(Suitability, UnknownAutoclearBitsAreRefusedUntilQemuClearsThem) {
  create({});
  test::patch_file<uint64_t>(path_, 88, 0x84);
  expect_refused("bits 2, 7", "qemu-img check -r leaks " + path_);
  run({"qemu-img", "check", "-r", "leaks", path_});
  EXPECT_TRUE(suits());
}

TEST_F(Suitability, OneBitRefcountsAreRefusedUntilWidened) {
  // Small clusters, because amend walks whole refcount blocks.
  create({"-o", "refcount_bits=1,cluster_size=512"});
  expect_refused("refcounts of one bit", "qemu-img amend -o refcount_bits=16 " + path_);
  run({"qemu-img", "amend", "-o", "refcount_bits=16", path_});
  EXPECT_TRUE(suits());
}

TEST_F(Suitability, AFullSnapshotTableIsRefused) {
  create({});
  std::vector<Snapshot> snapshots(65536);
  for (Snapshot &snapshot : snapshots) {
    snapshot.l1_offset = HostOffset(65536);
    snapshot.l1_entries = 1;
  }
  test::Bytes bytes = test::read_file(path_);
  bytes.resize(round_up(bytes.size(), 65536));
  store_be<uint32_t>(bytes.data() + 60, 65536);
  store_be<uint64_t>(bytes.data() + 64, bytes.size());
  const test::Bytes table = format_snapshot_table(snapshots).value();
  bytes.insert(bytes.end(), table.begin(), table.end());
  test::write_file(path_, bytes);
  expect_refused("has 65536 snapshots", "delete some");
}

}  // namespace
}  // namespace qvmstate::qcow2
