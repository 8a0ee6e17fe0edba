// Sizes at the far end: disks of many TiB, a VM state past 4 GiB, tables of many clusters.
#include <gtest/gtest.h>

#include <fcntl.h>
#include <unistd.h>

#include <filesystem>

#include "edit_helpers.h"
#include "qcow2/cluster_reader.h"
#include "qcow2/suitability.h"

namespace qvmstate::qcow2::test {
namespace {

constexpr uint64_t tib = 1024 * gib;

class Extremes : public testing::Test {
 protected:
  void SetUp() override {
    if (!have_qemu_img()) {
      GTEST_SKIP() << "qemu-img is missing";
    }
  }
  void create(const std::string &options, uint64_t disk_bytes) {
    const CommandResult made =
        qemu_img({"create", "-q", "-f", "qcow2", "-o", options, path_, std::to_string(disk_bytes)});
    ASSERT_EQ(made.status, 0) << made.output;
    file_ = open_writable(path_);
    auto opened = Image::open(*file_);
    ASSERT_TRUE(opened) << opened.error().message;
    image_ = std::make_unique<Image>(std::move(*opened));
  }
  void expect_pattern(int pattern, uint64_t offset) {
    const CommandResult read = qemu_io(
        path_, {"read -P " + std::to_string(pattern) + " " + std::to_string(offset) + " 64k"});
    EXPECT_EQ(read.status, 0) << read.output;
    EXPECT_EQ(read.output.find("failed"), std::string::npos) << read.output;
  }
  void expect_clean() { EXPECT_EQ(check_complaint(path_), ""); }

  const ScratchFolder folder_;
  const std::string path_ = folder_.path("disk.qcow2");
  std::unique_ptr<io::File> file_;
  std::unique_ptr<Image> image_;
};

class LargeDisk : public Extremes, public testing::WithParamInterface<const char *> {};

// The disk's data lies at its very end; the state begins behind it.
TEST_P(LargeDisk, SavedAppliedAndDeleted) {
  constexpr uint64_t disk_bytes = 6 * tib + 3 * mib;
  constexpr uint64_t last = disk_bytes - 64 * kib;
  create(GetParam(), disk_bytes);
  const auto write = [&](int pattern) {
    const CommandResult written = qemu_io(
        path_, {"write -P " + std::to_string(pattern) + " " + std::to_string(last) + " 64k"});
    ASSERT_EQ(written.status, 0) << written.output;
    ASSERT_TRUE(image_->reload());
  };
  write(17);
  const Bytes stream = seeded_bytes(3 * mib + 17, 1);
  ASSERT_TRUE(check_image_suits(*image_, ImageRole::vmstate));
  const auto saved = save(*image_, "far", stream);
  ASSERT_TRUE(saved) << saved.error().message;
  expect_clean();
  const auto read = vmstate_of(*image_, "far");
  ASSERT_TRUE(read) << read.error().message;
  EXPECT_TRUE(*read == stream);
  write(18);
  const CommandResult applied = qemu_img({"snapshot", "-a", "far", path_});
  ASSERT_EQ(applied.status, 0) << applied.output;
  expect_pattern(17, last);
  expect_clean();
  ASSERT_TRUE(image_->reload());
  ASSERT_TRUE(remove(*image_, "far"));
  expect_clean();
  expect_pattern(17, last);
}

INSTANTIATE_TEST_SUITE_P(Images, LargeDisk,
                         testing::Values("cluster_size=64k", "cluster_size=2M",
                                         "cluster_size=64k,extended_l2=on"),
                         [](const auto &info) { return "Kind" + std::to_string(info.index); });

// A state of 5 GiB, nearly all zeros: clusters of 4 KiB need an L1 table of 2565 entries, six
// clusters, and more L2 tables than the disk has.
TEST_F(Extremes, AStateOfMoreThan4GiB) {
  constexpr uint64_t stream_bytes = 5 * gib + 8 * mib + 123;
  create("cluster_size=4k", 6 * mib);
  const Bytes page = seeded_bytes(4096, 9);
  const std::vector<uint64_t> places = {0, 4 * gib - 4096, 4 * gib,
                                        stream_bytes / 4096 * 4096 - 4096};
  {
    auto edit = ImageEdit::begin(*image_);
    ASSERT_TRUE(edit) << edit.error().message;
    NewSnapshot snapshot;
    snapshot.name = "large";
    ASSERT_TRUE((*edit)->add_snapshot(snapshot));
    for (const uint64_t place : places) {
      const io::StreamRange range{StreamOffset(place), page.size()};
      std::vector<io::HostRun> runs;
      ASSERT_TRUE((*edit)->vmstate().place_at(std::span(&range, 1), runs));
      ASSERT_EQ(runs.size(), 1U);
      ASSERT_TRUE(file_->write_at(page, runs[0].offset));
    }
    ASSERT_TRUE((*edit)->vmstate().finish_fixed(stream_bytes));
    const auto committed = (*edit)->commit(stream_bytes);
    ASSERT_TRUE(committed) << committed.error().message;
  }
  expect_clean();
  // In the table: 0 in the 32 bits, all of it in the 64.
  const Bytes bytes = read_file(path_);
  const auto table = load_be<uint64_t>(&bytes[64]);
  EXPECT_EQ(load_be<uint32_t>(&bytes[table + 32]), 0U);
  EXPECT_EQ(load_be<uint64_t>(&bytes[table + 40]), stream_bytes);
  const std::string said = qemu_img({"info", "--output=json", path_}).output;
  EXPECT_NE(said.find("\"vm-state-size\": " + std::to_string(stream_bytes)), std::string::npos)
      << said;

  ASSERT_EQ(image_->snapshots().size(), 1U);
  VmstateReader reader(*image_, image_->snapshots()[0]);
  Bytes read(page.size());
  for (const uint64_t place : places) {
    ASSERT_TRUE(reader.read(StreamOffset(place), read));
    EXPECT_TRUE(read == page) << place;
    EXPECT_TRUE(qemu_vmstate(path_, *image_, "large", place, page.size()) == page) << place;
  }
  const uint64_t between = 2 * gib;
  ASSERT_TRUE(reader.read(StreamOffset(between), read));
  EXPECT_TRUE(read == Bytes(page.size()));
  EXPECT_TRUE(qemu_vmstate(path_, *image_, "large", between, page.size()) == Bytes(page.size()));

  ASSERT_EQ(qemu_img({"snapshot", "-a", "large", path_}).status, 0);
  expect_clean();
  ASSERT_TRUE(image_->reload());
  ASSERT_TRUE(remove(*image_, "large"));
  expect_clean();
}

}  // namespace
}  // namespace qvmstate::qcow2::test
