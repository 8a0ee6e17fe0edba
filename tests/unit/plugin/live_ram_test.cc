// Memory of this process as the RAM of a guest that writes while it is read.
#include "plugin/qemu/live_ram.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <random>

#include "tests/unit/plugin/memory.h"

namespace qvmstate::qemu {
namespace {

using test::Memory;
using test::page;

constexpr size_t unit = test::huge_page;
constexpr int skipped = 77;

/// All of the RAM, in the order that it wants, up to `units` of it.
Result<void> read(LiveRam &live, std::vector<std::vector<std::byte>> &to, uint64_t units) {
  for (uint64_t i = 0; i < units; ++i) {
    const auto range = live.order()->next();
    QV_TRY(range);
    if (!*range) {
      return {};
    }
    for (uint64_t at = (*range)->offset; at < (*range)->offset + (*range)->bytes;) {
      const auto presence = live.presence((*range)->block, at);
      QV_TRY(presence);
      const uint64_t bytes = std::min(presence->bytes, (*range)->offset + (*range)->bytes - at);
      if (presence->touched) {
        QV_TRY(live.read_pages((*range)->block, at, bytes / page, page,
                               to[(*range)->block].data() + at, page));
      }
      at += bytes;
    }
  }
  return {};
}

class LiveRamTest : public testing::Test {
 protected:
  void SetUp() override {
    auto protection = WriteProtection::open();
    if (!protection) {
      GTEST_SKIP() << protection.error().message;
    }
    protection_ = std::make_unique<WriteProtection>(std::move(*protection));
  }
  std::unique_ptr<WriteProtection> protection_;
};

struct Case {
  bool huge;
  unsigned writers;
};
class LiveRamWritten : public LiveRamTest, public testing::WithParamInterface<Case> {};

/// Leaves every third page, or huge page, as it is: never touched.
void fill(std::byte *data, size_t bytes, bool huge) {
  std::mt19937_64 random(7);
  for (size_t at = 0; at < bytes; at += page) {
    if (at / (huge ? unit : page) % 3 != 2) {
      std::memset(data + at, static_cast<int>(random() % 255 + 1), page);
    }
  }
}

TEST_P(LiveRamWritten, IsReadAsItWas) {
  Memory first(unit * 40 + 5 * page, GetParam().huge);
  Memory second(page * 7, false);
  std::vector<std::vector<std::byte>> expected{std::vector<std::byte>(first.size),
                                               std::vector<std::byte>(second.size)};
  for (std::byte *data : {first.data, expected[0].data()}) {
    fill(data, first.size, GetParam().huge);
  }
  for (std::byte *data : {second.data, expected[1].data()}) {
    std::memset(data, 5, second.size);
  }
  auto live =
      LiveRam::begin({first.block("first"), second.block("second")}, std::move(*protection_));
  ASSERT_TRUE(live) << live.error().message;
  std::atomic<bool> end = false;
  std::atomic<uint64_t> writes = 0;
  std::vector<std::thread> writers;
  for (unsigned i = 0; i < GetParam().writers; ++i) {
    writers.emplace_back([&, i] {
      std::mt19937_64 chance(i);
      while (!end) {
        first.data[chance() % first.size] = std::byte{0};
        second.data[chance() % second.size] = std::byte{0};
        ++writes;
      }
    });
  }
  while (GetParam().writers != 0 && writes < 5) {
    std::this_thread::yield();
  }
  std::vector<std::vector<std::byte>> seen{std::vector<std::byte>(first.size),
                                           std::vector<std::byte>(second.size)};
  const auto done = read(**live, seen, UINT64_MAX);
  const auto finished = (*live)->finish();
  end = true;
  for (std::thread &writer : writers) {
    writer.join();
  }
  ASSERT_TRUE(done) << done.error().message;
  ASSERT_TRUE(finished) << finished.error().message;
  EXPECT_EQ(finished->writes_served > 0, GetParam().writers > 0);
  EXPECT_TRUE(seen == expected);
  EXPECT_TRUE(GetParam().writers == 0 ||
              !(std::memcmp(first.data, expected[0].data(), first.size) == 0));
}

INSTANTIATE_TEST_SUITE_P(Kinds, LiveRamWritten,
                         testing::Values(Case{false, 0}, Case{false, 1}, Case{false, 3},
                                         Case{true, 1}, Case{true, 3}),
                         [](const auto &info) {
                           return std::string(info.param.huge ? "huge" : "small") + "_" +
                                  std::to_string(info.param.writers);
                         });

// Nobody waits for a reader that has not begun; then the pool is bounded, writers wait, and go on
// when the one who reads gives up.
TEST_F(LiveRamTest, WritersWaitForAReaderOnly) {
  Memory memory(unit * 60, true);
  std::memset(memory.data, 1, memory.size);
  auto live = LiveRam::begin({memory.block("ram")}, std::move(*protection_));
  ASSERT_TRUE(live) << live.error().message;
  auto write = [&](size_t from, size_t to, std::atomic<uint64_t> &written) {
    for (size_t i = from; i < to; ++i) {
      memory.data[i * unit] = std::byte{2};
      ++written;
    }
  };
  std::atomic<uint64_t> before = 0;
  write(0, 20, before);
  EXPECT_EQ(before, 20U);
  std::vector<std::vector<std::byte>> seen{std::vector<std::byte>(memory.size)};
  ASSERT_TRUE(read(**live, seen, 1));
  std::atomic<uint64_t> during = 0;
  std::thread writer(write, 20, 60, std::ref(during));
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  EXPECT_EQ(during, 0U);
  live->reset();
  writer.join();
  EXPECT_EQ(during, 40U);
}

// As a balloon takes it. What is lost before it was read cannot be saved any more; what was read
// may go.
TEST_F(LiveRamTest, MemoryTakenAwayIsNoticed) {
  for (const bool before : {true, false}) {
    Memory memory(unit * 4, false);
    std::memset(memory.data, 1, memory.size);
    auto protection = WriteProtection::open();
    ASSERT_TRUE(protection);
    auto live = LiveRam::begin({memory.block("ram")}, std::move(*protection));
    ASSERT_TRUE(live) << live.error().message;
    std::vector<std::vector<std::byte>> seen{std::vector<std::byte>(memory.size)};
    auto done = read(**live, seen, before ? 1 : UINT64_MAX);
    ASSERT_TRUE(done);
    ASSERT_EQ(::madvise(memory.data + 3 * unit, page, MADV_DONTNEED), 0);
    done = read(**live, seen, UINT64_MAX);
    const auto finished = (*live)->finish();
    EXPECT_EQ(finished.has_value(), !before);
    if (!finished) {
      EXPECT_NE(finished.error().message.find("taken from the guest"), std::string::npos);
    }
  }
}

TEST(WriteProtection, RefusalNamesTheWaysOut) {
  if (::geteuid() != 0) {
    GTEST_SKIP() << "only root can become somebody without the right to userfaultfd";
  }
  if (std::FILE *file = std::fopen("/proc/sys/vm/unprivileged_userfaultfd", "r")) {
    const int allowed = std::fgetc(file);
    std::fclose(file);
    if (allowed == '1') {
      GTEST_SKIP() << "vm.unprivileged_userfaultfd is 1 here";
    }
  }
  const pid_t child = ::fork();
  if (child == 0) {
    const bool other = ::setgid(65534) == 0 && ::setuid(65534) == 0;
    const auto refused = WriteProtection::open();
    const bool named =
        !refused && refused.error().code == ErrorCode::permission &&
        refused.error().message.find("/dev/userfaultfd") != std::string::npos &&
        refused.error().message.find("unprivileged_userfaultfd") != std::string::npos;
    ::_exit(!other ? skipped : named ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  if (WEXITSTATUS(status) == skipped) {
    GTEST_SKIP() << "cannot become another user here";
  }
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

}  // namespace
}  // namespace qvmstate::qemu
