// Descriptors passed by somebody else: what is refused and how that is said, that each is closed in
// the end, and that reading works with whatever kind was passed.
#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <array>
#include <thread>

#include "qcow2/io/descriptors.h"
#include "qcow2/io/memory_backend.h"
#include "tests/unit/io/support.h"

namespace qvmstate::io {
namespace {

bool is_open(int descriptor) {
  return ::fcntl(descriptor, F_GETFD) >= 0 || errno != EBADF;
}

std::string number(int descriptor) {
  return std::to_string(descriptor);
}

class Adopt : public testing::Test {
 protected:
  Adopt() {
    EXPECT_TRUE(save_contents(file_.path(), contents_));
    const int probe = ::open(file_.path().c_str(), O_RDWR | O_DIRECT | O_CLOEXEC);
    has_direct_ = probe >= 0;
    ::close(probe);
  }
  void SetUp() override {
    if (!has_direct_) {
      GTEST_SKIP() << "no O_DIRECT in " << std::filesystem::temp_directory_path();
    }
  }
  int open(int flags) const {
    const int descriptor = ::open(file_.path().c_str(), flags);
    EXPECT_GE(descriptor, 0);
    return descriptor;
  }
  /// Expects a refusal with that message, after which each of `passed` is closed.
  static void expect_refused(const std::vector<int> &passed, bool writable,
                             const std::string &message, DirectMode mode = DirectMode::automatic) {
    OpenOptions options;
    options.writable = writable;
    options.direct = mode;
    const auto file = File::adopt(passed, options, "given");
    ASSERT_FALSE(file) << message;
    EXPECT_EQ(file.error().message, "given: " + message);
    EXPECT_EQ(file.error().code, ErrorCode::bad_argument);
    for (const int descriptor : passed) {
      EXPECT_FALSE(is_open(descriptor)) << message << ": " << descriptor;
    }
  }

  const TemporaryFile file_;
  const Bytes contents_ = random_bytes(300 * kib + 77, 1);
  bool has_direct_ = false;
};

TEST_F(Adopt, WritesThroughBothAndClosesThemAtTheEnd) {
  for (const int access : {O_WRONLY, O_RDWR}) {
    for (const Engine engine : {Engine::automatic, Engine::threads}) {
      const int buffered = open(access);
      const int direct = open(access | O_DIRECT);
      // In any order: the flags say which is which.
      const int passed[] = {direct, buffered};
      OpenOptions options;
      options.writable = true;
      options.engine = engine;
      auto file = File::adopt(passed, options, "given");
      ASSERT_TRUE(file) << file.error().message;
      EXPECT_TRUE((*file)->backend().direct());
      EXPECT_EQ((*file)->descriptors(), (std::vector<int>{buffered, direct}));
      EXPECT_EQ(::fcntl(buffered, F_GETFD), FD_CLOEXEC);
      EXPECT_EQ(::fcntl(direct, F_GETFD), FD_CLOEXEC);
      const Bytes large = random_bytes(64 * kib, 2 + access);
      const Bytes small = random_bytes(100, 3 + access);
      AlignedMemory memory(large);
      ASSERT_TRUE((*file)->start_write(memory.span(), HostOffset(64 * kib), no_buffer, 0));
      ASSERT_TRUE((*file)->write_at(small, HostOffset(777)));
      ASSERT_TRUE((*file)->sync());
      file->reset();
      EXPECT_FALSE(is_open(buffered));
      EXPECT_FALSE(is_open(direct));
      const Bytes now = load_contents(file_.path()).value();
      EXPECT_TRUE(std::equal(large.begin(), large.end(), now.begin() + 64 * kib));
      EXPECT_TRUE(std::equal(small.begin(), small.end(), now.begin() + 777));
    }
  }
}

TEST_F(Adopt, RefusesAWrongCount) {
  expect_refused({}, true,
                 "0 descriptors were passed; writing needs two, one with O_DIRECT and one without");
  expect_refused({open(O_RDWR | O_DIRECT)}, true,
                 "1 descriptor was passed; writing needs two, one with O_DIRECT and one without");
  expect_refused({open(O_RDWR), open(O_RDWR), open(O_RDWR)}, true,
                 "3 descriptors were passed; writing needs two, one with O_DIRECT and one without");
  expect_refused({}, false,
                 "0 descriptors were passed; reading needs one or two, of two one with O_DIRECT");
  expect_refused({open(O_RDWR), open(O_RDWR), open(O_RDWR)}, false,
                 "3 descriptors were passed; reading needs one or two, of two one with O_DIRECT");
}

TEST_F(Adopt, RefusesWhatIsNotOpenAndNamesIt) {
  const int closed = open(O_RDWR);
  const int first = open(O_RDWR | O_DIRECT);
  ::close(closed);
  expect_refused({first, closed}, true, "descriptor " + number(closed) + " is not open (EBADF)");
  const int second = open(O_RDWR | O_DIRECT);
  expect_refused({-1, second}, true, "descriptor -1 is not open (EBADF)");
}

TEST_F(Adopt, RefusesOneNumberTwice) {
  const int descriptor = open(O_RDWR | O_DIRECT);
  expect_refused({descriptor, descriptor}, true,
                 "descriptor " + number(descriptor) +
                     " was passed twice; open the file twice, once with O_DIRECT and once without");
}

TEST_F(Adopt, RefusesDuplicatesOfOneOpenFile) {
  const int probe = open(O_RDWR);
  const pid_t self = ::getpid();
  const bool kernel_tells = ::syscall(SYS_kcmp, self, self, KCMP_FILE, probe, probe) == 0;
  ::close(probe);
  if (!kernel_tells) {
    GTEST_SKIP() << "kcmp is not allowed here";
  }
  for (const int flag : {0, O_DIRECT}) {
    const int first = open(O_RDWR | flag);
    const int second = ::dup(first);
    expect_refused({first, second}, true,
                   "descriptors " + number(first) + " and " + number(second) +
                       " are duplicates of one open file description; open the file twice, once "
                       "with O_DIRECT and once without");
  }
}

TEST_F(Adopt, RefusesNoneOrTwoWithDirect) {
  for (const bool writable : {true, false}) {
    int first = open(O_RDWR);
    int second = open(O_RDWR);
    expect_refused({first, second}, writable,
                   "neither of descriptors " + number(first) + " and " + number(second) +
                       " has O_DIRECT; exactly one must have it");
    first = open(O_RDWR | O_DIRECT);
    second = open(O_RDWR | O_DIRECT);
    expect_refused({first, second}, writable,
                   "both descriptors " + number(first) + " and " + number(second) +
                       " have O_DIRECT; exactly one must have it");
  }
}

TEST_F(Adopt, RefusesDifferentFilesAndNamesBoth) {
  const TemporaryFile other;
  const int first = open(O_RDWR | O_DIRECT);
  const int second = ::open(other.path().c_str(), O_RDWR);
  struct stat status[2];
  ASSERT_EQ(::fstat(first, &status[0]), 0);
  ASSERT_EQ(::fstat(second, &status[1]), 0);
  OpenOptions options;
  options.writable = true;
  const int passed[] = {first, second};
  const auto file = File::adopt(passed, options, "given");
  ASSERT_FALSE(file);
  const std::string &message = file.error().message;
  EXPECT_NE(message.find("are different files: '" + file_.path() + "' (device "), std::string::npos)
      << message;
  EXPECT_NE(message.find("inode " + std::to_string(status[0].st_ino) + ") and '" + other.path()),
            std::string::npos)
      << message;
  EXPECT_NE(message.find("inode " + std::to_string(status[1].st_ino) + ")"), std::string::npos)
      << message;
  EXPECT_FALSE(is_open(first));
  EXPECT_FALSE(is_open(second));
}

TEST_F(Adopt, RefusesTheWrongAccessMode) {
  int first = open(O_RDWR | O_DIRECT);
  int second = open(O_RDONLY);
  expect_refused(
      {first, second}, true,
      "descriptor " + number(second) + " was opened O_RDONLY; writing needs O_WRONLY or O_RDWR");
  first = open(O_WRONLY | O_DIRECT);
  second = open(O_RDONLY);
  expect_refused(
      {first, second}, false,
      "descriptor " + number(first) + " was opened O_WRONLY; reading needs O_RDONLY or O_RDWR");
  first = open(O_PATH);
  expect_refused({first}, false,
                 "descriptor " + number(first) +
                     " was opened with O_PATH, which allows no reading and no writing");
}

TEST_F(Adopt, RefusesAppending) {
  for (const bool writable : {true, false}) {
    const int first = open(O_RDWR | O_DIRECT);
    const int second = open(O_RDWR | O_APPEND);
    expect_refused({first, second}, writable,
                   "descriptor " + number(second) +
                       " was opened with O_APPEND, which puts every write at the end of the file; "
                       "open it without");
  }
}

TEST_F(Adopt, RefusesWhatCannotSeek) {
  int pipes[2];
  ASSERT_EQ(::pipe(pipes), 0);
  int sockets[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), 0);
  const std::pair<int, std::string> cases[] = {
      {pipes[0], "a pipe"},
      {pipes[1], "a pipe"},
      {sockets[0], "a socket"},
      {sockets[1], "a socket"},
      {::open("/tmp", O_RDONLY | O_DIRECTORY), "a directory"},
      {::open("/dev/null", O_RDWR), "a character device"},
      {::eventfd(0, 0), "no file"},
  };
  for (const auto &[descriptor, kind] : cases) {
    ASSERT_GE(descriptor, 0);
    expect_refused({open(O_RDWR | O_DIRECT), descriptor}, true,
                   "descriptor " + number(descriptor) + " is " + kind +
                       "; a seekable target is required: a regular file or a block device");
  }
}

TEST_F(Adopt, ModeOnNeedsDirectAndModeOffDoesWithout) {
  const int buffered = open(O_RDONLY);
  expect_refused({buffered}, false,
                 "descriptor " + number(buffered) +
                     " has no O_DIRECT; pass one that has, or use --direct off or --direct auto",
                 DirectMode::on);
  const int first = open(O_RDWR);
  const int second = open(O_RDWR | O_DIRECT);
  const int passed[] = {first, second};
  OpenOptions options;
  options.writable = true;
  options.direct = DirectMode::off;
  options.engine = Engine::threads;  // A ring would take the number that becomes free.
  const auto file = File::adopt(passed, options, "given");
  ASSERT_TRUE(file) << file.error().message;
  EXPECT_FALSE((*file)->backend().direct());
  EXPECT_FALSE(is_open(second));
}

/// Reads the whole file in unaligned and aligned pieces, synchronously and not.
void expect_contents(File &file, const Bytes &contents) {
  Bytes small(1001);
  for (uint64_t offset = 1; offset + small.size() <= contents.size(); offset += 77'777) {
    const auto read = file.read_at(small, HostOffset(offset));
    ASSERT_TRUE(read) << read.error().message;
    ASSERT_TRUE(
        std::equal(small.begin(), small.end(), contents.begin() + static_cast<ptrdiff_t>(offset)));
  }
  Bytes whole(contents.size());
  ASSERT_TRUE(file.read_at(whole, HostOffset(0)));
  EXPECT_EQ(whole, contents);
  Bytes past(contents.size() + 10);
  EXPECT_FALSE(file.read_at(past, HostOffset(0)));
  ASSERT_TRUE(file.read_or_zero_at(past, HostOffset(0)));
  EXPECT_TRUE(std::equal(contents.begin(), contents.end(), past.begin()));
  EXPECT_EQ(past.back(), std::byte{0});
  AlignedMemory aligned(64 * kib);
  Bytes unaligned(12'345);
  Bytes tiny(5);
  ASSERT_TRUE(file.start_read(aligned.span(), HostOffset(128 * kib), no_buffer, 1));
  ASSERT_TRUE(file.start_read(unaligned, HostOffset(777), no_buffer, 2));
  ASSERT_TRUE(file.start_read(tiny, HostOffset(13), no_buffer, 3));
  ASSERT_TRUE(file.drain());
  EXPECT_TRUE(
      std::equal(aligned.span().begin(), aligned.span().end(), contents.begin() + 128 * kib));
  EXPECT_TRUE(std::equal(tiny.begin(), tiny.end(), contents.begin() + 13));
  EXPECT_TRUE(std::equal(unaligned.begin(), unaligned.end(), contents.begin() + 777));
  EXPECT_EQ(file.size(), contents.size());
}

TEST_F(Adopt, ReadsWithOneOfEitherKindOrBoth) {
  for (const Engine engine : {Engine::automatic, Engine::threads}) {
    for (const std::vector<int> &flags :
         {std::vector{O_RDONLY}, {O_RDWR}, {O_RDONLY | O_DIRECT}, {O_RDONLY | O_DIRECT, O_RDWR}}) {
      std::vector<int> passed;
      for (const int flag : flags) {
        passed.push_back(open(flag));
      }
      OpenOptions options;
      options.engine = engine;
      auto file = File::adopt(passed, options, "given");
      ASSERT_TRUE(file) << file.error().message;
      expect_contents(**file, contents_);
      file->reset();
      for (const int descriptor : passed) {
        EXPECT_FALSE(is_open(descriptor));
      }
    }
  }
}

TEST_F(Adopt, ReadsWithADirectOneThatCannotBeOpenedAnew) {
  if (::geteuid() != 0) {
    GTEST_SKIP() << "only root can give up the right to open the file";
  }
  for (const Engine engine : {Engine::automatic, Engine::threads}) {
    const int direct = open(O_RDONLY | O_DIRECT);
    ASSERT_EQ(::chmod(file_.path().c_str(), 0), 0);
    Result<std::unique_ptr<File>> file = fail(ErrorCode::io, "not opened");
    std::thread([&] {
      // Of this thread alone: the C library's setfsuid does not reach the others.
      ::syscall(SYS_setfsuid, 65534);
      OpenOptions options;
      options.engine = engine;
      file = File::adopt(std::span(&direct, 1), options, "given");
    }).join();
    ASSERT_TRUE(file) << file.error().message;
    EXPECT_EQ((*file)->descriptors(), std::vector<int>{direct});
    expect_contents(**file, contents_);
    file->reset();
    EXPECT_FALSE(is_open(direct));
  }
}

TEST_F(Adopt, DuplicatesWriteConcurrently) {
  for (const Engine engine : {Engine::automatic, Engine::threads}) {
    const int passed[] = {open(O_WRONLY), open(O_WRONLY | O_DIRECT)};
    auto descriptors = Descriptors::adopt(passed, true, DirectMode::automatic, "given");
    ASSERT_TRUE(descriptors) << descriptors.error().message;
    constexpr size_t channels = 3;
    constexpr size_t blocks = 32;
    const Bytes expected = random_bytes(channels * blocks * 64 * kib, 9);
    std::vector<std::thread> threads;
    std::array<std::string, channels> errors;
    for (size_t channel = 0; channel < channels; ++channel) {
      threads.emplace_back([&, channel] {
        OpenOptions options;
        options.engine = engine;
        auto duplicate = descriptors->duplicate("given");
        auto file = duplicate ? File::over(std::move(*duplicate), options, "given")
                              : tl::unexpected(duplicate.error());
        if (!file) {
          errors[channel] = file.error().message;
          return;
        }
        AlignedMemory memory(blocks * 64 * kib);
        for (size_t i = 0; i < blocks; ++i) {
          // Interleaved, so that a shared file position would mix them up.
          const uint64_t offset = (i * channels + channel) * 64 * kib;
          const auto part = memory.span().subspan(i * 64 * kib, 64 * kib);
          std::copy_n(expected.begin() + static_cast<ptrdiff_t>(offset), part.size(), part.begin());
          if (auto started = (*file)->start_write(part, HostOffset(offset), no_buffer, i);
              !started) {
            errors[channel] = started.error().message;
            return;
          }
        }
        if (auto synced = (*file)->sync(); !synced) {
          errors[channel] = synced.error().message;
        }
      });
    }
    for (std::thread &thread : threads) {
      thread.join();
    }
    for (const std::string &error : errors) {
      EXPECT_EQ(error, "");
    }
    EXPECT_TRUE(is_open(passed[0]));
    EXPECT_EQ(load_contents(file_.path()).value(), expected);
    ASSERT_EQ(::truncate(file_.path().c_str(), 0), 0);
  }
}

}  // namespace
}  // namespace qvmstate::io
