// Bitmaps of pages, across words and past their ends.

#include "vmstate/dirty_pages.h"

#include <gtest/gtest.h>

namespace qvmstate::vmstate {
namespace {

TEST(DirtyPages, RunsAndCounts) {
  // Pages 1, 62 to 65, 128 and, past the end of a block of 130 pages, 131.
  const uint64_t words[] = {uint64_t{1} << 1 | uint64_t{3} << 62, 0b11, 0b1001};
  const uint64_t *const bitmaps[] = {nullptr, words};
  const DirtyPages dirty(bitmaps);
  EXPECT_EQ(dirty.first_dirty(1, 0, 130), 1U);
  EXPECT_EQ(dirty.first_clean(1, 1, 130), 2U);
  EXPECT_EQ(dirty.first_dirty(1, 2, 130), 62U);
  EXPECT_EQ(dirty.first_clean(1, 62, 130), 66U);
  EXPECT_EQ(dirty.first_clean(1, 62, 64), 64U);
  EXPECT_EQ(dirty.first_dirty(1, 66, 130), 128U);
  EXPECT_EQ(dirty.first_dirty(1, 129, 130), 130U);
  EXPECT_EQ(dirty.count(1, 130), 6U);
  EXPECT_EQ(dirty.first_dirty(0, 0, 1000), 1000U);
  EXPECT_EQ(dirty.count(0, 1000), 0U);
}

}  // namespace
}  // namespace qvmstate::vmstate
