// New counts go to copies of the blocks; what the image on disk says stays.
#include "qcow2/refcount_editor.h"

#include <gtest/gtest.h>

#include "edit_helpers.h"

namespace qvmstate::qcow2::test {
namespace {

struct Edited {
  explicit Edited(const std::vector<uint16_t> &counts)
      : disk(tiny_image(counts)),
        allocator(Allocator::scan(*disk.image)),
        editor(*disk.image, *allocator) {}
  uint64_t table_entry(HostOffset table, uint64_t index) const {
    return load_be<uint64_t>(disk.contents().data() + table.value + index * 8);
  }
  uint16_t count(uint64_t block, uint64_t index) const {
    return load_be<uint16_t>(disk.contents().data() + block + index * 2);
  }

  MemoryImage disk;
  Result<Allocator> allocator;
  RefcountEditor editor;
};

TEST(RefcountEditor, CountsOfTheNewTableIncludeItselfAndWhatItReplaces) {
  Edited edited({1, 1, 1, 1});
  const Bytes before = edited.disk.contents();
  const auto taken = edited.allocator->take(1);
  ASSERT_EQ(taken->first, 4U);
  ASSERT_TRUE(edited.editor.claim(*taken, 2));
  ASSERT_TRUE(edited.editor.reference(3, 1, 100));
  const auto table = edited.editor.finish();
  ASSERT_TRUE(table) << table.error().message;
  ASSERT_EQ(table->clusters, 1U);
  const uint64_t block = edited.table_entry(table->offset, 0);
  EXPECT_EQ(block, 5 * 512U);                // the first cluster after the one taken
  EXPECT_EQ(table->offset.value, 6 * 512U);  // and the next
  EXPECT_EQ(edited.table_entry(table->offset, 1), 0U);
  const uint16_t expected[] = {1,  // header
                               0,  // the old table
                               0,  // the old block
                               2,  // L1, referenced
                               2,  // claimed
                               1,  // the new block
                               1,  // the new table
                               0};
  for (uint64_t i = 0; i < std::size(expected); ++i) {
    EXPECT_EQ(edited.count(block, i), expected[i]) << "cluster " << i;
  }
  EXPECT_TRUE(std::equal(before.begin(), before.end(), edited.disk.contents().begin()));
}

TEST(RefcountEditor, ABlockIsMadeForClustersThatNoneCounts) {
  Edited edited({1, 1, 1, 1});
  ASSERT_TRUE(edited.editor.claim({300, 2}, 1));
  EXPECT_EQ(*edited.editor.get(300), 1U);
  EXPECT_EQ(*edited.editor.get(302), 0U);
  EXPECT_EQ(*edited.editor.get(100000), 0U);
  const auto table = edited.editor.finish();
  ASSERT_TRUE(table);
  const uint64_t second = edited.table_entry(table->offset, 1);
  ASSERT_NE(second, 0U);
  EXPECT_EQ(edited.count(second, 300 - 256), 1U);
  EXPECT_EQ(edited.count(second, 301 - 256), 1U);
  EXPECT_EQ(edited.count(second, 302 - 256), 0U);
}

TEST(RefcountEditor, FreedRunsAreRemembered) {
  Edited edited({1, 1, 1, 1, 1, 1, 2});
  ASSERT_TRUE(edited.editor.dereference(4, 3));
  ASSERT_FALSE(edited.editor.freed().empty());
  EXPECT_EQ(edited.editor.freed().front().first, 4U);
  EXPECT_EQ(edited.editor.freed().front().count, 2U);
  EXPECT_EQ(*edited.editor.get(6), 1U);
}

TEST(RefcountEditor, ACountAtItsCeilingIsRefused) {
  Edited edited({1, 1, 1, 1, 7});
  ASSERT_TRUE(edited.editor.reference(4, 1, 8));
  const auto refused = edited.editor.reference(4, 1, 8);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::not_supported);
}

TEST(RefcountEditor, DamagedCountsAreErrors) {
  Edited edited({1, 1, 1, 1, 0, 1});
  for (const auto &result : {edited.editor.reference(4, 1, 100), edited.editor.dereference(4, 1),
                             edited.editor.claim({5, 1}, 1), edited.editor.reference(256, 1, 100),
                             edited.editor.dereference(uint64_t{1} << 47, 1)}) {
    ASSERT_FALSE(result);
    EXPECT_EQ(result.error().code, ErrorCode::bad_image) << result.error().message;
  }
}

}  // namespace
}  // namespace qvmstate::qcow2::test
