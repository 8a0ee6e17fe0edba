// The plain file as a target: there as a whole after finish(), and nothing of it otherwise.
#include "qcow2/io/target_file.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <atomic>
#include <csignal>
#include <set>
#include <thread>

#include "qcow2/io/memory_backend.h"
#include "tests/unit/io/support.h"

namespace qvmstate::io {
namespace {

namespace fs = std::filesystem;

class Target : public testing::Test {
 protected:
  Target() {
    std::string name = fs::temp_directory_path() / "qvmstate-target-XXXXXX";
    folder_ = ::mkdtemp(name.data());
    path_ = folder_ + "/state";
  }
  ~Target() override { fs::remove_all(folder_); }

  /// Everything in the folder, hidden or not.
  std::set<std::string> names() const {
    std::set<std::string> all;
    for (const auto &entry : fs::directory_iterator(folder_)) {
      all.insert(entry.path().filename());
    }
    return all;
  }
  static Bytes read(const std::string &path) { return load_contents(path).value_or(Bytes()); }
  static mode_t mode_of(const std::string &path) {
    struct stat status = {};
    EXPECT_EQ(::stat(path.c_str(), &status), 0);
    return status.st_mode & 07777;
  }
  static ino_t inode_of(const std::string &path) {
    struct stat status = {};
    EXPECT_EQ(::stat(path.c_str(), &status), 0);
    return status.st_ino;
  }

  std::string folder_;
  std::string path_;
  const Bytes old_ = random_bytes(100'000, 1);
  const Bytes new_ = random_bytes(3 * 64 * kib + 1000, 2);
};

Result<std::unique_ptr<TargetFile>> open_target(const std::string &path,
                                                std::optional<uint64_t> offset = {},
                                                TargetOptions options = {}) {
  return TargetFile::open(path, offset, options);
}

/// Writes the bytes at the offset of the target, the aligned part asynchronously.
Result<void> write_all(TargetFile &target, const Bytes &bytes) {
  const size_t whole = round_down(bytes.size(), 4096);
  AlignedMemory memory(Bytes(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(whole)));
  File &file = target.file();
  auto started = file.start_write(memory.span(), HostOffset(target.offset()), no_buffer, 0);
  QV_TRY(file.drain());
  QV_TRY(started);
  return file.write_at(std::span(bytes).subspan(whole), HostOffset(target.offset() + whole));
}

void expect_saved(TargetFile &target, const Bytes &bytes) {
  const auto written = write_all(target, bytes);
  ASSERT_TRUE(written) << written.error().message;
  EXPECT_EQ(target.bytes_written(), bytes.size());
  const auto finished = target.finish(target.offset() + bytes.size());
  ASSERT_TRUE(finished) << finished.error().message;
}

TEST_F(Target, ANewFileAppearsAsAWholeForItsOwnerOnly) {
  auto target = open_target(path_);
  ASSERT_TRUE(target) << target.error().message;
  EXPECT_EQ((*target)->name(), path_);
  ASSERT_TRUE(write_all(**target, new_));
  EXPECT_FALSE(fs::exists(path_));
  ASSERT_TRUE((*target)->finish(new_.size()));
  EXPECT_EQ(read(path_), new_);
  EXPECT_EQ(mode_of(path_), 0600U);
  target->reset();
  EXPECT_EQ(names(), std::set<std::string>{"state"});
  EXPECT_EQ(read(path_), new_);
}

TEST_F(Target, WhatIsThereStaysUntilFinishAndThenIsReplaced) {
  ASSERT_TRUE(save_contents(path_, old_));
  ASSERT_EQ(::chmod(path_.c_str(), 0640), 0);
  const ino_t old_inode = inode_of(path_);
  auto target = open_target(path_);
  ASSERT_TRUE(target) << target.error().message;
  ASSERT_TRUE(write_all(**target, new_));
  EXPECT_EQ(read(path_), old_);
  EXPECT_EQ(inode_of(path_), old_inode);
  ASSERT_TRUE((*target)->finish(new_.size()));
  EXPECT_EQ(read(path_), new_);
  EXPECT_NE(inode_of(path_), old_inode);
  EXPECT_EQ(mode_of(path_), 0640U) << "whoever could read the old one can read the new one";
  EXPECT_EQ(names(), std::set<std::string>{"state"});
}

TEST_F(Target, OwnerOfTheReplacedFileIsKept) {
  if (::geteuid() != 0) {
    GTEST_SKIP() << "only root can give files away";
  }
  ASSERT_TRUE(save_contents(path_, old_));
  ASSERT_EQ(::chown(path_.c_str(), 1234, 5678), 0);
  auto target = open_target(path_);
  ASSERT_TRUE(target);
  expect_saved(**target, new_);
  struct stat status = {};
  ASSERT_EQ(::stat(path_.c_str(), &status), 0);
  EXPECT_EQ(status.st_uid, 1234U);
  EXPECT_EQ(status.st_gid, 5678U);
}

TEST_F(Target, FinishCutsAtItsEnd) {
  auto target = open_target(path_);
  ASSERT_TRUE(target);
  ASSERT_TRUE(write_all(**target, new_));
  ASSERT_TRUE((*target)->finish(5000));
  EXPECT_EQ(read(path_), Bytes(new_.begin(), new_.begin() + 5000));
  auto longer = open_target(path_);
  ASSERT_TRUE(longer);
  ASSERT_TRUE(write_all(**longer, old_));
  ASSERT_TRUE((*longer)->finish(old_.size() + 10));
  Bytes expected = old_;
  expected.resize(old_.size() + 10);
  EXPECT_EQ(read(path_), expected);
}

TEST_F(Target, AbortAndDestructionLeaveNothingBehind) {
  for (const bool exists : {false, true}) {
    for (const bool by_destructor : {false, true}) {
      if (exists) {
        ASSERT_TRUE(save_contents(path_, old_));
      }
      auto target = open_target(path_);
      ASSERT_TRUE(target);
      ASSERT_TRUE(write_all(**target, new_));
      if (!by_destructor) {
        EXPECT_TRUE((*target)->abort());
        EXPECT_TRUE((*target)->abort());
      }
      target->reset();
      EXPECT_EQ(names(), exists ? std::set<std::string>{"state"} : std::set<std::string>());
      EXPECT_EQ(read(path_), exists ? old_ : Bytes());
    }
  }
}

/// Files can grow to so many bytes only, as on a full disk but with EFBIG.
class SizeLimit {
 public:
  explicit SizeLimit(uint64_t bytes) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    handler_ = std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {bytes, before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~SizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, handler_);
  }
  SizeLimit(const SizeLimit &) = delete;
  SizeLimit &operator=(const SizeLimit &) = delete;

 private:
  rlimit before_ = {};
  void (*handler_)(int) = SIG_DFL;
};

TEST_F(Target, AFailureInTheMiddleFailsFinishToo) {
  for (const std::optional<uint64_t> offset : {std::optional<uint64_t>(), {4096}}) {
    ASSERT_TRUE(save_contents(path_, old_));
    {
      auto target = open_target(path_, offset);
      ASSERT_TRUE(target);
      const SizeLimit limit(64 * kib);
      const auto written = write_all(**target, new_);
      ASSERT_FALSE(written);
      EXPECT_EQ(written.error().code, ErrorCode::no_space) << written.error().message;
      const auto finished = (*target)->finish(offset.value_or(0) + new_.size());
      ASSERT_FALSE(finished);
      EXPECT_EQ(finished.error().message, written.error().message);
    }
    EXPECT_EQ(names(), std::set<std::string>{"state"});
    Bytes expected = old_;
    expected.resize(offset.value_or(old_.size()));
    EXPECT_EQ(read(path_), expected);
  }
}

TEST_F(Target, AnErrorOfAChannelFailsFinish) {
  TargetOptions options;
  options.channels = 2;
  auto target = open_target(path_, {}, options);
  ASSERT_TRUE(target);
  {
    const SizeLimit limit(64 * kib);
    ASSERT_FALSE((*target)->channel(1).write_at(new_, HostOffset(64 * kib)));
  }
  ASSERT_FALSE((*target)->finish(new_.size()));
  target->reset();
  EXPECT_EQ(names(), std::set<std::string>());
}

TEST_F(Target, AKilledSaverLeavesNothingBehind) {
  ASSERT_TRUE(save_contents(path_, old_));
  const int nameless = ::open(folder_.c_str(), O_TMPFILE | O_RDWR, 0600);
  if (nameless < 0) {
    GTEST_SKIP() << "no files without a name in " << folder_;
  }
  ::close(nameless);
  const pid_t child = ::fork();
  if (child == 0) {
    TargetOptions options;
    options.engine = Engine::uring;  // no threads in a forked child
    auto target = open_target(path_, {}, options);
    if (target && write_all(**target, new_)) {
      ::raise(SIGKILL);
    }
    ::_exit(1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  if (!WIFSIGNALED(status)) {
    GTEST_SKIP() << "no io_uring";
  }
  EXPECT_EQ(names(), std::set<std::string>{"state"});
  EXPECT_EQ(read(path_), old_);
}

TEST_F(Target, ASymlinkIsFollowedAndStays) {
  const std::string folder = folder_ + "/elsewhere";
  fs::create_directory(folder);
  for (const bool exists : {false, true}) {
    if (exists) {
      ASSERT_TRUE(save_contents(folder + "/real", old_));
    } else {
      fs::create_symlink("elsewhere/second", path_);
      fs::create_symlink("real", folder + "/second");
    }
    auto target = open_target(path_);
    ASSERT_TRUE(target) << target.error().message;
    expect_saved(**target, new_);
    EXPECT_TRUE(fs::is_symlink(path_));
    EXPECT_TRUE(fs::is_symlink(folder + "/second"));
    EXPECT_FALSE(fs::is_symlink(folder + "/real"));
    EXPECT_EQ(read(folder + "/real"), new_);
  }
  const std::string loop = folder_ + "/loop";
  fs::create_symlink("loop", loop);
  const auto target = open_target(loop);
  ASSERT_FALSE(target);
  EXPECT_EQ(target.error().sys_errno, ELOOP) << target.error().message;
}

TEST_F(Target, ALinkToAFileWithoutANameIsRefusedUnlessWrittenInto) {
  ASSERT_TRUE(save_contents(path_, old_));
  const int descriptor = ::open(path_.c_str(), O_RDWR | O_CLOEXEC);
  ::unlink(path_.c_str());
  const std::string link = "/proc/self/fd/" + std::to_string(descriptor);
  const auto refused = open_target(link);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().message,
            link +
                ": cannot be replaced: the link leads to a file that has no name; give "
                "file:PATH,offset=0 to write into it");
  auto target = open_target(link, 0);
  ASSERT_TRUE(target) << target.error().message;
  expect_saved(**target, new_);
  EXPECT_EQ(read(link), new_);
  ::close(descriptor);
}

TEST_F(Target, WithAnOffsetTheFileIsWrittenIntoFromThereOn) {
  ASSERT_TRUE(save_contents(path_, old_));
  ASSERT_EQ(::chmod(path_.c_str(), 0644), 0);
  const ino_t inode = inode_of(path_);
  auto target = open_target(path_, 8192);
  ASSERT_TRUE(target) << target.error().message;
  EXPECT_EQ((*target)->offset(), 8192U);
  EXPECT_EQ(fs::file_size(path_), 8192U) << "what lay behind is cut off at once";
  const Bytes small(new_.begin(), new_.begin() + 20'000);
  expect_saved(**target, small);
  Bytes expected(old_.begin(), old_.begin() + 8192);
  expected.insert(expected.end(), small.begin(), small.end());
  EXPECT_EQ(read(path_), expected);
  EXPECT_EQ(inode_of(path_), inode);
  EXPECT_EQ(mode_of(path_), 0644U);
}

TEST_F(Target, WithAnOffsetAbortCutsBack) {
  // Shorter than the offset: it gets its own size back.
  for (const uint64_t bytes : {uint64_t{100'000}, uint64_t{5000}, uint64_t{0}}) {
    const Bytes before(old_.begin(), old_.begin() + static_cast<ptrdiff_t>(bytes));
    ASSERT_TRUE(save_contents(path_, before));
    auto target = open_target(path_, 12'345);
    ASSERT_TRUE(target) << target.error().message;
    ASSERT_TRUE(write_all(**target, new_));
    ASSERT_TRUE((*target)->abort());
    EXPECT_EQ(read(path_),
              Bytes(old_.begin(),
                    old_.begin() + static_cast<ptrdiff_t>(std::min<uint64_t>(bytes, 12'345))));
  }
}

TEST_F(Target, WithAnOffsetAMissingFileIsMadeAndRemovedAgain) {
  {
    auto target = open_target(path_, 4096);
    ASSERT_TRUE(target) << target.error().message;
    expect_saved(**target, new_);
    EXPECT_EQ(mode_of(path_), 0600U);
    Bytes expected(4096);
    expected.insert(expected.end(), new_.begin(), new_.end());
    EXPECT_EQ(read(path_), expected);
  }
  EXPECT_TRUE(fs::exists(path_));
  fs::remove(path_);
  {
    auto target = open_target(path_, 4096);
    ASSERT_TRUE(target);
    EXPECT_TRUE(fs::exists(path_));
  }
  EXPECT_FALSE(fs::exists(path_));
  {
    auto target = open_target(path_, 4096);
    ASSERT_TRUE(target);
    fs::remove(path_);
    ASSERT_TRUE(save_contents(path_, old_));
  }
  EXPECT_EQ(read(path_), old_) << "somebody else's file has that name now";
}

TEST_F(Target, RefusesWhatCannotSeek) {
  const std::string fifo = folder_ + "/fifo";
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  for (const std::string &path : {fifo, folder_, std::string("/dev/null")}) {
    for (const std::optional<uint64_t> offset : {std::optional<uint64_t>(), {0}}) {
      const auto target = open_target(path, offset);
      ASSERT_FALSE(target) << path;
      EXPECT_EQ(target.error().code, ErrorCode::bad_argument);
      EXPECT_EQ(target.error().message,
                path +
                    ": is neither a regular file nor a block device; a seekable target is "
                    "required");
    }
  }
}

TEST_F(Target, RefusesAFileThatSomebodyHasLocked) {
  ASSERT_TRUE(save_contents(path_, old_));
  const int image = ::open(path_.c_str(), O_RDWR | O_CLOEXEC);
  struct flock lock = {};
  lock.l_type = F_RDLCK;  // as QEMU locks the bytes 100 to 203 of an image
  lock.l_whence = SEEK_SET;
  lock.l_start = 100;
  lock.l_len = 1;
  ASSERT_EQ(::fcntl(image, F_OFD_SETLK, &lock), 0);
  for (const std::optional<uint64_t> offset : {std::optional<uint64_t>(), {0}}) {
    const auto target = open_target(path_, offset);
    ASSERT_FALSE(target);
    EXPECT_EQ(target.error().code, ErrorCode::locked) << target.error().message;
  }
  EXPECT_EQ(read(path_), old_);
  ::close(image);
  EXPECT_TRUE(open_target(path_));
}

TEST_F(Target, RefusesMissingFoldersAndTooLargeOffsets) {
  for (const std::optional<uint64_t> offset : {std::optional<uint64_t>(), {4096}}) {
    const auto target = open_target(folder_ + "/nowhere/state", offset);
    ASSERT_FALSE(target);
    EXPECT_EQ(target.error().code, ErrorCode::not_found) << target.error().message;
  }
  EXPECT_FALSE(open_target(""));
  const auto target = open_target(path_, UINT64_MAX);
  ASSERT_FALSE(target);
  EXPECT_EQ(target.error().message, path_ + ": the offset is larger than any file");
  EXPECT_EQ(names(), std::set<std::string>());
}

TEST_F(Target, RefusesAMountedFileBeforeAnythingIsWritten) {
  ASSERT_TRUE(save_contents(path_, old_));
  ASSERT_TRUE(save_contents(folder_ + "/below", old_));
  bool is_mounted = false;
  Error error;
  std::thread([&] {
    is_mounted =
        ::unshare(CLONE_NEWNS) == 0 &&
        ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
        ::mount((folder_ + "/below").c_str(), path_.c_str(), nullptr, MS_BIND, nullptr) == 0;
    const auto target = open_target(path_);
    error = target ? Error{} : target.error();
  }).join();
  if (!is_mounted) {
    GTEST_SKIP() << "cannot mount here: not root, or in a chroot";
  }
  EXPECT_EQ(error.code, ErrorCode::not_supported);
  EXPECT_EQ(error.message, path_ +
                               ": cannot be replaced: something is mounted there; give "
                               "file:PATH,offset=0 to write into it");
}

/// In a file system of that type, mounted for the calling thread alone.
bool mount_here(const std::string &folder, const char *type) {
  return ::unshare(CLONE_NEWNS) == 0 &&
         ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
         ::mount("none", folder.c_str(), type, 0, nullptr) == 0;
}

TEST_F(Target, WithoutDirectIoAutoFallsBackAndOnRefuses) {
  bool is_mounted = false;
  std::thread([&] {
    is_mounted = mount_here(folder_, "ramfs");
    if (!is_mounted) {
      return;
    }
    for (const std::optional<uint64_t> offset : {std::optional<uint64_t>(), {4096}}) {
      TargetOptions options;
      options.channels = 1;
      options.direct = DirectMode::on;
      const auto refused = open_target(path_, offset, options);
      ASSERT_FALSE(refused);
      EXPECT_EQ(refused.error().message,
                path_ +
                    ": cannot open with O_DIRECT: its file system does not allow it; use --direct "
                    "off or --direct auto");
      EXPECT_EQ(names(), std::set<std::string>()) << "also what was made is gone";
      options.direct = DirectMode::automatic;
      auto target = open_target(path_, offset, options);
      ASSERT_TRUE(target) << target.error().message;
      EXPECT_FALSE((*target)->file().backend().direct());
      EXPECT_FALSE((*target)->channel(0).backend().direct());
      expect_saved(**target, new_);
      fs::remove(path_);
    }
  }).join();
  if (!is_mounted) {
    GTEST_SKIP() << "cannot mount here: not root, or in a chroot";
  }
}

TEST_F(Target, TmpfsTakesWhatTheKernelAllows) {
  const std::string path = "/dev/shm/qvmstate-target-" + std::to_string(::getpid());
  const int probe = ::open((path + ".probe").c_str(), O_RDWR | O_CREAT | O_DIRECT, 0600);
  const bool has_direct = probe >= 0;  // since Linux 6.6
  ::close(probe);
  ::unlink((path + ".probe").c_str());
  TargetOptions options;
  auto automatic = open_target(path, {}, options);
  ASSERT_TRUE(automatic) << automatic.error().message;
  EXPECT_EQ((*automatic)->file().backend().direct(), has_direct);
  expect_saved(**automatic, new_);
  EXPECT_EQ(read(path), new_);
  options.direct = DirectMode::on;
  EXPECT_EQ(open_target(path, {}, options).has_value(), has_direct);
  EXPECT_EQ(read(path), new_);
  options.direct = DirectMode::off;
  auto off = open_target(path, {}, options);
  ASSERT_TRUE(off);
  EXPECT_FALSE((*off)->file().backend().direct());
  off->reset();
  ::unlink(path.c_str());
}

TEST_F(Target, WhereFilesNeedANameAHiddenOneIsUsedAndRemoved) {
  bool is_mounted = false;
  std::thread([&] {
    // overlayfs before 6.3 and vfat have no O_TMPFILE; without /proc the name is needed as well.
    is_mounted = ::unshare(CLONE_NEWNS) == 0 &&
                 ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
                 ::mount("none", "/proc", "tmpfs", 0, nullptr) == 0;
    if (!is_mounted) {
      return;
    }
    {
      auto target = open_target(path_);
      ASSERT_TRUE(target) << target.error().message;
      ASSERT_EQ(names().size(), 1U);
      EXPECT_TRUE(names().begin()->starts_with(".qvmstate-")) << *names().begin();
      EXPECT_EQ(mode_of(folder_ + "/" + *names().begin()), 0600U);
      ASSERT_TRUE(write_all(**target, new_));
    }
    EXPECT_EQ(names(), std::set<std::string>());
    auto target = open_target(path_);
    ASSERT_TRUE(target);
    expect_saved(**target, new_);
    EXPECT_EQ(names(), std::set<std::string>{"state"});
    EXPECT_EQ(read(path_), new_);
  }).join();
  if (!is_mounted) {
    GTEST_SKIP() << "cannot mount here: not root, or in a chroot";
  }
}

TEST_F(Target, ChannelsWriteAtTheSameTime) {
  for (const Engine engine : {Engine::automatic, Engine::threads}) {
    TargetOptions options;
    options.engine = engine;
    options.channels = 4;
    auto target = open_target(path_, {}, options);
    ASSERT_TRUE(target) << target.error().message;
    ASSERT_EQ((*target)->channels(), 4U);
    const Bytes expected = random_bytes(64 * 64 * kib, 7);
    AlignedMemory memory(expected);
    std::vector<std::thread> threads;
    std::atomic<unsigned> failed = 0;
    for (unsigned channel = 0; channel < 4; ++channel) {
      threads.emplace_back([&, channel] {
        File &file = (*target)->channel(channel);
        for (uint64_t block = channel; block < 64; block += 4) {
          const uint64_t offset = block * 64 * kib;
          failed += !file.start_write(memory.span().subspan(offset, 64 * kib), HostOffset(offset),
                                      no_buffer, block);
        }
        failed += !file.drain();
      });
    }
    for (std::thread &thread : threads) {
      thread.join();
    }
    EXPECT_EQ(failed, 0U);
    ASSERT_TRUE((*target)->finish(expected.size()));
    EXPECT_EQ((*target)->bytes_written(), expected.size());
    EXPECT_EQ(read(path_), expected);
  }
}

TEST_F(Target, PassedDescriptorsAreWrittenInPlaceAndClosed) {
  for (const bool finishes : {true, false}) {
    ASSERT_TRUE(save_contents(path_, old_));
    const int passed[] = {::open(path_.c_str(), O_WRONLY),
                          ::open(path_.c_str(), O_WRONLY | O_DIRECT)};
    if (passed[1] < 0) {
      GTEST_SKIP() << "no O_DIRECT in " << folder_;
    }
    auto target = TargetFile::adopt(passed, 8192, {}, "given");
    ASSERT_TRUE(target) << target.error().message;
    EXPECT_EQ((*target)->name(), "given");
    EXPECT_EQ(fs::file_size(path_), 8192U);
    EXPECT_TRUE((*target)->file().backend().direct());
    Bytes expected(old_.begin(), old_.begin() + 8192);
    if (finishes) {
      expect_saved(**target, new_);
      expected.insert(expected.end(), new_.begin(), new_.end());
    } else {
      ASSERT_TRUE(write_all(**target, new_));
    }
    target->reset();
    EXPECT_EQ(read(path_), expected);
    for (const int descriptor : passed) {
      EXPECT_EQ(::fcntl(descriptor, F_GETFD), -1);
      EXPECT_EQ(errno, EBADF);
    }
  }
}

TEST_F(Target, RefusedDescriptorsAreClosedAndTheFileIsAsItWas) {
  ASSERT_TRUE(save_contents(path_, old_));
  const int buffered = ::open(path_.c_str(), O_WRONLY);
  const auto single = TargetFile::adopt(std::span(&buffered, 1), 0, {}, "given");
  ASSERT_FALSE(single);
  EXPECT_EQ(::fcntl(buffered, F_GETFD), -1);
  const int passed[] = {::open(path_.c_str(), O_WRONLY),
                        ::open(path_.c_str(), O_WRONLY | O_DIRECT)};
  const auto too_large = TargetFile::adopt(passed, UINT64_MAX, {}, "given");
  ASSERT_FALSE(too_large);
  EXPECT_EQ(::fcntl(passed[0], F_GETFD), -1);
  EXPECT_EQ(read(path_), old_);
}

TEST_F(Target, RoomIsThatOfTheFileSystem) {
  auto target = open_target(path_);
  ASSERT_TRUE(target);
  EXPECT_TRUE((*target)->check_room(1 * mib));
  const auto room = (*target)->check_room(uint64_t{1} << 60);
  ASSERT_FALSE(room);
  EXPECT_EQ(room.error().code, ErrorCode::no_space);
}

TEST_F(Target, ABlockDeviceIsWrittenInPlaceUpToItsSize) {
  const std::string backing = folder_ + "/backing";
  Bytes contents = random_bytes(1 * mib, 5);
  ASSERT_TRUE(save_contents(backing, contents));
  const LoopDevice device(backing);
  if (device.path().empty()) {
    GTEST_SKIP() << "no loop device can be made here";
  }
  {
    auto target = open_target(device.path(), 64 * kib);
    ASSERT_TRUE(target) << target.error().message;
    EXPECT_TRUE((*target)->is_block_device());
    EXPECT_TRUE((*target)->check_room(960 * kib));
    const auto room = (*target)->check_room(960 * kib + 1);
    ASSERT_FALSE(room);
    EXPECT_EQ(room.error().message,
              device.path() +
                  ": the device has 1048576 bytes, and 983041 bytes at offset 65536 do "
                  "not fit");
    expect_saved(**target, new_);
  }
  { ASSERT_TRUE(open_target(device.path())) << "aborted, and untouched"; }
  std::ranges::copy(new_, contents.begin() + 64 * kib);
  EXPECT_EQ(read(backing), contents);
  const auto beyond = open_target(device.path(), 2 * mib);
  ASSERT_FALSE(beyond);
  EXPECT_EQ(beyond.error().code, ErrorCode::no_space);
  const int exclusive = ::open(device.path().c_str(), O_RDWR | O_EXCL | O_CLOEXEC);
  ASSERT_GE(exclusive, 0);
  const auto mounted = open_target(device.path());
  ::close(exclusive);
  ASSERT_FALSE(mounted);
  EXPECT_EQ(mounted.error().message,
            device.path() + ": the device is in use; is it mounted? give another");
}

}  // namespace
}  // namespace qvmstate::io
