// What is known of memory of this process from one save to the next.
#include "plugin/qemu/known_ram.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>

#include "plugin/qemu/inprocess_source.h"
#include "tests/unit/plugin/memory.h"

namespace qvmstate::qemu {
namespace {

using test::huge_page;
using test::Memory;
using test::page;
using vmstate::Group;
using vmstate::KnownGroups;

constexpr uint64_t group_bytes = 64 * kib;
constexpr uint64_t group_pages = 15;

class KnownRamTest : public testing::Test {
 protected:
  void SetUp() override {
    std::memset(first_.data, 1, first_.size);
    std::memset(second_.data, 1, second_.size);
    const auto groups = begin_save();
    if (!groups) {
      GTEST_SKIP() << groups.error().message;
    }
    EXPECT_EQ(groups->at(0).size(), divide_up(first_.size / page, group_pages));
    EXPECT_EQ(groups->at(1).size(), 2U);
    EXPECT_EQ(known(*groups), 0U);
    total_ = groups->at(0).size() + groups->at(1).size();
    end_save();
  }

  static Result<GuestRam> open(const std::vector<HostRamBlock> &blocks) {
    QV_ASSIGN(auto source, InProcessSource::open(blocks));
    GuestRam ram;
    ram.map = &source->map();
    ram.source = std::move(source);
    return ram;
  }
  Result<KnownGroups> begin_save(uint64_t bytes = group_bytes) {
    QV_ASSIGN(const GuestRam ram, open(blocks_));
    return known_ram_.begin_save(ram, bytes);
  }
  /// All groups are data.
  void end_save() {
    std::vector<vmstate::RamBlock> blocks;
    for (const HostRamBlock &block : blocks_) {
      blocks.push_back(block.block);
    }
    KnownGroups groups = vmstate::nothing_known(blocks, group_bytes);
    for (auto &of_block : groups) {
      for (size_t i = 0; i < of_block.size(); ++i) {
        of_block[i] = Group{Group::Kind::data, {static_cast<std::byte>(i)}};
      }
    }
    known_ram_.end_save(std::move(groups));
  }
  static uint64_t known(const KnownGroups &groups) {
    uint64_t count = 0;
    for (const auto &of_block : groups) {
      for (const auto &group : of_block) {
        count += group.has_value();
      }
    }
    return count;
  }
  /// Of the next save, which succeeds if `commit`.
  uint64_t next_known(bool commit = true) {
    const auto groups = begin_save();
    EXPECT_TRUE(groups) << groups.error().message;
    if (commit) {
      end_save();
    }
    return groups ? known(*groups) : 0;
  }

  Memory first_{2 * huge_page + 4 * page, true};
  Memory second_{17 * page, false};
  std::vector<HostRamBlock> blocks_{first_.block("pc.ram"), second_.block("rom")};
  KnownRam known_ram_;
  uint64_t total_ = 0;
};

TEST_F(KnownRamTest, GroupsThatWereWrittenAreNot) {
  EXPECT_EQ(next_known(), total_);
  first_.data[(3 * group_pages + 14) * page] = std::byte{2};  // the last of its group
  first_.data[4 * group_pages * page + 1] = std::byte{2};     // the first
  first_.data[first_.size - 1] = std::byte{2};
  second_.data[16 * page] = std::byte{2};
  const auto groups = begin_save();
  ASSERT_TRUE(groups) << groups.error().message;
  EXPECT_EQ(known(*groups), total_ - 4);
  for (const size_t group : {size_t{3}, size_t{4}, groups->at(0).size() - 1}) {
    EXPECT_FALSE(groups->at(0)[group]) << group;
  }
  EXPECT_FALSE(groups->at(1)[1]);
  ASSERT_TRUE(groups->at(1)[0]);
  EXPECT_EQ(groups->at(0)[5]->digest[0], std::byte{5});
  end_save();
  EXPECT_EQ(next_known(), total_);
}

TEST_F(KnownRamTest, NothingAfterASaveThatFailed) {
  EXPECT_EQ(next_known(false), total_);
  EXPECT_EQ(next_known(), 0U);
  EXPECT_EQ(next_known(), total_);
}

TEST_F(KnownRamTest, NothingOnceForgotten) {
  known_ram_.forget();
  EXPECT_EQ(next_known(), 0U);
  EXPECT_EQ(next_known(), total_);
}

TEST_F(KnownRamTest, NothingOfOtherBlocksOrGroups) {
  Memory third(page, false);
  third.data[0] = std::byte{1};
  blocks_.push_back(third.block("dimm"));
  EXPECT_EQ(next_known(), 0U);
  EXPECT_EQ(next_known(), total_ + 1);
  blocks_[0].block.used_bytes -= page;
  EXPECT_EQ(next_known(), 0U);
  std::swap(blocks_[1].block.idstr, blocks_[2].block.idstr);
  EXPECT_EQ(next_known(), 0U);
  const auto larger = begin_save(2 * group_bytes);
  ASSERT_TRUE(larger);
  EXPECT_EQ(known(*larger), 0U);
  EXPECT_EQ(larger->at(0).size(), divide_up(blocks_[0].block.used_bytes / page, 31));
}

TEST_F(KnownRamTest, SaysWhyNot) {
  const Memory shared(huge_page, false, true);
  blocks_.push_back(shared.block("mem0"));
  const auto refused = begin_save();
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().message.find("'mem0' is shared memory"), std::string::npos);
  blocks_.pop_back();
  EXPECT_EQ(next_known(), 0U);
}

}  // namespace
}  // namespace qvmstate::qemu
