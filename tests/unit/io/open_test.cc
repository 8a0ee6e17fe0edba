// Opening: which descriptor, which engine, what is refused and how that is said.
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <thread>

#include "qcow2/io/descriptors.h"
#include "qcow2/io/memory_backend.h"
#include "tests/unit/io/support.h"

namespace qvmstate::io {
namespace {

using testing::Test;

OpenOptions with(DirectMode direct, bool writable = true) {
  OpenOptions options;
  options.writable = writable;
  options.direct = direct;
  return options;
}

/// Whether an aligned O_DIRECT write and read work in that directory, found without our code.
bool has_direct_io(const std::string &directory) {
  const TemporaryFile temporary(directory);
  const int descriptor = ::open(temporary.path().c_str(), O_RDWR | O_DIRECT | O_CLOEXEC);
  if (descriptor < 0) {
    return false;
  }
  AlignedMemory memory(4096);
  const bool works = ::pwrite(descriptor, memory.span().data(), 4096, 0) == 4096 &&
                     ::pread(descriptor, memory.span().data(), 4096, 0) == 4096;
  ::close(descriptor);
  return works;
}

TEST(Open, DirectModesFollowTheFileSystem) {
  for (const std::string &directory : {std::filesystem::temp_directory_path().string(),
                                       std::string("/dev/shm"), std::string("/proc")}) {
    const bool is_writable = directory != "/proc";
    const bool expected = is_writable && has_direct_io(directory);
    std::optional<TemporaryFile> temporary;
    std::string path = "/proc/version";  // A regular file that no kernel opens with O_DIRECT.
    if (is_writable) {
      temporary.emplace(directory);
      path = temporary->path();
      ASSERT_TRUE(save_contents(path, random_bytes(16 * kib, 1)));
    }
    SCOPED_TRACE(path);
    const auto automatic = File::open(path, with(DirectMode::automatic, is_writable));
    ASSERT_TRUE(automatic) << automatic.error().message;
    EXPECT_EQ((*automatic)->backend().direct(), expected);
    EXPECT_EQ((*automatic)->descriptors().size(), expected ? 2U : 1U);
    const auto off = File::open(path, with(DirectMode::off, is_writable));
    ASSERT_TRUE(off);
    EXPECT_FALSE((*off)->backend().direct());
    EXPECT_EQ((*off)->backend().direct_alignment(), 1U);
    const auto on = File::open(path, with(DirectMode::on, is_writable), "the disk");
    ASSERT_EQ(on.has_value(), expected);
    if (!on) {
      EXPECT_EQ(on.error().code, ErrorCode::not_supported);
      EXPECT_EQ(on.error().message,
                "the disk: cannot open with O_DIRECT: its file system does not allow it; use"
                " --direct off or --direct auto");
    }
  }
}

TEST(Open, DescriptorsAreClosedOnExecAndOfTheRightMode) {
  const TemporaryFile temporary;
  for (const bool writable : {false, true}) {
    const auto file = File::open(temporary.path(), with(DirectMode::automatic, writable));
    ASSERT_TRUE(file);
    for (const int descriptor : (*file)->descriptors()) {
      EXPECT_EQ(::fcntl(descriptor, F_GETFD), FD_CLOEXEC);
      EXPECT_EQ(::fcntl(descriptor, F_GETFL) & O_ACCMODE, writable ? O_RDWR : O_RDONLY);
    }
  }
}

TEST(Open, WritingToAReadOnlyFileIsAnError) {
  const TemporaryFile temporary;
  const auto file = File::open(temporary.path(), with(DirectMode::automatic, false));
  ASSERT_TRUE(file);
  const Bytes bytes(10);
  EXPECT_EQ((*file)->write_at(bytes, HostOffset(0)).error().sys_errno, EBADF);
}

TEST(Open, ProcLinksAreReopened) {
  TemporaryFile temporary;
  const Bytes bytes = random_bytes(8192, 2);
  ASSERT_TRUE(save_contents(temporary.path(), bytes));
  const int descriptor = ::open(temporary.path().c_str(), O_RDWR | O_CLOEXEC);
  ASSERT_GE(descriptor, 0);
  ::unlink(temporary.path().c_str());  // The link leads to it all the same.
  const std::string link =
      "/proc/" + std::to_string(::getpid()) + "/fd/" + std::to_string(descriptor);
  const auto file = File::open(link, with(DirectMode::automatic));
  ASSERT_TRUE(file) << file.error().message;
  ::close(descriptor);
  EXPECT_EQ((*file)->name(), link);
  Bytes read(bytes.size());
  ASSERT_TRUE((*file)->read_at(read, HostOffset(0)));
  EXPECT_EQ(read, bytes);
}

TEST(Open, WhatIsNoFileIsRefusedWithoutWaiting) {
  const TemporaryFile temporary;
  const std::string fifo = temporary.path() + ".fifo";
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  for (const std::string &path : {fifo, std::string("/tmp"), std::string("/dev/null")}) {
    const auto file = File::open(path, with(DirectMode::automatic, false));
    ASSERT_FALSE(file) << path;
    EXPECT_EQ(file.error().code, ErrorCode::bad_argument);
    EXPECT_EQ(file.error().message,
              path + ": cannot open: it is neither a regular file nor a block device");
  }
  ::unlink(fifo.c_str());
  const auto missing = File::open(fifo, with(DirectMode::automatic), "shown");
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code, ErrorCode::not_found);
  EXPECT_EQ(missing.error().message,
            "shown: cannot open for reading and writing: No such file or directory");
}

TEST(Open, TransfersTakeTheDirectDescriptorOnlyIfAllIsAligned) {
  const TemporaryFile temporary;
  auto descriptors = Descriptors::open(temporary.path(), true, DirectMode::automatic, "file");
  ASSERT_TRUE(descriptors);
  if (descriptors->direct() < 0) {
    GTEST_SKIP() << "no O_DIRECT in " << std::filesystem::temp_directory_path();
  }
  const uint32_t alignment = descriptors->direct_alignment();
  EXPECT_GE(alignment, 2U);
  EXPECT_LE(alignment, 4096U);
  EXPECT_EQ(alignment & (alignment - 1), 0U);
  AlignedMemory memory(8192);
  const BackendOp aligned = {OpKind::write, memory.span().data(), 4096, 4096, no_buffer, 0};
  EXPECT_TRUE(descriptors->takes_direct(aligned));
  BackendOp op = aligned;
  op.data += 1;
  EXPECT_FALSE(descriptors->takes_direct(op));
  op = aligned;
  op.offset += alignment / 2;
  EXPECT_FALSE(descriptors->takes_direct(op));
  op = aligned;
  op.bytes -= 1;
  EXPECT_FALSE(descriptors->takes_direct(op));
}

/// Makes io_uring_setup fail for this thread and those it starts.
bool forbid_io_uring(int sys_errno) {
  sock_filter code[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_io_uring_setup, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | static_cast<unsigned>(sys_errno)),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  sock_fprog program = {std::size(code), code};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

TEST(Open, WithoutIoUringThreadsTakeOverAndAskedForItSaysWhy) {
  const TemporaryFile temporary;
  const std::pair<int, std::string> refusals[] = {
      {EPERM, "forbidden"}, {ENOSYS, "the kernel has no io_uring"}, {ENOMEM, "locked memory"}};
  for (const auto &[sys_errno, cause] : refusals) {
    bool forbidden = false;
    std::string engine;
    Error error;
    std::thread([&, sys_errno = sys_errno] {
      forbidden = forbid_io_uring(sys_errno);
      OpenOptions options = with(DirectMode::automatic);
      const auto automatic = File::open(temporary.path(), options);
      engine = automatic ? (*automatic)->backend().name() : automatic.error().message;
      options.engine = Engine::uring;
      const auto uring = File::open(temporary.path(), options);
      error = uring ? Error{} : uring.error();
    }).join();
    if (!forbidden) {
      GTEST_SKIP() << "seccomp filters cannot be set here";
    }
    EXPECT_EQ(engine, "threads");
    EXPECT_EQ(error.sys_errno, sys_errno);
    EXPECT_NE(error.message.find(cause), std::string::npos) << error.message;
    EXPECT_EQ(error.message.rfind(temporary.path() + ": cannot use io_uring", 0), 0U)
        << error.message;
  }
}

TEST(Open, EngineIsWhatWasAskedFor) {
  const TemporaryFile temporary;
  OpenOptions options = with(DirectMode::automatic);
  options.engine = Engine::threads;
  const auto threads = File::open(temporary.path(), options);
  ASSERT_TRUE(threads);
  EXPECT_EQ((*threads)->backend().name(), "threads");
  options.engine = Engine::uring;
  const auto uring = File::open(temporary.path(), options);
  if (!uring) {
    GTEST_SKIP() << uring.error().message;
  }
  EXPECT_EQ((*uring)->backend().name(), "io_uring");
}

TEST(Open, BlockDevicesHaveTheirSizeAndCannotBeResized) {
  const TemporaryFile backing;
  ASSERT_EQ(::truncate(backing.path().c_str(), 1 * mib), 0);
  const LoopDevice device(backing.path());
  if (device.path().empty()) {
    GTEST_SKIP() << "no loop device can be made here";
  }
  const auto opened = File::open(device.path(), with(DirectMode::automatic));
  ASSERT_TRUE(opened) << opened.error().message;
  File &file = **opened;
  EXPECT_TRUE(file.backend().is_block_device());
  EXPECT_EQ(file.size(), 1 * mib);
  Bytes bytes = random_bytes(64 * kib, 3);
  AlignedMemory memory(bytes);
  ASSERT_TRUE(file.start_write(memory.span(), HostOffset(64 * kib), no_buffer, 0));
  ASSERT_TRUE(file.sync());
  const auto punched = file.punch_hole(HostOffset(68 * kib), 4 * kib);
  ASSERT_TRUE(punched) << punched.error().message;
  if (*punched) {
    std::fill_n(bytes.begin() + 4 * kib, 4 * kib, std::byte{0});
  }
  Bytes read(bytes.size());
  ASSERT_TRUE(file.read_at(read, HostOffset(64 * kib)));
  EXPECT_EQ(read, bytes);
  EXPECT_EQ(file.punch_hole(HostOffset(68 * kib), 100), false);
  EXPECT_EQ(file.resize(2 * mib).error().sys_errno, ENOTSUP);

  const auto read_only = File::open(device.path(), with(DirectMode::automatic, false));
  ASSERT_TRUE(read_only) << read_only.error().message;
  ASSERT_TRUE((*read_only)->read_at(read, HostOffset(64 * kib)));
  EXPECT_EQ(read, bytes);
}

}  // namespace
}  // namespace qvmstate::io
