// Which marks are interrupted operations', which are of one that goes on, and which cannot be told.
#include "plugin/qemu/marks.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <linux/capability.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <array>

#include "plugin/qemu/process_files.h"
#include "tests/unit/plugin/fake_qmp.h"

namespace qvmstate::qemu {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr uint64_t fdset = 3;

/// A QEMU, this process, in which an operation left a mark.
class MarksTest : public ::testing::Test {
 protected:
  MarksTest() : in_qemu_(::memfd_create("qvmstate-devices", MFD_CLOEXEC)) {}

  /// Answers on the socket file("q").
  void serve() {
    server_.emplace(folder_.file("q"), testing::greeting, [this](const Json &request) {
      if (text_at(request, "execute") != "query-fdsets") {
        return testing::agree(request);
      }
      const Json member = {{"fd", in_qemu_.get()}, {"opaque", opaque_}};
      return testing::returns(request,
                              Json::array({{{"fdset-id", fdset}, {"fds", Json::array({member})}}}));
    });
  }
  Result<std::unique_ptr<Qmp>> connect() { return Qmp::connect(folder_.file("q")); }

  testing::TemporaryFolder folder_;
  Descriptor in_qemu_;
  std::string opaque_ = "qvmstate: was running saving 's'";
  std::optional<testing::FakeQmp> server_;
};

TEST_F(MarksTest, OfAnInterruptedOperation) {
  serve();
  auto qmp = connect();
  ASSERT_TRUE(qmp);
  const auto marks = find_marks(**qmp);
  ASSERT_TRUE(marks) << marks.error().message;
  EXPECT_THAT(marks->interrupted, ElementsAre(fdset));
  EXPECT_TRUE(marks->was_running);
  EXPECT_EQ(marks->going_on, 0U);
  EXPECT_EQ(marks->cannot_tell, "");
  EXPECT_TRUE(check_none_going_on(**qmp));
  forget_marks(**qmp);
  EXPECT_TRUE(server_->saw("remove-fd", std::chrono::milliseconds(0)));
}

TEST_F(MarksTest, OfAnOperationOnAPausedVm) {
  opaque_ = "qvmstate: was paused saving 's'";
  serve();
  auto qmp = connect();
  ASSERT_TRUE(qmp);
  const auto marks = find_marks(**qmp);
  ASSERT_TRUE(marks) << marks.error().message;
  EXPECT_THAT(marks->interrupted, ElementsAre(fdset));
  EXPECT_FALSE(marks->was_running);
}

TEST_F(MarksTest, OfAnotherProgramAreNone) {
  opaque_ = "qvmstate";
  serve();
  auto qmp = connect();
  ASSERT_TRUE(qmp);
  const auto marks = find_marks(**qmp);
  ASSERT_TRUE(marks) << marks.error().message;
  EXPECT_THAT(marks->interrupted, IsEmpty());
  EXPECT_EQ(marks->going_on, 0U);
}

TEST_F(MarksTest, OfAnOperationThatGoesOn) {
  serve();
  // As the operation has it: another description of the same file, with a writer's locks.
  const Descriptor its(::open(own_descriptor_path(in_qemu_.get()).c_str(), O_RDWR | O_CLOEXEC));
  auto lock = qcow2::ImageLock::take(std::array{its.get()}, qcow2::LockRole::writer, "the mark");
  ASSERT_TRUE(lock) << lock.error().message;
  auto qmp = connect();
  ASSERT_TRUE(qmp);
  const auto marks = find_marks(**qmp);
  ASSERT_TRUE(marks) << marks.error().message;
  EXPECT_THAT(marks->interrupted, IsEmpty());
  EXPECT_FALSE(marks->was_running);
  EXPECT_EQ(marks->going_on, 1U);
  const auto alone = check_none_going_on(**qmp);
  ASSERT_FALSE(alone);
  EXPECT_THAT(alone.error().message, HasSubstr("going on"));
  forget_marks(**qmp);
  EXPECT_FALSE(server_->saw("remove-fd", std::chrono::milliseconds(0)));
}

/// Without a capability, and so without the right to look into a process that has one or that does
/// not let itself be dumped.
void give_up_capabilities() {
  __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
  const std::array<__user_cap_data_struct, _LINUX_CAPABILITY_U32S_3> none = {};
  if (::syscall(SYS_capset, &header, none.data()) != 0) {
    ::_exit(2);
  }
}

/// What check_none_going_on() says, in a process that may use the socket but not look into QEMU's.
/// To start before the server, whose thread may hold a lock of the sanitizer's allocator at the
/// moment of a fork.
pid_t ask_without_rights(const std::string &socket, int out) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    give_up_capabilities();
    auto qmp = Qmp::connect(socket);
    for (int tries = 0; !qmp && tries < 1000; tries++) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      qmp = Qmp::connect(socket);
    }
    const auto marks = qmp ? find_marks(**qmp) : tl::unexpected(qmp.error());
    const auto alone = qmp ? check_none_going_on(**qmp) : tl::unexpected(qmp.error());
    const std::string said = alone ? "none goes on" : alone.error().message;
    const bool sure = !marks || !marks->interrupted.empty() || marks->was_running;
    ::_exit(::write(out, said.data(), said.size()) > 0 && !sure ? 0 : 1);
  }
  return pid;
}

TEST_F(MarksTest, CannotBeToldWithoutTheRightToLookIntoQemu) {
  int pipe[2];
  ASSERT_EQ(::pipe2(pipe, O_CLOEXEC), 0);
  const Descriptor reading(pipe[0]);
  const pid_t asking = ask_without_rights(folder_.file("q"), pipe[1]);
  ::close(pipe[1]);
  ::prctl(PR_SET_DUMPABLE, 0);
  serve();
  int status = -1;
  ASSERT_EQ(::waitpid(asking, &status, 0), asking);
  ::prctl(PR_SET_DUMPABLE, 1);
  char said[1000] = "";
  ASSERT_GT(::read(reading.get(), said, sizeof said - 1), 0);
  EXPECT_EQ(status, 0) << said;
  EXPECT_THAT(said, HasSubstr("cannot tell"));
  EXPECT_THAT(said, HasSubstr("as QEMU's user"));
}

}  // namespace
}  // namespace qvmstate::qemu
