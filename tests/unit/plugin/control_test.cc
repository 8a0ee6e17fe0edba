#include "plugin/qemu/control.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <memory>
#include <thread>

#include "plugin/qemu/save_target.h"
#include "tests/unit/plugin/fake_qmp.h"

namespace qvmstate::qemu {
namespace {

using ::testing::HasSubstr;

class ControlTest : public ::testing::Test {
 protected:
  ControlTest() : wake_(::eventfd(0, EFD_CLOEXEC)), path_(folder_.file("c")) {
    operations_.save = [this](const SaveOptions &options, const Observer &observer) {
      return save_(options, observer);
    };
    operations_.remove = [](const std::string &name, const Observer &) -> Result<DeleteReport> {
      return fail(ErrorCode::not_found, "no '" + name + "'");
    };
    auto server = ControlServer::listen(path_);
    if (!server) {
      std::abort();
    }
    thread_ = std::thread([this, server = std::move(*server)]() mutable {
      server.serve(operations_, wake_.get(), end_);
    });
  }
  ~ControlTest() override {
    end_ = true;
    const uint64_t one = 1;
    if (::write(wake_.get(), &one, sizeof one) != sizeof one) {
      std::abort();
    }
    thread_.join();
  }
  /// Sends raw bytes, and returns the first answer line.
  std::string exchange(const std::string &bytes) {
    auto socket = connect_unix(path_, "control socket");
    EXPECT_TRUE(socket);
    (void)send_all(socket->get(), bytes, Clock::now() + std::chrono::seconds(5));
    ::shutdown(socket->get(), SHUT_WR);
    LineReader reader(socket->get(), 1 << 20);
    return reader.next(Clock::now() + std::chrono::seconds(5)).value_or("(closed)");
  }

  testing::TemporaryFolder folder_;
  Descriptor wake_;
  std::string path_;
  std::function<Result<SaveReport>(const SaveOptions &, const Observer &)> save_ =
      [](const SaveOptions &, const Observer &) -> Result<SaveReport> {
    return fail(ErrorCode::exists, "taken");
  };
  ControlOperations operations_;
  std::atomic<bool> end_ = false;
  std::thread thread_;
};

TEST_F(ControlTest, OptionsAndReportArriveWhole) {
  SaveOptions seen;
  save_ = [&](const SaveOptions &options, const Observer &observer) -> Result<SaveReport> {
    seen = options;
    observer.progress({"writing", 1, 2, 3, 0.5});
    observer.warning("careful");
    SaveReport report;
    report.name = options.name;
    report.ram_bytes = uint64_t{1} << 40;
    report.pause_seconds = 1.25;
    report.pauses_seconds = {1.25, 0.5};
    report.writes_served = 12;
    report.writes_delayed = 3;
    report.disks.push_back({"n0", "/a", "7", true, 99});
    report.warnings.push_back("w");
    return report;
  };
  SaveOptions options;
  options.name = "sn\"ap \xc3\xa9";
  options.replace = true;
  options.allow_bitmaps = true;
  options.live = true;
  options.vmstate_node = "n0";
  options.direct = io::DirectMode::off;
  options.engine = io::Engine::threads;
  options.depth = 3;
  options.rate_limit_bytes_per_second = 12345;
  std::string phases;
  std::string warnings;
  Observer observer;
  observer.progress = [&](const Progress &progress) { phases += progress.phase; };
  observer.warning = [&](const std::string &warning) { warnings += warning; };
  auto report = save_by_control(path_, options, observer);
  ASSERT_TRUE(report) << report.error().message;
  EXPECT_EQ(seen.name, options.name);
  EXPECT_TRUE(seen.replace);
  EXPECT_TRUE(seen.allow_bitmaps);
  EXPECT_TRUE(seen.live);
  EXPECT_EQ(seen.vmstate_node, "n0");
  EXPECT_EQ(seen.direct, io::DirectMode::off);
  EXPECT_EQ(seen.engine, io::Engine::threads);
  EXPECT_EQ(seen.depth, 3U);
  EXPECT_EQ(seen.rate_limit_bytes_per_second, 12345U);
  EXPECT_EQ(report->ram_bytes, uint64_t{1} << 40);
  EXPECT_EQ(report->pause_seconds, 1.25);
  EXPECT_EQ(report->pauses_seconds, (std::vector<double>{1.25, 0.5}));
  EXPECT_EQ(report->writes_served, 12U);
  EXPECT_EQ(report->writes_delayed, 3U);
  ASSERT_EQ(report->disks.size(), 1U);
  EXPECT_EQ(report->disks[0].metadata_bytes, 99U);
  EXPECT_EQ(phases, "writing");
  EXPECT_EQ(warnings, "careful");
}

TEST_F(ControlTest, TargetOptionsAndReportArriveWhole) {
  SaveOptions seen;
  save_ = [&](const SaveOptions &options, const Observer &) -> Result<SaveReport> {
    seen = options;
    SaveReport report;
    report.layout = "mapped-ram";
    report.target = "/nowhere/state";
    report.channels = 7;
    report.target_bytes = uint64_t{1} << 41;
    return report;
  };
  SaveOptions options;
  options.to = "file:/nowhere/a,b,offset=4k";
  options.layout = SaveLayout::mapped_ram;
  options.sparse_bitmap = true;
  options.channels = 64;
  auto report = save_by_control(path_, options, {});
  ASSERT_TRUE(report) << report.error().message;
  EXPECT_EQ(seen.name, "");
  EXPECT_EQ(seen.to, options.to);
  EXPECT_EQ(seen.layout, SaveLayout::mapped_ram);
  EXPECT_TRUE(seen.sparse_bitmap);
  EXPECT_EQ(seen.channels, 64U);
  EXPECT_EQ(seen.fd, -1);
  EXPECT_EQ(seen.direct_fd, -1);
  EXPECT_EQ(report->layout, "mapped-ram");
  EXPECT_EQ(report->target, "/nowhere/state");
  EXPECT_EQ(report->channels, 7U);
  EXPECT_EQ(report->target_bytes, uint64_t{1} << 41);
  for (const SaveLayout layout : {SaveLayout::automatic, SaveLayout::legacy}) {
    options = {};
    options.name = "x";
    options.layout = layout;
    ASSERT_TRUE(save_by_control(path_, options, {}));
    EXPECT_EQ(seen.layout, layout);
    EXPECT_FALSE(seen.sparse_bitmap);
    EXPECT_EQ(seen.channels, 0U);
    EXPECT_EQ(seen.to, "");
  }
}

TEST_F(ControlTest, ABaseAndWhatIsSharedWithItArriveWhole) {
  SaveOptions seen;
  save_ = [&](const SaveOptions &options, const Observer &) -> Result<SaveReport> {
    seen = options;
    SaveReport report;
    report.layout = "stream-aligned";
    report.base = options.base;
    report.group_bytes = 65536;
    report.written_groups = 5;
    report.shared_groups = uint64_t{1} << 40;
    report.read_groups = 6;
    report.tracked_groups = uint64_t{1} << 41;
    report.untracked = "of a whim";
    return report;
  };
  SaveOptions options;
  options.name = "x";
  options.base = "y";
  options.layout = SaveLayout::stream_aligned;
  const auto report = save_by_control(path_, options, {});
  ASSERT_TRUE(report) << report.error().message;
  EXPECT_EQ(seen.base, "y");
  EXPECT_EQ(seen.layout, SaveLayout::stream_aligned);
  EXPECT_EQ(report->layout, "stream-aligned");
  EXPECT_EQ(report->base, "y");
  EXPECT_EQ(report->group_bytes, 65536U);
  EXPECT_EQ(report->written_groups, 5U);
  EXPECT_EQ(report->shared_groups, uint64_t{1} << 40);
  EXPECT_EQ(report->read_groups, 6U);
  EXPECT_EQ(report->tracked_groups, uint64_t{1} << 41);
  EXPECT_EQ(report->untracked, "of a whim");
}

TEST(ControlMessages, WhatIsNotUsedIsNotSentToAnOlderPlugin) {
  SaveOptions options;
  options.name = "x";
  const Json json = to_json(options);
  for (const char *key : {"layout", "sparse-bitmap", "channels", "to", "descriptors",
                          "allow-bitmaps", "base", "live"}) {
    EXPECT_FALSE(json.contains(key)) << key;
  }
}

TEST_F(ControlTest, ARelativePathIsTheClients) {
  std::string seen;
  save_ = [&](const SaveOptions &options, const Observer &) -> Result<SaveReport> {
    seen = options.to;
    return SaveReport();
  };
  SaveOptions options;
  options.to = "file:a,offset=1";
  ASSERT_TRUE(save_by_control(path_, options, {}));
  const std::unique_ptr<char, void (*)(void *)> here(::get_current_dir_name(), std::free);
  EXPECT_EQ(seen, "file:" + std::string(here.get()) + "/a,offset=1");
  options.to = "file:/dev/fdset/3";
  ASSERT_TRUE(save_by_control(path_, options, {}));
  EXPECT_EQ(seen, options.to);
}

bool is_open(int descriptor) {
  return ::fcntl(descriptor, F_GETFD) >= 0;
}

TEST_F(ControlTest, DescriptorsArriveInOrderAndAreGivenAway) {
  // The client and the plugin are one process here, so numbers can be compared.
  const std::string paths[] = {folder_.file("plain"), folder_.file("direct")};
  ino_t inodes[2] = {};
  int received[2] = {-1, -1};
  save_ = [&](const SaveOptions &options, const Observer &) -> Result<SaveReport> {
    received[0] = options.fd;
    received[1] = options.direct_fd;
    for (int i = 0; i < 2; ++i) {
      struct stat status = {};
      inodes[i] = ::fstat(received[i], &status) == 0 ? status.st_ino : 0;
    }
    EXPECT_EQ(options.to, "fd,offset=8");
    EXPECT_EQ(::fcntl(received[0], F_GETFD), FD_CLOEXEC);
    const GivenDescriptors given(options);
    return SaveReport();
  };
  SaveOptions options;
  options.to = "fd,offset=8";
  options.fd = ::open(paths[0].c_str(), O_WRONLY | O_CREAT, 0600);
  options.direct_fd = ::open(paths[1].c_str(), O_WRONLY | O_CREAT, 0600);
  const auto report = save_by_control(path_, options, {});
  ASSERT_TRUE(report) << report.error().message;
  for (int i = 0; i < 2; ++i) {
    struct stat status = {};
    ASSERT_EQ(::stat(paths[i].c_str(), &status), 0);
    EXPECT_EQ(inodes[i], status.st_ino);
    EXPECT_FALSE(is_open(received[i]));
  }
  EXPECT_NE(received[0], options.fd);
  EXPECT_FALSE(is_open(options.fd));
  EXPECT_FALSE(is_open(options.direct_fd));
}

TEST_F(ControlTest, DescriptorsAreClosedAlsoWhenNobodyListens) {
  SaveOptions options;
  options.to = "fd";
  options.fd = ::open("/dev/null", O_RDWR);
  options.direct_fd = ::open("/dev/null", O_RDWR);
  ASSERT_FALSE(save_by_control(folder_.file("nobody"), options, {}));
  EXPECT_FALSE(is_open(options.fd));
  EXPECT_FALSE(is_open(options.direct_fd));
  const auto closed = save_by_control(path_, options, {});
  ASSERT_FALSE(closed);
  EXPECT_THAT(closed.error().message, HasSubstr("is not open (EBADF)"));
}

/// Descriptors of this process, to see that none leaks.
size_t count_open() {
  size_t count = 0;
  for (int i = 0; i < 1024; ++i) {
    count += is_open(i);
  }
  return count;
}

TEST_F(ControlTest, DescriptorsThatNobodyWantsAreClosed) {
  const std::string save = "{\"execute\":\"save\",\"arguments\":";
  const std::pair<std::string, size_t> requests[] = {
      {save + "{\"name\":\"x\"}}\n", 2},
      {save + "{\"name\":\"x\",\"colour\":1}}\n", 2},
      {save + "{\"to\":\"fd\",\"descriptors\":2}}\n", 1},
      {save + "{\"to\":\"fd\",\"descriptors\":1}}\n", 1},
      {save + "{\"to\":\"fd\",\"descriptors\":2}}\n", 0},
      {save + "{\"to\":\"file:/f\",\"descriptors\":2}}\n", 2},
      {"{\"execute\":\"fly\"}\n", 2},
  };
  const int two[] = {wake_.get(), wake_.get()};
  // Only the server's thread opens and closes anything meanwhile; the socket is the last to go.
  const size_t before = count_open();
  for (const auto &[request, count] : requests) {
    {
      auto socket = connect_unix(path_, "control socket");
      ASSERT_TRUE(socket);
      ASSERT_TRUE(send_all(socket->get(), request, Clock::now() + std::chrono::seconds(5),
                           std::span(two).first(count)));
      ::shutdown(socket->get(), SHUT_WR);
      LineReader reader(socket->get(), 1 << 20);
      EXPECT_THAT(reader.next(Clock::now() + std::chrono::seconds(5)).value_or("(closed)"),
                  HasSubstr("\"class\":\"bad-argument\""))
          << request;
      EXPECT_FALSE(reader.next(Clock::now() + std::chrono::seconds(5))) << "until it hangs up";
    }
    for (int i = 0; i < 200 && count_open() != before; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    EXPECT_EQ(count_open(), before) << request;
  }
}

TEST_F(ControlTest, ErrorsKeepTheirCode) {
  SaveOptions options;
  options.name = "x";
  auto report = save_by_control(path_, options, {});
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code, ErrorCode::exists);
  EXPECT_EQ(report.error().message, "taken");
}

/// Reports progress until it is cancelled.
Result<SaveReport> save_until_cancelled(const SaveOptions &, const Observer &observer) {
  for (int i = 0; i < 500; ++i) {
    observer.progress({"writing", 1, 2, 3, 0.5});
    if (*observer.cancelled) {
      return fail(ErrorCode::cancelled, "cancelled");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return fail(ErrorCode::io, "never cancelled");
}

TEST_F(ControlTest, AHangUpCancels) {
  std::atomic<bool> was_cancelled = false;
  save_ = [&](const SaveOptions &options, const Observer &observer) {
    auto result = save_until_cancelled(options, observer);
    was_cancelled = result.error().code == ErrorCode::cancelled;
    return result;
  };
  {
    auto socket = connect_unix(path_, "control socket");
    ASSERT_TRUE(socket);
    ASSERT_TRUE(send_all(socket->get(), "{\"execute\":\"save\",\"arguments\":{\"name\":\"x\"}}\n",
                         Clock::now() + std::chrono::seconds(5)));
    LineReader reader(socket->get(), 1 << 20);
    ASSERT_TRUE(reader.next(Clock::now() + std::chrono::seconds(5)));
  }
  for (int i = 0; i < 200 && !was_cancelled; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  EXPECT_TRUE(was_cancelled);
}

TEST_F(ControlTest, TheClientsCancelArrivesAndIsAnswered) {
  save_ = save_until_cancelled;
  std::atomic<bool> cancelled = false;
  Observer observer;
  observer.cancelled = &cancelled;
  observer.progress = [&](const Progress &) { cancelled = true; };
  SaveOptions options;
  options.name = "x";
  auto report = save_by_control(path_, options, observer);
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code, ErrorCode::cancelled);
}

TEST_F(ControlTest, SurvivesHostileInput) {
  const std::string requests[] = {
      "\n",
      "null\n",
      "[]\n",
      "\xff\xfe\n",
      "{\"execute\":7}\n",
      "{\"execute\":\"save\",\"arguments\":[1]}\n",
      "{\"execute\":\"save\"}\n",
      "{\"execute\":\"save\",\"arguments\":{\"name\":5}}\n",
      "{\"execute\":\"save\",\"arguments\":{\"name\":\"\"}}\n",
      "{\"execute\":\"save\",\"arguments\":{\"name\":\"x\",\"depth\":-1}}\n",
      "{\"execute\":\"save\",\"arguments\":{\"name\":\"x\",\"depth\":99999}}\n",
      "{\"execute\":\"save\",\"arguments\":{\"name\":\"x\",\"buffers\":1}}\n",
      "{\"execute\":\"save\",\"arguments\":{\"name\":\"x\",\"direct\":\"maybe\"}}\n",
      "{\"execute\":\"save\",\"arguments\":{\"name\":\"x\",\"colour\":\"red\"}}\n",
      "{\"execute\":\"save\",\"arguments\":{\"name\":\"x\",\"layout\":\"best\"}}\n",
      "{\"execute\":\"save\",\"arguments\":{\"name\":\"x\",\"layout\":1}}\n",
      "{\"execute\":\"save\",\"arguments\":{\"name\":\"x\",\"channels\":65}}\n",
      "{\"execute\":\"save\",\"arguments\":{\"name\":\"x\",\"channels\":4294967297}}\n",
      "{\"execute\":\"save\",\"arguments\":{\"name\":\"x\",\"sparse-bitmap\":true}}\n",
      "{\"execute\":\"save\",\"arguments\":{\"name\":\"x\",\"to\":\"file:/f\"}}\n",
      "{\"execute\":\"save\",\"arguments\":{\"to\":\"file:/f\",\"replace\":true}}\n",
      "{\"execute\":\"save\",\"arguments\":{\"to\":\"exec:cat\"}}\n",
      "{\"execute\":\"save\",\"arguments\":{\"to\":5}}\n",
      "{\"execute\":\"fly\"}\n",
      std::string(20'000, '[') + "\n",
  };
  for (const std::string &request : requests) {
    EXPECT_THAT(exchange(request), HasSubstr("\"class\":\"bad-argument\"")) << request;
  }
  EXPECT_EQ(exchange(std::string(200'000, 'x')), "(closed)");
  EXPECT_EQ(exchange("half a line"), "(closed)");
  EXPECT_THAT(exchange("{\"execute\":\"version\"}\n"), HasSubstr("\"return\""));
}

TEST_F(ControlTest, IsForItsUserOnly) {
  struct stat status;
  ASSERT_EQ(::stat(path_.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0600U);
}

// Also where the modes of the file and its folder let him in.
TEST_F(ControlTest, AnotherUserIsRefused) {
  if (::geteuid() != 0) {
    GTEST_SKIP() << "only root can become another user";
  }
  constexpr uid_t nobody = 65534;
  ASSERT_EQ(::chmod(folder_.file("").c_str(), 0755), 0);
  const auto connect_as_nobody = [&] {
    // Of this thread alone, unlike setresuid() of the C library: the server stays root.
    ::syscall(SYS_setresuid, nobody, nobody, 0);
    auto socket = connect_unix(path_, "control socket");
    ::syscall(SYS_setresuid, 0, 0, 0);
    return socket;
  };
  // The kernel keeps him out.
  const auto kept_out = connect_as_nobody();
  ASSERT_FALSE(kept_out);
  EXPECT_EQ(kept_out.error().code, ErrorCode::permission);
  // So do we.
  ASSERT_EQ(::chmod(path_.c_str(), 0666), 0);
  const auto socket = connect_as_nobody();
  ASSERT_TRUE(socket) << socket.error().message;
  LineReader reader(socket->get(), 1 << 20);
  EXPECT_THAT(reader.next(Clock::now() + std::chrono::seconds(5)).value_or("(closed)"),
              HasSubstr("\"class\":\"permission\""));
}

TEST(Control, RefusesAFolderThatOthersCanWrite) {
  const testing::TemporaryFolder folder;
  const std::string inner = folder.file("inner");
  ASSERT_EQ(::mkdir(inner.c_str(), 0700), 0);
  for (const mode_t mode : {0770, 0707, 0777}) {
    ASSERT_EQ(::chmod(inner.c_str(), mode), 0);
    const auto server = ControlServer::listen(inner + "/c");
    ASSERT_FALSE(server) << std::oct << mode;
    EXPECT_EQ(server.error().code, ErrorCode::permission);
  }
  for (const mode_t mode : {01777, 0755, 0700}) {
    ASSERT_EQ(::chmod(inner.c_str(), mode), 0);
    EXPECT_TRUE(ControlServer::listen(inner + "/c")) << std::oct << mode;
  }
  if (::geteuid() == 0) {
    ASSERT_EQ(::chown(inner.c_str(), 65534, 65534), 0);
    EXPECT_FALSE(ControlServer::listen(inner + "/c"));
  }
}

TEST_F(ControlTest, RefusesAPathThatIsTaken) {
  auto second = ControlServer::listen(path_);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, ErrorCode::exists);
  std::ofstream(folder_.file("file")) << "precious";
  auto file = ControlServer::listen(folder_.file("file"));
  ASSERT_FALSE(file);
  EXPECT_THAT(file.error().message, HasSubstr("no socket"));
  EXPECT_FALSE(ControlServer::listen(std::string(200, 'x')));
}

TEST(Control, ReplacesAStaleSocket) {
  const testing::TemporaryFolder folder;
  { ASSERT_TRUE(ControlServer::listen(folder.file("c"))); }
  struct stat status;
  ASSERT_EQ(::lstat(folder.file("c").c_str(), &status), 0);
  EXPECT_TRUE(ControlServer::listen(folder.file("c")));
}

}  // namespace
}  // namespace qvmstate::qemu
