// The check of metadata, with `qemu-img check` as the oracle: the same verdict on images as QEMU
// made them, and on each of them damaged in many places.
#include "qcow2/image_check.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <random>

#include "edit_helpers.h"
#include "qcow2/entries.h"
#include "test_images.h"

namespace qvmstate::qcow2::test {
namespace {

struct Outcome {
  Result<ImageCheck> check;
  Findings findings;
};

Outcome check_bytes(const Bytes &bytes) {
  Outcome outcome;
  const MemoryImage image(bytes);
  outcome.check = check_image(*image.image, outcome.findings);
  return outcome;
}

/// 0 clean, 2 damage, 3 leaks only, as qemu-img exits.
int verdict(const Findings &findings) {
  return findings.count(FindingKind::damage) > 0 ? 2
         : findings.count(FindingKind::leak) > 0 ? 3
                                                 : 0;
}

std::vector<std::string> fixture_names() {
  std::vector<std::string> names;
  for (const auto &entry : std::filesystem::directory_iterator(QVMSTATE_SOURCE_DIR "/fixtures")) {
    if (entry.path().extension() == ".qcow2") {
      names.push_back(entry.path().filename());
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::string told(const Findings &findings) {
  std::string text;
  for (const Finding &finding : findings.list()) {
    text += finding.message + "\n";
  }
  return text;
}

TEST(ImageCheck, FixturesAreClean) {
  for (const std::string &name : fixture_names()) {
    const Outcome outcome = check_bytes(fixture(name));
    ASSERT_TRUE(outcome.check) << name << ": " << outcome.check.error().message;
    EXPECT_EQ(verdict(outcome.findings), 0) << name << ": " << told(outcome.findings);
  }
}

/// Where a damage can be done that the image still opens with: refcount blocks and L1 and L2
/// tables.
std::vector<uint64_t> metadata_clusters(const Image &image) {
  const Geometry &geometry = image.geometry();
  std::vector<uint64_t> offsets;
  for (const uint64_t block : image.refcount_table()) {
    if (block != 0) {
      offsets.push_back(block);
    }
  }
  std::vector<std::pair<HostOffset, uint32_t>> tables = {
      {image.header().l1_offset, image.header().l1_entries}};
  for (const Snapshot &snapshot : image.snapshots()) {
    tables.emplace_back(snapshot.l1_offset, snapshot.l1_entries);
  }
  for (const auto &[offset, entries] : tables) {
    offsets.push_back(offset.value);
    std::vector<uint64_t> l1(entries);
    EXPECT_TRUE(image.read_l1(offset, 0, l1));
    for (const uint64_t entry : l1) {
      if (geometry.aligned(entry & host_offset_mask) && (entry & host_offset_mask) != 0) {
        offsets.push_back(entry & host_offset_mask);
      }
    }
  }
  return offsets;
}

TEST(ImageCheck, JudgesDamageAsQemuImgDoes) {
  if (!have_qemu_img()) {
    GTEST_SKIP() << "qemu-img is missing";
  }
  const ScratchFolder folder;
  write_file(folder.path("backing.raw"), fixture("backing.raw"));
  const std::string path = folder.path("image.qcow2");
  std::mt19937 random(7);
  size_t damaged = 0;
  size_t leaking = 0;
  for (const std::string &name : fixture_names()) {
    const Bytes good = fixture(name);
    const MemoryImage image(good);
    const std::vector<uint64_t> clusters = metadata_clusters(*image.image);
    for (int round = 0; round < 6; ++round) {
      Bytes bytes = good;
      const uint64_t at =
          clusters[random() % clusters.size()] +
          random() % std::min<uint64_t>(64, image.image->geometry().cluster_bytes());
      bytes.at(at) ^= static_cast<std::byte>(1U << random() % 8);
      write_file(path, bytes);
      const CommandResult theirs = qemu_img({"check", path});
      const Outcome ours = check_bytes(bytes);
      ASSERT_TRUE(ours.check) << ours.check.error().message;
      EXPECT_EQ(verdict(ours.findings), theirs.status) << name << ", byte " << at << ": ours:\n"
                                                       << told(ours.findings) << "theirs:\n"
                                                       << theirs.output;
      damaged += theirs.status == 2;
      leaking += theirs.status == 3;
    }
  }
  // The places were such that both happened.
  EXPECT_GT(damaged, 10U);
  EXPECT_GT(leaking, 2U);
}

// The image by hand: cluster 2 is the refcount block, 3 the L1 table, 4 the L2 table.

void add_u16(Bytes &bytes, uint64_t offset, int value) {
  store_be<uint16_t>(&bytes[offset],
                     static_cast<uint16_t>(load_be<uint16_t>(&bytes[offset]) + value));
}

TEST(ImageCheck, TellsLeakFromDamage) {
  Bytes leak = minimal_image();
  add_u16(leak, 2 * 512 + 7 * 2, 1);
  EXPECT_EQ(verdict(check_bytes(leak).findings), 2);  // counted once too often: no COPIED any more
  store_be<uint64_t>(&leak[4 * 512 + 2 * 8], 7 * 512);
  Outcome outcome = check_bytes(leak);
  EXPECT_EQ(verdict(outcome.findings), 3) << told(outcome.findings);
  EXPECT_EQ(outcome.findings.count(FindingKind::leak), 1U);

  Bytes damage = minimal_image();
  add_u16(damage, 2 * 512 + 7 * 2, -1);
  outcome = check_bytes(damage);
  EXPECT_EQ(verdict(outcome.findings), 2);
  EXPECT_NE(told(outcome.findings).find("cluster 7: refcount 0, used 1 times"), std::string::npos)
      << told(outcome.findings);
}

TEST(ImageCheck, AClusterUsedTwiceIsDamageEvenIfItsRefcountSaysSo) {
  Bytes bytes = minimal_image();
  store_be<uint64_t>(&bytes[4 * 512 + 3 * 8], 4 * 512);  // guest data in the L2 table itself
  add_u16(bytes, 2 * 512 + 4 * 2, 1);
  store_be<uint64_t>(&bytes[3 * 512], 4 * 512);  // COPIED as the refcount wants it
  const Outcome outcome = check_bytes(bytes);
  EXPECT_EQ(verdict(outcome.findings), 2);
  EXPECT_NE(told(outcome.findings).find("cluster 4 is used by"), std::string::npos)
      << told(outcome.findings);
}

TEST(ImageCheck, SaysWhatQemuWillRefuse) {
  MemoryImage image(tiny_image({1, 1, 1, 1}));
  ASSERT_TRUE(save(*image.image, "one", seeded_bytes(3000, 1)));
  ASSERT_TRUE(save(*image.image, "two", seeded_bytes(3000, 2)));
  EXPECT_EQ(check_bytes(image.contents()).findings.count(FindingKind::refusal), 0U);
  ASSERT_TRUE(rename(*image.image, "two", "1"));  // the id of "one"
  Outcome outcome = check_bytes(image.contents());
  EXPECT_EQ(outcome.findings.count(FindingKind::refusal), 1U) << told(outcome.findings);
  ASSERT_TRUE(rename(*image.image, "1", "one"));
  outcome = check_bytes(image.contents());
  EXPECT_EQ(outcome.findings.count(FindingKind::refusal), 1U) << told(outcome.findings);
  EXPECT_EQ(verdict(outcome.findings), 0);
}

TEST(ImageCheck, ARefcountAtItsMostCannotBeLoaded) {
  // Snapshots of one disk until its clusters have a count of 3, the most that 2 bits hold.
  const Bytes bytes = fixture("qemu-72-v3-4k-refcount2.qcow2");
  const MemoryImage image(bytes);
  ASSERT_TRUE(save(*image.image, "one", {}));
  EXPECT_EQ(check_bytes(image.contents()).findings.count(FindingKind::refusal), 0U);
  const ScratchFolder folder;
  if (!have_qemu_img()) {
    GTEST_SKIP() << "qemu-img is missing";
  }
  write_file(folder.path("image"), image.contents());
  ASSERT_EQ(qemu_img({"snapshot", "-c", "two", folder.path("image")}).status, 0);
  const Outcome outcome = check_bytes(read_file(folder.path("image")));
  EXPECT_GT(outcome.findings.count(FindingKind::refusal), 0U);
  EXPECT_EQ(verdict(outcome.findings), 0) << told(outcome.findings);
  EXPECT_NE(qemu_img({"snapshot", "-a", "two", folder.path("image")}).status, 0);
}

}  // namespace
}  // namespace qvmstate::qcow2::test
