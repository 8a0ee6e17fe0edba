// Persistent bitmaps over edits: nothing of them changes, and QEMU goes on with them.
#include <gtest/gtest.h>

#include "edit_helpers.h"
#include "qcow2/image_check.h"
#include "qcow2/suitability.h"

namespace qvmstate::qcow2::test {
namespace {

/// All bytes that make up the bitmaps: header and its extensions without the switch, directory,
/// tables and clusters.
Bytes bitmap_bytes(const Bytes &image, const Geometry &geometry) {
  Bytes found(image.begin(), image.begin() + static_cast<ptrdiff_t>(geometry.cluster_bytes()));
  std::fill_n(found.begin() + switch_offset, switch_bytes, std::byte{0});
  const auto add = [&](uint64_t offset, uint64_t bytes) {
    found.insert(found.end(), image.begin() + static_cast<ptrdiff_t>(offset),
                 image.begin() + static_cast<ptrdiff_t>(offset + bytes));
  };
  const MemoryImage opened(image);
  const HeaderExtension *extension = opened.image->header().extension(extension_bitmaps);
  if (extension == nullptr) {
    throw std::runtime_error("no bitmaps");
  }
  const auto bytes = load_be<uint64_t>(&extension->data[8]);
  const auto directory = load_be<uint64_t>(&extension->data[16]);
  add(directory, bytes);
  for (uint64_t at = directory; at < directory + bytes;) {
    const auto table = load_be<uint64_t>(&image[at]);
    const uint64_t entries = load_be<uint32_t>(&image[at + 8]);
    add(table, entries * 8);
    for (uint64_t i = 0; i < entries; ++i) {
      const auto entry = load_be<uint64_t>(&image[table + i * 8]);
      if ((entry & host_offset_mask) != 0) {
        add(entry & host_offset_mask, geometry.cluster_bytes());
      }
    }
    at += round_up(24 + load_be<uint16_t>(&image[at + 18]) + load_be<uint32_t>(&image[at + 20]), 8);
  }
  return found;
}

class PersistentBitmaps : public testing::TestWithParam<const char *> {};

TEST_P(PersistentBitmaps, AreAsTheyWereAfterEveryEdit) {
  if (!have_qemu_img()) {
    GTEST_SKIP() << "qemu-img is missing";
  }
  const ScratchFolder folder;
  const std::string path = folder.path("disk.qcow2");
  for (const std::vector<std::string> &words : std::vector<std::vector<std::string>>{
           {"create", "-q", "-f", "qcow2", "-o", GetParam(), path, "8M"},
           {"bitmap", "--add", "-g", "64k", path, "one"},
           {"bitmap", "--add", "-g", "1M", path, "two"}}) {
    const CommandResult done = qemu_img(words);
    ASSERT_EQ(done.status, 0) << done.output;
  }
  ASSERT_EQ(qemu_io(path, {"write -P 7 0 100k", "write -P 8 5M 300k"}).status, 0);
  const std::string told = qemu_img({"info", "--output=json", path}).output;
  const auto bitmaps_told = [](const std::string &text) {
    const size_t begin = text.find("\"bitmaps\"");
    return text.substr(begin, text.find(']', text.find("\"granularity\"", begin)) - begin);
  };
  ASSERT_NE(told.find("\"two\""), std::string::npos) << told;

  const auto file = open_writable(path);
  auto image = Image::open(*file);
  ASSERT_TRUE(image) << image.error().message;
  const Geometry geometry = image->geometry();
  const Bytes before = bitmap_bytes(read_file(path), geometry);
  const auto expect_kept = [&](const char *edit) {
    EXPECT_TRUE(bitmap_bytes(read_file(path), geometry) == before) << edit;
    EXPECT_EQ(check_complaint(path), "") << edit;
    EXPECT_EQ(bitmaps_told(qemu_img({"info", "--output=json", path}).output), bitmaps_told(told));
    Findings findings;
    ASSERT_TRUE(check_image(*image, findings));
    EXPECT_EQ(findings.count(FindingKind::damage) + findings.count(FindingKind::leak), 0U) << edit;
  };
  EXPECT_FALSE(check_image_suits(*image, ImageRole::vmstate));
  EXPECT_TRUE(check_image_suits(*image, ImageRole::vmstate, Bitmaps::allow));
  ASSERT_TRUE(save(*image, "it", seeded_bytes(3 * mib, 1)));
  expect_kept("save");
  ASSERT_TRUE(save(*image, "it", seeded_bytes(2 * mib, 2), {.replace = true}));
  expect_kept("replace");
  ASSERT_TRUE(rename(*image, "it", "that"));
  expect_kept("rename");
  ASSERT_TRUE(remove(*image, "that", true));
  expect_kept("delete");

  // QEMU opens them as good ones, and records in them what it writes.
  ASSERT_EQ(qemu_io(path, {"write -P 9 3M 64k"}).status, 0);
  EXPECT_EQ(check_complaint(path), "");
  EXPECT_EQ(bitmaps_told(qemu_img({"info", "--output=json", path}).output), bitmaps_told(told));
  EXPECT_FALSE(bitmap_bytes(read_file(path), geometry) == before);
}

INSTANTIATE_TEST_SUITE_P(Images, PersistentBitmaps,
                         testing::Values("cluster_size=64k", "cluster_size=4k",
                                         "cluster_size=16k,extended_l2=on"),
                         [](const auto &info) { return "Kind" + std::to_string(info.index); });

// QEMU takes bitmaps for none when their bit is off; it stays off.
TEST(StaleBitmaps, StayStale) {
  if (!have_qemu_img()) {
    GTEST_SKIP() << "qemu-img is missing";
  }
  const ScratchFolder folder;
  const std::string path = folder.path("disk.qcow2");
  ASSERT_EQ(qemu_img({"create", "-q", "-f", "qcow2", path, "8M"}).status, 0);
  ASSERT_EQ(qemu_img({"bitmap", "--add", path, "one"}).status, 0);
  patch_file<uint64_t>(path, 88, 0);
  const auto file = open_writable(path);
  auto image = Image::open(*file);
  ASSERT_TRUE(image);
  ASSERT_TRUE(check_image_suits(*image, ImageRole::vmstate));
  ASSERT_TRUE(save(*image, "it", seeded_bytes(1 * mib, 1)));
  EXPECT_EQ(load_be<uint64_t>(&read_file(path)[88]), 0U);
}

}  // namespace
}  // namespace qvmstate::qcow2::test
