#include "qcow2/locks.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>

#include "test_images.h"

namespace qvmstate::qcow2 {
namespace {

using testing::HasSubstr;

/// A descriptor of an open file of its own.
class Descriptor {
 public:
  explicit Descriptor(const std::string &path, int flags = O_RDWR)
      : number_(open(path.c_str(), flags | O_CLOEXEC)) {
    EXPECT_GE(number_, 0);
  }
  ~Descriptor() { close(number_); }
  Descriptor(const Descriptor &) = delete;
  Descriptor &operator=(const Descriptor &) = delete;
  int get() const { return number_; }

 private:
  int number_;
};

class Locks : public testing::Test {
 protected:
  void SetUp() override { test::write_file(path_, test::minimal_image(16)); }

  Result<ImageLock> take(const Descriptor &descriptor, LockRole role) {
    return ImageLock::take(std::array{descriptor.get()}, role, "image");
  }
  /// The locked bytes of 100 to 103 and 200 to 203.
  std::vector<uint64_t> locked_bytes() {
    const Descriptor other(path_, O_RDONLY);
    std::vector<uint64_t> locked;
    for (const uint64_t byte : {100, 101, 102, 103, 200, 201, 202, 203}) {
      const auto result = is_locked_by_other(other.get(), byte);
      EXPECT_TRUE(result);
      if (result && *result) {
        locked.push_back(byte);
      }
    }
    return locked;
  }
  void expect_conflict(const Result<ImageLock> &lock, const char *why) {
    ASSERT_FALSE(lock);
    EXPECT_EQ(lock.error().code, ErrorCode::locked);
    EXPECT_THAT(lock.error().message, HasSubstr("image: is in use by another process"));
    EXPECT_THAT(lock.error().message, HasSubstr(why));
    EXPECT_THAT(lock.error().message, HasSubstr("stop it first"));
  }

  test::ScratchFolder folder_;
  const std::string path_ = folder_.path("disk.qcow2");
};

TEST_F(Locks, RolesLockTheBytesThatQemuDoes) {
  const Descriptor descriptor(path_);
  {
    const auto lock = take(descriptor, LockRole::writer);
    ASSERT_TRUE(lock) << lock.error().message;
    EXPECT_EQ(locked_bytes(), (std::vector<uint64_t>{100, 101, 103, 201, 203}));
    const auto own = is_locked_by_other(descriptor.get(), 101);
    ASSERT_TRUE(own);
    EXPECT_FALSE(*own);
  }
  EXPECT_EQ(locked_bytes(), std::vector<uint64_t>{});
  auto lock = take(descriptor, LockRole::stable_reader);
  ASSERT_TRUE(lock) << lock.error().message;
  EXPECT_EQ(locked_bytes(), (std::vector<uint64_t>{100, 201, 203}));
  lock->release();
  EXPECT_EQ(locked_bytes(), std::vector<uint64_t>{});
  lock->release();
}

TEST_F(Locks, WritersExcludeEverybody) {
  const Descriptor first(path_), second(path_);
  auto held = take(first, LockRole::writer);
  ASSERT_TRUE(held) << held.error().message;
  expect_conflict(take(second, LockRole::writer), "it holds the write permission, byte 101");
  expect_conflict(take(second, LockRole::stable_reader), "it holds the write permission, byte 101");
  // A failed attempt leaves nothing of its own behind.
  held->release();
  EXPECT_EQ(locked_bytes(), std::vector<uint64_t>{});
  EXPECT_TRUE(take(second, LockRole::writer));
}

TEST_F(Locks, ReadersShareAndKeepWritersOut) {
  const Descriptor first(path_), second(path_, O_RDONLY), third(path_);
  const auto one = take(first, LockRole::stable_reader);
  ASSERT_TRUE(one) << one.error().message;
  const auto two = take(second, LockRole::stable_reader);
  ASSERT_TRUE(two) << two.error().message;
  expect_conflict(take(third, LockRole::writer),
                  "it does not share the write permission, byte 201");
}

TEST_F(Locks, AllDescriptorsHoldTheLocks) {
  const Descriptor other(path_);
  auto buffered = std::make_unique<Descriptor>(path_);
  auto direct = std::make_unique<Descriptor>(path_, O_RDONLY);
  auto lock =
      ImageLock::take(std::array{buffered->get(), direct->get()}, LockRole::writer, "image");
  ASSERT_TRUE(lock) << lock.error().message;
  // To each of the two, the other one's locks are somebody else's.
  for (const int descriptor : {buffered->get(), direct->get()}) {
    const auto locked = is_locked_by_other(descriptor, 101);
    ASSERT_TRUE(locked);
    EXPECT_TRUE(*locked);
  }
  // The lock lasts as long as the object, not as the descriptors that it was given.
  buffered.reset();
  direct.reset();
  EXPECT_FALSE(take(other, LockRole::writer));
  ImageLock moved = std::move(*lock);
  EXPECT_FALSE(take(other, LockRole::writer));
  moved = ImageLock();
  EXPECT_TRUE(take(other, LockRole::writer));
}

TEST_F(Locks, AConflictOnTheFirstDescriptorLeavesTheSecondUnlocked) {
  const Descriptor holder(path_), first(path_), second(path_);
  auto held = take(holder, LockRole::stable_reader);
  ASSERT_TRUE(held);
  EXPECT_FALSE(ImageLock::take(std::array{first.get(), second.get()}, LockRole::writer, "image"));
  held->release();
  EXPECT_EQ(locked_bytes(), std::vector<uint64_t>{});
}

TEST_F(Locks, AnExclusiveLockOfAnotherProgramIsAConflict) {
  const Descriptor other(path_), ours(path_);
  struct flock range = {};
  range.l_type = F_WRLCK;
  range.l_start = 100;
  range.l_len = 1;
  ASSERT_EQ(fcntl(other.get(), F_OFD_SETLK, &range), 0);
  expect_conflict(take(ours, LockRole::stable_reader), "byte 100");
}

TEST_F(Locks, NoDescriptorsMeansNothingToLock) {
  EXPECT_TRUE(ImageLock::take({}, LockRole::writer, "fake"));
}

TEST_F(Locks, BadDescriptorsAreErrors) {
  const auto lock = ImageLock::take(std::array{-1}, LockRole::writer, "image");
  ASSERT_FALSE(lock);
  EXPECT_THAT(lock.error().message, HasSubstr("image: cannot be locked"));
  EXPECT_FALSE(is_locked_by_other(-1, 100));
}

class LocksAgainstQemu : public Locks {
 protected:
  void SetUp() override {
    if (!test::have_tool("qemu-img") || !test::have_tool("qemu-io")) {
      GTEST_SKIP() << "qemu-img or qemu-io is missing";
    }
    Locks::SetUp();
  }
};

TEST_F(LocksAgainstQemu, OurWriterLockKeepsQemuOut) {
  const Descriptor descriptor(path_);
  auto lock = take(descriptor, LockRole::writer);
  ASSERT_TRUE(lock) << lock.error().message;
  for (const auto &words :
       std::vector<std::vector<std::string>>{{"qemu-io", "-f", "qcow2", "-c", "quit", path_},
                                             {"qemu-io", "-r", "-f", "qcow2", "-c", "quit", path_},
                                             {"qemu-img", "info", path_}}) {
    const auto refused = test::run_command(words);
    EXPECT_NE(refused.status, 0);
    EXPECT_THAT(refused.output, HasSubstr("lock"));
  }
  EXPECT_EQ(test::run_command({"qemu-img", "info", "-U", path_}).status, 0);
  lock->release();
  EXPECT_EQ(test::run_command({"qemu-io", "-f", "qcow2", "-c", "quit", path_}).status, 0);
}

TEST_F(LocksAgainstQemu, OurReaderLockAdmitsReadersOnly) {
  const Descriptor descriptor(path_, O_RDONLY);
  const auto lock = take(descriptor, LockRole::stable_reader);
  ASSERT_TRUE(lock) << lock.error().message;
  const auto info = test::run_command({"qemu-img", "info", path_});
  EXPECT_EQ(info.status, 0) << info.output;
  const auto refused = test::run_command({"qemu-io", "-f", "qcow2", "-c", "quit", path_});
  EXPECT_NE(refused.status, 0);
  EXPECT_THAT(refused.output, HasSubstr("lock"));
}

TEST_F(LocksAgainstQemu, AWritingQemuKeepsUsOut) {
  test::RunningCommand qemu_io({"qemu-io", "-f", "qcow2", path_});
  ASSERT_TRUE(qemu_io.wait_for_output("qemu-io> "));
  const Descriptor descriptor(path_);
  expect_conflict(take(descriptor, LockRole::writer), "it holds the ");
  expect_conflict(take(descriptor, LockRole::stable_reader), "it holds the ");
  qemu_io.finish();
  EXPECT_TRUE(take(descriptor, LockRole::writer));
}

TEST_F(LocksAgainstQemu, AReadingQemuAdmitsReadersOnly) {
  test::RunningCommand qemu_io({"qemu-io", "-r", "-f", "qcow2", path_});
  ASSERT_TRUE(qemu_io.wait_for_output("qemu-io> "));
  const Descriptor descriptor(path_);
  EXPECT_TRUE(take(descriptor, LockRole::stable_reader));
  expect_conflict(take(descriptor, LockRole::writer),
                  "it does not share the write permission, byte 201");
}

}  // namespace
}  // namespace qvmstate::qcow2
