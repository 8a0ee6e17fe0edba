// Saves over several images, and what their names may be. Crashes are tried in tests/crash.
#include "qcow2/image_set.h"

#include <gtest/gtest.h>

#include "edit_helpers.h"
#include "qcow2/header.h"

namespace qvmstate::qcow2::test {
namespace {

struct Pair {
  Pair()
      : first(fixture("qemu-72-v3-4k-preallocated.qcow2")),
        second(fixture("qemu-72-v2-4k-snapshots.qcow2")) {}
  std::vector<Image *> images() { return {first.image.get(), second.image.get()}; }
  std::vector<std::vector<std::string>> names() {
    std::vector<std::vector<std::string>> all;
    for (const Image *image : images()) {
      all.emplace_back();
      for (const Snapshot &snapshot : image->snapshots()) {
        all.back().push_back(snapshot.name);
      }
    }
    return all;
  }
  // The vmstate in the first.
  Result<void> save(uint64_t seed, bool replace) {
    NewSnapshot snapshot;
    snapshot.name = "state";
    snapshot.date_seconds = 1700000000 + static_cast<uint32_t>(seed);
    QV_ASSIGN(auto set, SetSave::begin(images(), 0, snapshot, replace));
    const Bytes stream = seeded_bytes(50 * kib, seed);
    QV_TRY(write_stream(*first.file, set->vmstate(), stream, 64 * kib));
    id_of_first = set->id(0);
    id_of_second = set->id(1);
    return set->commit(stream.size());
  }

  MemoryImage first;
  MemoryImage second;
  std::string id_of_first;
  std::string id_of_second;
};

using Names = std::vector<std::vector<std::string>>;

TEST(ImageSet, SaveReplaceAndDelete) {
  Pair pair;
  ASSERT_TRUE(pair.save(1, false));
  EXPECT_EQ(pair.names(), (Names{{"state"}, {"old1", "old3", "state"}}));
  EXPECT_EQ(pair.id_of_first, "1");
  EXPECT_EQ(pair.id_of_second, "4");
  EXPECT_FALSE(needs_recovery(pair.images()));
  const auto taken = pair.save(2, false);
  ASSERT_FALSE(taken);
  EXPECT_EQ(taken.error().code, ErrorCode::exists);
  ASSERT_TRUE(pair.save(2, true));
  EXPECT_EQ(pair.names(), (Names{{"state"}, {"old1", "old3", "state"}}));
  EXPECT_TRUE(*vmstate_of(*pair.first.image, "state") == seeded_bytes(50 * kib, 2));
  EXPECT_EQ(pair.second.image->snapshots()[2].vmstate_bytes, 0U);
  EXPECT_EQ(pair.second.image->snapshots()[2].date_seconds, 1700000002U);
  ASSERT_TRUE(delete_from_set(pair.images(), "state", true));
  EXPECT_EQ(pair.names(), (Names{{}, {"old1", "old3"}}));
  const auto missing = delete_from_set(pair.images(), "state", true);
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code, ErrorCode::not_found);
}

TEST(ImageSet, NamesOfASaveInProgressAreRefused) {
  Pair pair;
  for (const std::string name : {"a.new-1", "a.old-22", "old1", "4x.new-0", "12", ""}) {
    EXPECT_FALSE(check_save_name(pair.images(), name, false)) << name;
  }
  for (const std::string name : {"a.new-", "a.new-x", ".new-1", "new-1"}) {
    EXPECT_TRUE(check_save_name(pair.images(), name, false)) << name;
  }
  EXPECT_TRUE(check_save_name(pair.images(), "old1", true));
  // Room for ".new-" and the longest id.
  EXPECT_TRUE(check_save_name(pair.images(), std::string(223, 'x'), false));
  EXPECT_FALSE(check_save_name(pair.images(), std::string(224, 'x'), false));
  EXPECT_TRUE(check_save_name({pair.first.image.get()}, std::string(255, 'x'), false));
}

// The second image was switched and its flush failed: the list in memory is older than the file.
TEST(ImageSet, AFailedFlushInTheSecondImageIsTakenBack) {
  Pair pair;
  ASSERT_TRUE(pair.save(1, false));
  io::MemoryOptions options;
  options.faults = {{io::FileOperation::sync, 1, -EIO}};  // the first is before the header write
  pair.second.backend->set_options(options);
  const auto failed = pair.save(2, true);
  ASSERT_FALSE(failed);
  EXPECT_EQ(failed.error().code, ErrorCode::io);
  EXPECT_EQ(MemoryImage(pair.second.contents()).image->snapshots()[2].name, "state");
  EXPECT_EQ(pair.names(), (Names{{"state"}, {"old1", "old3", "state"}}));
  EXPECT_EQ(pair.second.image->snapshots()[2].date_seconds, 1700000001U);
  EXPECT_TRUE(*vmstate_of(*pair.first.image, "state") == seeded_bytes(50 * kib, 1));
}

// One switch of the second image is all that reached the disk.
TEST(ImageSet, RecoveryGoesBackWhereTheVmstateIsMissing) {
  Pair pair;
  ASSERT_TRUE(pair.save(1, false));
  const Bytes first_before = pair.first.contents();
  const size_t changes_before = pair.second.backend->journal().size();
  ASSERT_TRUE(pair.save(2, true));
  const auto &journal = pair.second.backend->journal();
  size_t changes = changes_before;
  while (journal[changes].offset != switch_offset) {
    ++changes;
  }
  MemoryImage first(first_before);
  MemoryImage second(pair.second.backend->contents_after(changes + 1));
  EXPECT_EQ(find_snapshot(second.image->snapshots(), "state"), -1);
  EXPECT_GE(find_snapshot(second.image->snapshots(), "state.old-2"), 0);
  EXPECT_GE(find_snapshot(second.image->snapshots(), "state.new-2"), 0);
  const std::vector<Image *> images{first.image.get(), second.image.get()};
  EXPECT_TRUE(needs_recovery(images));
  const auto actions = recover_set(images);
  ASSERT_TRUE(actions);
  ASSERT_EQ(actions->size(), 1U);
  EXPECT_NE(actions->front().find("took back"), std::string::npos);
  EXPECT_FALSE(needs_recovery(images));
  ASSERT_EQ(second.image->snapshots().size(), 3U);
  EXPECT_EQ(second.image->snapshots()[2].name, "state");
  EXPECT_EQ(second.image->snapshots()[2].date_seconds, 1700000001U);
}

// A user's own snapshot that happens to be called so is nobody's save in progress.
TEST(ImageSet, ANameAloneIsNoSaveInProgress) {
  Pair pair;
  ASSERT_TRUE(rename(*pair.second.image, "old1", "mine.new-1"));
  EXPECT_FALSE(needs_recovery(pair.images()));
  const auto actions = recover_set(pair.images());
  ASSERT_TRUE(actions);
  EXPECT_TRUE(actions->empty());
  EXPECT_GE(find_snapshot(pair.second.image->snapshots(), "mine.new-1"), 0);
}

}  // namespace
}  // namespace qvmstate::qcow2::test
