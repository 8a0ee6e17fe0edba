// Memory of this process, written in every way that pages can change, and what the tracker says.
#include "plugin/qemu/dirty_tracker.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <random>
#include <set>
#include <thread>

#include "tests/unit/plugin/memory.h"

namespace qvmstate::qemu {
namespace {

using test::huge_page;
using test::Memory;
using test::page;

using Pages = std::set<uint64_t>;
using Bitmaps = std::vector<std::vector<uint64_t>>;

Pages pages_in(const std::vector<uint64_t> &words, uint64_t pages) {
  Pages found;
  for (uint64_t i = 0; i < pages; ++i) {
    if ((words[i / 64] >> i % 64 & 1) != 0) {
      found.insert(i);
    }
  }
  return found;
}

Pages all_from(uint64_t begin, uint64_t end) {
  Pages pages;
  for (uint64_t i = begin; i < end; ++i) {
    pages.insert(i);
  }
  return pages;
}

/// With huge pages and without.
class DirtyTrackerTest : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    const Memory memory(page, false);
    if (auto tracker = DirtyTracker::begin({range_of(memory)}); !tracker) {
      GTEST_SKIP() << tracker.error().message;
    }
  }
  static MemoryRange range_of(const Memory &memory) {
    return {reinterpret_cast<uint64_t>(memory.data), memory.size};
  }
  /// Writes are noted from here on.
  void begin(std::vector<MemoryRange> ranges) {
    auto tracker = DirtyTracker::begin(std::move(ranges));
    ASSERT_TRUE(tracker) << tracker.error().message;
    tracker_ = std::make_unique<DirtyTracker>(std::move(*tracker));
    ASSERT_TRUE(tracker_->next_changed());
  }
  Pages changed(size_t range, uint64_t pages) {
    const auto words = tracker_->next_changed();
    EXPECT_TRUE(words) << words.error().message;
    return words ? pages_in((*words)[range], pages) : Pages();
  }

  std::unique_ptr<DirtyTracker> tracker_;
};

INSTANTIATE_TEST_SUITE_P(Pages, DirtyTrackerTest, testing::Bool(),
                         [](const auto &info) { return info.param ? "huge" : "small"; });

TEST_P(DirtyTrackerTest, WritesAndNothingElse) {
  Memory first(67 * huge_page + 5 * page, GetParam());
  Memory second(3 * page, false);
  std::memset(first.data, 1, first.size);
  std::memset(second.data, 1, second.size);
  auto tracker = DirtyTracker::begin({range_of(first), range_of(second)});
  ASSERT_TRUE(tracker) << tracker.error().message;
  const uint64_t pages = first.size / page;
  auto words = tracker->next_changed();
  ASSERT_TRUE(words);
  EXPECT_EQ(pages_in((*words)[0], pages), all_from(0, pages));
  EXPECT_EQ(pages_in((*words)[1], 3), all_from(0, 3));
  std::mt19937_64 random(1);
  for (const size_t count : {0U, 1U, 500U, 20000U, 7U}) {
    Pages written;
    for (size_t i = 0; i < count; ++i) {
      const uint64_t number = random() % pages;
      first.data[number * page + random() % page] = std::byte{2};
      written.insert(number);
    }
    second.data[2 * page] = std::byte{2};
    volatile std::byte seen = second.data[0];  // reading is no change
    (void)seen;
    words = tracker->next_changed();
    ASSERT_TRUE(words);
    EXPECT_EQ(pages_in((*words)[0], pages), written) << count;
    EXPECT_EQ(pages_in((*words)[1], 3), Pages{2});
  }
}

TEST_P(DirtyTrackerTest, WritesOfTheKernelAndOfOtherProcesses) {
  Memory memory(4 * huge_page, GetParam());
  std::memset(memory.data, 1, memory.size);
  begin({range_of(memory)});
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const Descriptor from(ends[0]);
  const Descriptor to(ends[1]);
  ASSERT_EQ(::write(to.get(), "abcdefgh", 8), 8);
  ASSERT_EQ(::read(from.get(), memory.data + 11 * page - 4, 8), 8);  // over two pages
  char byte = 'x';
  iovec local = {&byte, 1};
  iovec remote = {memory.data + 700 * page, 1};
  ASSERT_EQ(::process_vm_writev(::getpid(), &local, 1, &remote, 1, 0), 1);
  EXPECT_EQ(changed(0, memory.size / page), (Pages{10, 11, 700}));
}

// A hole is not among the pages that were written, and nor is it as it was.
TEST_P(DirtyTrackerTest, MemoryGivenBackHasChanged) {
  Memory memory(8 * huge_page, GetParam());
  const uint64_t pages = memory.size / page;
  std::memset(memory.data, 1, memory.size);
  begin({range_of(memory)});
  const auto give_back = [&](size_t offset, size_t bytes) {
    ASSERT_EQ(::madvise(memory.data + offset, bytes, MADV_DONTNEED), 0);
  };
  give_back(3 * page, page);
  EXPECT_EQ(changed(0, pages), Pages{3});
  EXPECT_EQ(changed(0, pages), Pages{3});  // and still it is not there
  memory.data[3 * page] = std::byte{2};
  EXPECT_EQ(changed(0, pages), Pages{3});
  EXPECT_EQ(changed(0, pages), Pages{});
  // A whole huge page, wherever those begin, and the page table with it.
  const size_t aligned = round_up(reinterpret_cast<uint64_t>(memory.data), huge_page) -
                         reinterpret_cast<uint64_t>(memory.data) + 2 * huge_page;
  give_back(aligned, huge_page);
  EXPECT_EQ(changed(0, pages), all_from(aligned / page, (aligned + huge_page) / page));
  give_back(0, memory.size);
  EXPECT_EQ(changed(0, pages), all_from(0, pages));
  memory.data[9 * page] = std::byte{2};
  EXPECT_EQ(changed(0, pages).count(9), 1U);
}

TEST_P(DirtyTrackerTest, UntouchedMemoryStaysSo) {
  Memory memory(64 * huge_page, GetParam());
  const uint64_t pages = memory.size / page;
  begin({range_of(memory)});
  EXPECT_EQ(changed(0, pages), all_from(0, pages));
  std::vector<unsigned char> resident(pages);
  ASSERT_EQ(::mincore(memory.data, memory.size, resident.data()), 0);
  EXPECT_EQ(std::count_if(resident.begin(), resident.end(), [](auto c) { return (c & 1) != 0; }),
            0);
}

// Pages are copied as they are told, while others write to them; what was copied at last is what is
// there at last.
TEST_P(DirtyTrackerTest, WritesMeanwhileAreToldNowOrLater) {
  Memory memory(16 * huge_page, GetParam());
  const uint64_t pages = memory.size / page;
  std::memset(memory.data, 0, memory.size);
  begin({range_of(memory)});
  const auto value_at = [&](uint64_t number) {
    return std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t *>(memory.data + number * page));
  };
  std::vector<uint64_t> copy(pages);
  std::atomic<bool> end = false;
  std::atomic<uint64_t> writes = 0;
  std::vector<std::thread> writers;
  for (unsigned i = 0; i < 2; ++i) {
    writers.emplace_back([&, i] {
      std::mt19937_64 random(i);
      while (!end) {
        value_at(random() % pages).fetch_add(1);
        ++writes;
      }
    });
  }
  const auto follow = [&] {
    const auto words = tracker_->next_changed();
    ASSERT_TRUE(words);
    for (const uint64_t number : pages_in((*words)[0], pages)) {
      copy[number] = value_at(number);
    }
  };
  for (int round = 0; round < 30 || writes < 1000; ++round) {
    follow();
  }
  end = true;
  for (std::thread &writer : writers) {
    writer.join();
  }
  follow();
  for (uint64_t i = 0; i < pages; ++i) {
    ASSERT_EQ(copy[i], value_at(i)) << i;
  }
}

// Another mapping at the same place is not the memory that was tracked.
TEST_P(DirtyTrackerTest, RefusesWhatWasMappedAnew) {
  Memory memory(4 * huge_page, GetParam());
  std::memset(memory.data, 1, memory.size);
  begin({range_of(memory)});
  ASSERT_NE(::mmap(memory.data + huge_page, huge_page, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0),
            MAP_FAILED);
  const auto words = tracker_->next_changed();
  ASSERT_FALSE(words);
  EXPECT_EQ(words.error().sys_errno, EPERM);
  EXPECT_NE(words.error().message.find("which pages"), std::string::npos);
}

TEST_P(DirtyTrackerTest, OneAtATime) {
  Memory memory(huge_page, GetParam());
  begin({range_of(memory)});
  const auto second = DirtyTracker::begin({range_of(memory)});
  ASSERT_FALSE(second);
  EXPECT_NE(second.error().message.find("by something else"), std::string::npos);
  tracker_.reset();
  EXPECT_TRUE(DirtyTracker::begin({range_of(memory)}));
}

}  // namespace
}  // namespace qvmstate::qemu
