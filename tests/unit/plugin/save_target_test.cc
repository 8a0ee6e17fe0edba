// The words for a target, and what is opened for them.
#include "plugin/qemu/save_target.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cerrno>

#include "tests/unit/plugin/fake_qmp.h"

namespace qvmstate::qemu {
namespace {

using ::testing::HasSubstr;
using testing::TemporaryFolder;

TEST(ParseSaveTarget, PathEndsAtTheFirstOffsetAndKeepsItsCommas) {
  struct Case {
    const char *text;
    const char *path;
    std::optional<uint64_t> offset;
  };
  const Case cases[] = {
      {"file:/a", "/a", {}},
      {"file:a b", "a b", {}},
      {"file:/a,b,,c", "/a,b,,c", {}},
      {"file:/a,offset", "/a,offset", {}},
      {"file:/a,Offset=1", "/a,Offset=1", {}},
      {"file:file:x", "file:x", {}},
      {"file:/dev/fdset", "/dev/fdset", {}},
      {"file:/a,offset=0", "/a", 0},
      {"file:/a,offset=4097", "/a", 4097},
      {"file:/a,offset=007", "/a", 7},
      {"file:/a,offset=0x1fF", "/a", 0x1ff},
      {"file:/a,offset=0X10", "/a", 16},
      {"file:/a,offset=3b", "/a", 3},
      {"file:/a,offset=4k", "/a", 4096},
      {"file:/a,offset=4K", "/a", 4096},
      {"file:/a,offset=1.5M", "/a", 1572864},
      {"file:/a,offset=2G", "/a", uint64_t{2} << 30},
      {"file:/a,offset=3T", "/a", uint64_t{3} << 40},
      {"file:/a,offset=9223372036854775807", "/a", INT64_MAX},
  };
  for (const Case &one : cases) {
    const auto target = parse_save_target(one.text);
    ASSERT_TRUE(target) << one.text << ": " << target.error().message;
    EXPECT_EQ(target->kind, SaveTarget::Kind::path) << one.text;
    EXPECT_EQ(target->path, one.path) << one.text;
    EXPECT_EQ(target->offset, one.offset) << one.text;
  }
}

TEST(ParseSaveTarget, FdSetsAndPassedDescriptors) {
  auto target = parse_save_target("file:/dev/fdset/12");
  ASSERT_TRUE(target);
  EXPECT_EQ(target->kind, SaveTarget::Kind::fd_set);
  EXPECT_EQ(target->fd_set, 12U);
  EXPECT_FALSE(target->offset);
  target = parse_save_target("file:/dev/fdset/0,offset=1M");
  ASSERT_TRUE(target);
  EXPECT_EQ(target->fd_set, 0U);
  EXPECT_EQ(target->offset, 1048576U);
  target = parse_save_target("fd");
  ASSERT_TRUE(target);
  EXPECT_EQ(target->kind, SaveTarget::Kind::passed);
  target = parse_save_target("fd,offset=0x1000");
  ASSERT_TRUE(target);
  EXPECT_EQ(target->kind, SaveTarget::Kind::passed);
  EXPECT_EQ(target->offset, 4096U);
}

TEST(ParseSaveTarget, RefusesWhatCannotSeekByName) {
  for (const std::string scheme : {"exec:", "tcp:", "unix:", "fd:", "rdma:", "vsock:"}) {
    const auto target = parse_save_target(scheme + "x");
    ASSERT_FALSE(target) << scheme;
    EXPECT_EQ(target.error().code, ErrorCode::bad_argument);
    EXPECT_EQ(
        target.error().message.find("'" + scheme + "x': a seekable target is required, which '" +
                                    scheme + "' is not; give file:PATH"),
        0U)
        << target.error().message;
  }
}

TEST(ParseSaveTarget, RefusesEverythingElse) {
  const std::pair<std::string, const char *> cases[] = {
      {"", "is no target"},
      {"/a", "is no target"},
      {"File:/a", "is no target"},
      {"fdx", "is no target"},
      {"fd,x", "only ',offset=N' can follow"},
      {"fd,x,offset=1", "only ',offset=N' can follow"},
      {"file:", "has no path"},
      {"file:,offset=1", "has no path"},
      {std::string("file:a\0b", 8), "no zero bytes"},
      {"file:/dev/fdset/", "the number of an fd set"},
      {"file:/dev/fdset/x", "the number of an fd set"},
      {"file:/dev/fdset/-1", "the number of an fd set"},
      {"file:/dev/fdset/1/2", "the number of an fd set"},
      {"file:/dev/fdset/9999999999999999999", "the number of an fd set"},
      {"file:/a,offset=", "the offset ''"},
      {"file:/a,offset=x", "the offset 'x'"},
      {"file:/a,offset=-1", "the offset '-1'"},
      {"file:/a,offset=+1", "the offset '+1'"},
      {"file:/a,offset= 1", "the offset ' 1'"},
      {"file:/a,offset=1 ", "the offset '1 '"},
      {"file:/a,offset=0x", "the offset '0x'"},
      {"file:/a,offset=0x20M", "the offset '0x20M'"},
      {"file:/a,offset=1.5", "the offset '1.5'"},
      {"file:/a,offset=1.5b", "the offset '1.5b'"},
      {"file:/a,offset=1e3", "the offset '1e3'"},
      {"file:/a,offset=10MB", "the offset '10MB'"},
      {"file:/a,offset=nan", "the offset 'nan'"},
      {"file:/a,offset=1,offset=2", "the offset '1,offset=2'"},
      {"file:/a,offset=99999999999999999999", "the offset '99999999999999999999'"},
      {"file:/a,offset=16E", "the offset '16E'"},
      {"file:/a,offset=16.5E", "the offset '16.5E'"},
      {"file:/a,offset=8E", "larger than any file"},
      {"file:/a,offset=0xffffffffffffffff", "larger than any file"},
  };
  for (const auto &[text, words] : cases) {
    const auto target = parse_save_target(text);
    ASSERT_FALSE(target) << text;
    EXPECT_EQ(target.error().code, ErrorCode::bad_argument) << text;
    EXPECT_THAT(target.error().message, HasSubstr(words)) << text;
  }
}

bool is_open(int descriptor) {
  return ::fcntl(descriptor, F_GETFD) >= 0;
}

/// A file, and descriptors of it as somebody would pass them.
struct Fixture {
  TemporaryFolder folder;
  std::string path = folder.file("state");
  testing::FakeQmp server{folder.file("q"), testing::greeting, testing::agree};
  std::unique_ptr<Qmp> qmp = std::move(Qmp::connect(folder.file("q")).value());

  int open(int flags) { return ::open(path.c_str(), O_CREAT | flags, 0600); }
  Result<std::unique_ptr<io::TargetFile>> open_it(const SaveOptions &options,
                                                  unsigned channels = 0) {
    GivenDescriptors given(options);
    return open_save_target(*qmp, ::getpid(), options, channels, given);
  }
};

TEST(OpenSaveTarget, APathWithItsChannelsAndDirectMode) {
  Fixture fixture;
  SaveOptions options;
  options.to = "file:" + fixture.path + ",offset=8k";
  options.direct = io::DirectMode::off;
  auto target = fixture.open_it(options, 3);
  ASSERT_TRUE(target) << target.error().message;
  EXPECT_EQ((*target)->name(), fixture.path);
  EXPECT_EQ((*target)->offset(), 8192U);
  EXPECT_EQ((*target)->channels(), 3U);
  EXPECT_FALSE((*target)->file().backend().direct());
}

TEST(OpenSaveTarget, PassedDescriptorsAreTakenOver) {
  Fixture fixture;
  SaveOptions options;
  options.to = "fd,offset=4k";
  options.fd = fixture.open(O_WRONLY);
  options.direct_fd = fixture.open(O_WRONLY | O_DIRECT);
  if (options.direct_fd < 0) {
    GTEST_SKIP() << "no O_DIRECT in " << fixture.path;
  }
  auto target = fixture.open_it(options);
  ASSERT_TRUE(target) << target.error().message;
  EXPECT_EQ((*target)->name(), "passed descriptors");
  EXPECT_EQ((*target)->offset(), 4096U);
  EXPECT_TRUE(is_open(options.fd));
  EXPECT_TRUE(is_open(options.direct_fd));
  target->reset();
  EXPECT_FALSE(is_open(options.fd));
  EXPECT_FALSE(is_open(options.direct_fd));
}

TEST(OpenSaveTarget, PassedDescriptorsAreClosedByEveryRefusal) {
  Fixture fixture;
  for (const std::string to : {"fd", "fd,x", "file:/nowhere/state"}) {
    SaveOptions options;
    options.to = to;
    options.fd = fixture.open(O_WRONLY);
    options.direct_fd = fixture.open(O_WRONLY);  // without O_DIRECT
    const auto target = fixture.open_it(options);
    ASSERT_FALSE(target) << to;
    EXPECT_FALSE(is_open(options.fd)) << to;
    EXPECT_FALSE(is_open(options.direct_fd)) << to;
  }
}

TEST(GivenDescriptors, WhatWasNotOpenIsNeitherUsedNorClosed) {
  Fixture fixture;
  SaveOptions options;
  options.fd = fixture.open(O_WRONLY);
  options.direct_fd = fixture.open(O_WRONLY);
  ::close(options.direct_fd);
  int newcomer = -1;
  {
    GivenDescriptors given(options);
    newcomer = fixture.open(O_WRONLY);
    ASSERT_EQ(newcomer, options.direct_fd) << "takes the number that is free";
    const auto numbers = given.release();
    ASSERT_FALSE(numbers);
    EXPECT_EQ(numbers.error().message,
              "descriptor " + std::to_string(newcomer) + " is not open (EBADF)");
  }
  EXPECT_TRUE(is_open(newcomer));
  EXPECT_FALSE(is_open(options.fd));
  ::close(newcomer);
}

TEST(GivenDescriptors, TheSameTwiceIsClosedOnce) {
  Fixture fixture;
  SaveOptions options;
  options.fd = options.direct_fd = fixture.open(O_WRONLY);
  {
    GivenDescriptors given(options);
    EXPECT_EQ(given.release().value(), std::vector<int>{options.fd});
  }
  EXPECT_TRUE(is_open(options.fd));
  ::close(options.fd);
}

}  // namespace
}  // namespace qvmstate::qemu
