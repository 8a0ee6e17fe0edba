#include "plugin/qemu/guardian.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>

#include "tests/unit/plugin/fake_qmp.h"

namespace qvmstate::qemu {
namespace {

using testing::FakeQmp;
using testing::greeting;
using testing::returns;

constexpr std::chrono::milliseconds rescue{1000};

/// A saver process that starts a guardian and then does `end`. Started before the server, whose
/// thread may hold a lock of the sanitizer's allocator at the moment of a fork.
pid_t start_saver(const std::string &path, bool was_running, void (*end)(Guardian &)) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    auto qmp = Qmp::connect(path);
    for (int tries = 0; !qmp && tries < 1000; tries++) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      qmp = Qmp::connect(path);
    }
    const std::vector<Disk> disks;
    auto guardian = qmp ? Guardian::start(**qmp, path, disks, was_running)
                        : Result<Guardian>(tl::unexpected(qmp.error()));
    if (!guardian || !(*qmp)->execute("stop")) {
      ::_exit(1);
    }
    end(*guardian);
    ::_exit(0);
  }
  return pid;
}

void wait_to_be_killed(Guardian &) {
  for (;;) {
    ::pause();
  }
}

TEST(Guardian, LetsTheGuestRunWhenTheSaverIsKilled) {
  const testing::TemporaryFolder folder;
  const pid_t saver = start_saver(folder.file("q"), true, wait_to_be_killed);
  FakeQmp server(folder.file("q"), greeting, testing::agree);
  ASSERT_TRUE(server.saw("stop", std::chrono::seconds(5)));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_FALSE(server.saw("cont", std::chrono::milliseconds(0)));
  ::kill(saver, SIGKILL);
  EXPECT_TRUE(server.saw("cont", rescue));
  ::waitpid(saver, nullptr, 0);
}

TEST(Guardian, ActivatesThePausedGuestsDisksWithoutRunningIt) {
  const testing::TemporaryFolder folder;
  const pid_t saver = start_saver(folder.file("q"), false, wait_to_be_killed);
  FakeQmp server(folder.file("q"), greeting, testing::agree);
  ASSERT_TRUE(server.saw("stop", std::chrono::seconds(5)));
  ::kill(saver, SIGKILL);
  EXPECT_TRUE(server.saw("blockdev-set-active", rescue));
  EXPECT_FALSE(server.saw("cont", std::chrono::milliseconds(100)));
  ::waitpid(saver, nullptr, 0);
}

TEST(Guardian, TriesAgainWhileTheImagesAreLocked) {
  const testing::TemporaryFolder folder;
  const pid_t saver = start_saver(folder.file("q"), true, wait_to_be_killed);
  std::atomic<int> refusals = 3;
  FakeQmp server(folder.file("q"), greeting, [&](const Json &request) {
    if (text_at(request, "execute") == "cont" && refusals-- > 0) {
      return Json(
                 {{"error", {{"desc", "Failed to get \"write\" lock"}}}, {"id", at(request, "id")}})
                 .dump() +
             "\n";
    }
    return testing::agree(request);
  });
  ASSERT_TRUE(server.saw("stop", std::chrono::seconds(5)));
  ::kill(saver, SIGKILL);
  // It asks for the marks only when the guest is back.
  EXPECT_TRUE(server.saw("query-fdsets", rescue));
  EXPECT_LT(refusals, 0);
  ::waitpid(saver, nullptr, 0);
}

TEST(Guardian, DoesNothingOnceDisarmed) {
  const testing::TemporaryFolder folder;
  const pid_t saver =
      start_saver(folder.file("q"), true, [](Guardian &guardian) { guardian.disarm(); });
  FakeQmp server(folder.file("q"), greeting, testing::agree);
  int status = -1;
  ASSERT_EQ(::waitpid(saver, &status, 0), saver);
  EXPECT_EQ(status, 0);
  EXPECT_FALSE(server.saw("cont", std::chrono::milliseconds(200)));
}

}  // namespace
}  // namespace qvmstate::qemu
