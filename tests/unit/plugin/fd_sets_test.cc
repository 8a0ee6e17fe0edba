// Descriptors of QEMU's fd sets, out of this process and out of another.
#include "plugin/qemu/fd_sets.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <csignal>

#include "plugin/qemu/save_target.h"
#include "tests/unit/plugin/fake_qmp.h"

namespace qvmstate::qemu {
namespace {

using testing::FakeQmp;
using ::testing::HasSubstr;
using testing::TemporaryFolder;

Json set_of(int64_t id, const std::vector<int> &descriptors) {
  Json list = Json::array();
  for (const int descriptor : descriptors) {
    list.push_back({{"fd", descriptor}, {"opaque", "x"}});
  }
  return {{"fdset-id", id}, {"fds", list}};
}

class FdSets : public ::testing::Test {
 protected:
  FdSets()
      : server_(folder_.file("q"), testing::greeting, [this](const Json &request) {
          return text_at(request, "execute") == "query-fdsets" ? testing::returns(request, sets_)
                                                               : testing::agree(request);
        }) {
    qmp_ = std::move(Qmp::connect(folder_.file("q")).value());
  }
  int open(int flags) const { return ::open(path_.c_str(), O_CREAT | O_CLOEXEC | flags, 0600); }

  TemporaryFolder folder_;
  std::string path_ = folder_.file("state");
  Json sets_ = Json::array();
  FakeQmp server_;
  std::unique_ptr<Qmp> qmp_;
};

TEST_F(FdSets, OfThisProcessAreDuplicated) {
  const Descriptor first(open(O_WRONLY));
  const Descriptor second(open(O_RDWR));
  sets_ = {set_of(1, {0}), set_of(7, {first.get(), second.get()})};
  auto fetched = descriptors_of_fd_set(*qmp_, ::getpid(), 7, FdSetUse::writing);
  ASSERT_TRUE(fetched) << fetched.error().message;
  ASSERT_EQ(fetched->size(), 2U);
  EXPECT_NE((*fetched)[0].get(), first.get());
  EXPECT_EQ(::fcntl((*fetched)[0].get(), F_GETFL) & O_ACCMODE, O_WRONLY);
  EXPECT_EQ(::fcntl((*fetched)[1].get(), F_GETFL) & O_ACCMODE, O_RDWR);
  EXPECT_EQ(::fcntl((*fetched)[0].get(), F_GETFD), FD_CLOEXEC);
  // One open file description: it has one position.
  ASSERT_EQ(::lseek((*fetched)[0].get(), 123, SEEK_SET), 123);
  EXPECT_EQ(::lseek(first.get(), 0, SEEK_CUR), 123);
}

TEST_F(FdSets, OfAnotherProcessAreFetchedAndWrittenThrough) {
  const int buffered = open(O_WRONLY);
  const int direct = open(O_WRONLY | O_DIRECT);
  if (direct < 0) {
    GTEST_SKIP() << "no O_DIRECT in " << path_;
  }
  const pid_t other = ::fork();
  if (other == 0) {
    for (;;) {
      ::pause();
    }
  }
  ::close(buffered);
  ::close(direct);
  // Made after the numbers became free here: they mean something in the other process only.
  sets_ = {set_of(3, {direct, buffered})};
  SaveOptions options;
  options.to = "file:/dev/fdset/3,offset=4k";
  GivenDescriptors given(options);
  {
    auto target = open_save_target(*qmp_, other, options, 1, given);
    if (!target && target.error().sys_errno == EPERM) {
      ::kill(other, SIGKILL);
      ::waitpid(other, nullptr, 0);
      GTEST_SKIP() << target.error().message;
    }
    ASSERT_TRUE(target) << target.error().message;
    EXPECT_EQ((*target)->name(), "/dev/fdset/3");
    EXPECT_TRUE((*target)->file().backend().direct());
    const std::byte byte{42};
    ASSERT_TRUE((*target)->channel(0).write_at(std::span(&byte, 1), HostOffset(5000)));
    ASSERT_TRUE((*target)->finish(5001));
  }
  ::kill(other, SIGKILL);
  ::waitpid(other, nullptr, 0);
  struct stat status = {};
  ASSERT_EQ(::stat(path_.c_str(), &status), 0);
  EXPECT_EQ(status.st_size, 5001);
  const Descriptor file(open(O_RDONLY));
  char last = 0;
  ASSERT_EQ(::pread(file.get(), &last, 1, 5000), 1);
  EXPECT_EQ(last, 42);
}

TEST_F(FdSets, AMissingSetNamesThoseThereAre) {
  auto missing = descriptors_of_fd_set(*qmp_, ::getpid(), 5, FdSetUse::writing);
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code, ErrorCode::not_found);
  EXPECT_THAT(missing.error().message,
              HasSubstr("/dev/fdset/5: QEMU has no such fd set; there are none"));
  sets_ = {set_of(1, {0, 1}), set_of(12, {2})};
  missing = descriptors_of_fd_set(*qmp_, ::getpid(), 5, FdSetUse::writing);
  ASSERT_FALSE(missing);
  EXPECT_THAT(missing.error().message, HasSubstr("there are 1, 12"));
}

TEST_F(FdSets, AWrongCountSaysHowManyItNeeds) {
  const Descriptor file(open(O_RDWR));
  const int number = file.get();
  struct Case {
    std::vector<int> descriptors;
    FdSetUse use;
    const char *words;  // null: accepted
  };
  const Case cases[] = {
      {{}, FdSetUse::writing, "has 0 descriptors; writing needs 2"},
      {{number}, FdSetUse::writing, "has 1 descriptor; writing needs 2"},
      {{number, number, number}, FdSetUse::writing, "has 3 descriptors; writing needs 2"},
      {{}, FdSetUse::reading, "has 0 descriptors; reading needs 1, or 2"},
      {{number, number, number}, FdSetUse::reading, "has 3 descriptors; reading needs 1, or 2"},
      {{number}, FdSetUse::reading, nullptr},
      {{number, number}, FdSetUse::reading, nullptr},
      {{number, number}, FdSetUse::writing, nullptr},
  };
  for (const Case &one : cases) {
    sets_ = {set_of(0, one.descriptors)};
    const auto fetched = descriptors_of_fd_set(*qmp_, ::getpid(), 0, one.use);
    if (one.words == nullptr) {
      ASSERT_TRUE(fetched) << fetched.error().message;
      EXPECT_EQ(fetched->size(), one.descriptors.size());
      continue;
    }
    ASSERT_FALSE(fetched) << one.words;
    EXPECT_EQ(fetched.error().code, ErrorCode::bad_argument);
    EXPECT_THAT(fetched.error().message, HasSubstr(one.words));
  }
}

TEST_F(FdSets, NonsenseFromQemuIsAnError) {
  for (const Json &nonsense :
       {Json::object(), Json(5), Json({7}), Json({{{"fdset-id", "0"}}}),
        Json({{{"fdset-id", -1}, {"fds", {{{"fd", 1}}}}}}), Json({{{"fdset-id", 0}}}),
        Json({{{"fdset-id", 0}, {"fds", 5}}}), Json({{{"fdset-id", 0}, {"fds", {5, 6}}}}),
        Json({{{"fdset-id", 0}, {"fds", {{{"fd", -1}}, {{"fd", -1}}}}}}),
        Json({{{"fdset-id", 0}, {"fds", {{{"fd", 1u << 31}}, {{"fd", 1}}}}}})}) {
    sets_ = nonsense;
    EXPECT_FALSE(descriptors_of_fd_set(*qmp_, ::getpid(), 0, FdSetUse::writing)) << nonsense;
  }
  sets_ = {set_of(0, {54321, 54322})};
  const auto closed = descriptors_of_fd_set(*qmp_, ::getpid(), 0, FdSetUse::writing);
  ASSERT_FALSE(closed);
  EXPECT_EQ(closed.error().sys_errno, EBADF);
  EXPECT_THAT(closed.error().message, HasSubstr("fetching descriptor 54321 of QEMU"));
  const auto gone = descriptors_of_fd_set(*qmp_, 0x3fffffff, 0, FdSetUse::writing);
  ASSERT_FALSE(gone);
  EXPECT_THAT(gone.error().message, HasSubstr("reaching QEMU"));
}

}  // namespace
}  // namespace qvmstate::qemu
