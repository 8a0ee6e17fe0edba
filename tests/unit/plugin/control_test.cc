#include "plugin/qemu/control.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <fstream>
#include <thread>

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
    report.disks.push_back({"n0", "/a", "7", true, 99});
    report.warnings.push_back("w");
    return report;
  };
  SaveOptions options;
  options.name = "sn\"ap \xc3\xa9";
  options.replace = true;
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
  EXPECT_EQ(seen.vmstate_node, "n0");
  EXPECT_EQ(seen.direct, io::DirectMode::off);
  EXPECT_EQ(seen.engine, io::Engine::threads);
  EXPECT_EQ(seen.depth, 3U);
  EXPECT_EQ(seen.rate_limit_bytes_per_second, 12345U);
  EXPECT_EQ(report->ram_bytes, uint64_t{1} << 40);
  EXPECT_EQ(report->pause_seconds, 1.25);
  ASSERT_EQ(report->disks.size(), 1U);
  EXPECT_EQ(report->disks[0].metadata_bytes, 99U);
  EXPECT_EQ(phases, "writing");
  EXPECT_EQ(warnings, "careful");
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
