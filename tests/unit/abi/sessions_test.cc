// Several sessions; images that somebody uses; descriptors in place of a path.

#include <fcntl.h>
#include <unistd.h>

#include <thread>

#include "host.h"

namespace qvmstate::abi::test {
namespace {

constexpr off_t lock_byte_write = 101;  // held by who writes to an image

TEST(Sessions, TwoImagesAtOnce) {
  const ScratchImage images[2];
  const auto save_and_load = [](const ScratchImage &image, uint32_t seed) {
    Ram ram;
    ram.add("ram0", 8 * 1024 * 1024).fill(seed);
    const OpenSession session(image.path(), true);
    for (const uint32_t layout : {QVMSTATE_LAYOUT_LEGACY, QVMSTATE_LAYOUT_MAPPED_RAM}) {
      const std::string name = "state-" + std::to_string(layout);
      save_all(session.get(), save_options(name.c_str(), layout), ram, {});
      std::map<std::string, Blob> loaded;
      load_all(session.get(), load_options(name.c_str()), loaded);
      expect_same_ram(loaded, ram);
    }
  };
  std::thread first([&] { save_and_load(images[0], 1); });
  std::thread second([&] { save_and_load(images[1], 2); });
  first.join();
  second.join();
  images[0].check();
  images[1].check();
}

TEST(Sessions, TheSameImageTwice) {
  const ScratchImage image;
  qvmstate_error error;
  qvmstate_session *second = nullptr;
  for (const bool first_writes : {true, false}) {
    const OpenSession first(image.path(), first_writes);
    const qvmstate_session_options writing = session_options(image.path(), true);
    EXPECT_REFUSED(api().session_open(&writing, &second, &error), QVMSTATE_LOCKED, image.path());
    EXPECT_EQ(second, nullptr);
    const qvmstate_session_options reading = session_options(image.path(), false);
    if (first_writes) {
      EXPECT_REFUSED(api().session_open(&reading, &second, &error), QVMSTATE_LOCKED, image.path());
    } else {
      ASSERT_OK(api().session_open(&reading, &second, &error));
      api().session_close(second);
    }
  }
  // Nothing stays behind.
  const OpenSession again(image.path(), true);
}

/// What somebody else's lock on that byte is; F_UNLCK: there is none.
int lock_seen_by_others(const std::string &path) {
  const int descriptor = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  struct flock range = {};
  range.l_type = F_WRLCK;
  range.l_whence = SEEK_SET;
  range.l_start = lock_byte_write;
  range.l_len = 1;
  EXPECT_EQ(::fcntl(descriptor, F_OFD_GETLK, &range), 0);
  ::close(descriptor);
  return range.l_type;
}

TEST(Sessions, LocksOfOthers) {
  const ScratchImage image;
  const int other = ::open(image.path().c_str(), O_RDWR | O_CLOEXEC);
  ASSERT_GE(other, 0);
  struct flock range = {};
  range.l_type = F_RDLCK;
  range.l_whence = SEEK_SET;
  range.l_start = lock_byte_write;
  range.l_len = 1;
  ASSERT_EQ(::fcntl(other, F_OFD_SETLK, &range), 0);
  qvmstate_error error;
  qvmstate_session *session = nullptr;
  for (const bool write : {true, false}) {
    const qvmstate_session_options options = session_options(image.path(), write);
    EXPECT_REFUSED(api().session_open(&options, &session, &error), QVMSTATE_LOCKED,
                   "in use by another process");
  }
  ::close(other);
  {
    const OpenSession ours(image.path(), true);
    EXPECT_EQ(lock_seen_by_others(image.path()), F_RDLCK);
  }
  EXPECT_EQ(lock_seen_by_others(image.path()), F_UNLCK);
}

class Descriptors : public testing::Test {
 protected:
  Descriptors() {
    buffered = ::open(image.path().c_str(), O_RDWR | O_CLOEXEC);
    direct = ::open(image.path().c_str(), O_RDWR | O_CLOEXEC | O_DIRECT);
    EXPECT_GE(buffered, 0);
    if (direct < 0) {
      ::close(buffered);
    }
  }
  ~Descriptors() override {
    ::close(buffered);
    ::close(direct);
  }
  void SetUp() override {
    if (direct < 0) {
      GTEST_SKIP() << "the file system of " << image.path() << " has no O_DIRECT";
    }
  }
  qvmstate_session_options options(const std::vector<int> &fds, bool write) {
    qvmstate_session_options options = {};
    options.size = sizeof options;
    options.flags = write ? QVMSTATE_SESSION_WRITE : 0;
    options.fds = fds.data();
    options.fd_count = static_cast<uint32_t>(fds.size());
    return options;
  }
  ScratchImage image;
  int buffered = -1;
  int direct = -1;
  qvmstate_error error = {};
};

TEST_F(Descriptors, SaveAndLoad) {
  Ram ram;
  ram.add("ram0", 3 * 1024 * 1024).fill(1);
  const std::vector<int> both = {direct, buffered};
  for (const uint32_t layout : {QVMSTATE_LAYOUT_LEGACY, QVMSTATE_LAYOUT_MAPPED_RAM}) {
    const std::string name = "state-" + std::to_string(layout);
    {
      const OpenSession session(options(both, true));
      save_all(session.get(), save_options(name.c_str(), layout), ram, {});
    }
    for (const std::vector<int> &fds : {both, {buffered}, {direct}}) {
      const OpenSession session(options(fds, false));
      std::map<std::string, Blob> loaded;
      load_all(session.get(), load_options(name.c_str()), loaded);
      expect_same_ram(loaded, ram);
    }
  }
  // They are the host's still.
  EXPECT_GE(::fcntl(buffered, F_GETFL), 0);
  EXPECT_GE(::fcntl(direct, F_GETFL), 0);
  image.check();
}

TEST_F(Descriptors, Refused) {
  qvmstate_session *session = nullptr;
  const auto refused = [&](const std::vector<int> &fds, int code, const char *text) {
    const qvmstate_session_options given = options(fds, true);
    EXPECT_REFUSED(api().session_open(&given, &session, &error), code, text);
  };
  refused({buffered}, QVMSTATE_BAD_ARGUMENT, "two");
  refused({buffered, buffered}, QVMSTATE_BAD_ARGUMENT, "duplicates");
  const int readable = ::open(image.path().c_str(), O_RDONLY | O_CLOEXEC);
  refused({readable, direct}, QVMSTATE_BAD_ARGUMENT, "O_RDWR");
  ::close(readable);

  // The same open files, in which no lock can tell two sessions apart.
  const std::vector<int> both = {buffered, direct};
  const OpenSession first(options(both, true));
  refused(both, QVMSTATE_LOCKED, "another session of this process");
  const qvmstate_session_options by_path = session_options(image.path(), true);
  EXPECT_REFUSED(api().session_open(&by_path, &session, &error), QVMSTATE_LOCKED, "session");
}

}  // namespace
}  // namespace qvmstate::abi::test
