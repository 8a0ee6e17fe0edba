// Saves and loads that do not get to their end: cancelled, failed, aborted. The image is as it was.

#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <thread>

#include "host.h"

namespace qvmstate::abi::test {
namespace {

constexpr size_t large = 32 * 1024 * 1024;

class Ending : public Layouts {
 protected:
  Ending() { ram.add("ram0", large).fill(1); }

  void begin(uint32_t flags = 0, qvmstate_progress_fn progress = nullptr, void *user = nullptr) {
    before = image.bytes();
    qvmstate_save_options options = save_options("state", GetParam());
    options.flags = flags;
    options.progress = progress;
    options.progress_user = user;
    ASSERT_OK(api().save_begin(session.get(), &options, &save, &error));
    add_ram(save, ram);
  }
  void close() {
    api().save_close(save);
    EXPECT_TRUE(image.bytes() == before);
    image.check();
  }

  ScratchImage image;
  OpenSession session{image.path(), true};
  Ram ram;
  Blob before;
  qvmstate_save *save = nullptr;
  qvmstate_error error = {};
};

INSTANTIATE_TEST_SUITE_P(Abi, Ending,
                         testing::Values(QVMSTATE_LAYOUT_LEGACY, QVMSTATE_LAYOUT_MAPPED_RAM),
                         layout_title);

TEST_P(Ending, CancelledFromAnotherThread) {
  std::atomic<bool> writing = false;
  const auto wait_here = [](void *user, const qvmstate_progress *progress) {
    EXPECT_EQ(progress->ram_bytes_total, large);
    static_cast<std::atomic<bool> *>(user)->store(true);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    return 0;
  };
  begin(0, wait_here, &writing);
  std::thread canceller([&] {
    while (!writing) {
      std::this_thread::yield();
    }
    api().save_cancel(save);
  });
  EXPECT_REFUSED(api().save_ram(save, nullptr, 0, &error), QVMSTATE_CANCELLED, "cancelled");
  canceller.join();
  EXPECT_REFUSED(api().save_ram(save, nullptr, 0, &error), QVMSTATE_CANCELLED, "cancelled");
  EXPECT_REFUSED(api().save_end(save, nullptr, &error), QVMSTATE_CANCELLED, "cancelled");
  EXPECT_OK(api().save_abort(save, &error));
  close();
}

TEST_P(Ending, CancelledByProgress) {
  const auto cancel = [](void *, const qvmstate_progress *) { return 1; };
  begin(0, cancel);
  EXPECT_REFUSED(api().save_ram(save, nullptr, 0, &error), QVMSTATE_CANCELLED, "cancelled");
  close();
}

TEST_P(Ending, CancelledBeforeTheCommit) {
  begin();
  ASSERT_OK(api().save_ram(save, nullptr, 0, &error));
  api().save_cancel(save);
  EXPECT_REFUSED(api().save_end(save, nullptr, &error), QVMSTATE_CANCELLED, "cancelled");
  EXPECT_OK(api().save_abort(save, &error));
  close();
}

TEST_P(Ending, ClosedHalfWay) {
  begin();
  ASSERT_OK(api().save_ram(save, nullptr, 0, &error));
  const Blob bytes(10);
  const qvmstate_section section = section_of("uart", 0, 1, bytes);
  ASSERT_OK(api().save_section(save, &section, &error));
  close();
}

TEST(Closing, ASessionClosesItsSave) {
  const ScratchImage image;
  const Blob before = image.bytes();
  qvmstate_error error = {};
  Ram ram;
  ram.add("ram0", 64 * page).fill(1);
  {
    const OpenSession session(image.path(), true);
    const qvmstate_save_options options = save_options("state", QVMSTATE_LAYOUT_LEGACY);
    qvmstate_save *save = nullptr;
    ASSERT_OK(api().save_begin(session.get(), &options, &save, &error));
    add_ram(save, ram);
    ASSERT_OK(api().save_ram(save, nullptr, 0, &error));
  }
  EXPECT_TRUE(image.bytes() == before);
}

TEST_P(Ending, AHostsCallbackFails) {
  begin();
  ASSERT_OK(api().save_ram(save, nullptr, 0, &error));
  const auto fail = [](void *, qvmstate_sink *) { return -7; };
  const qvmstate_section section = section_of("uart", 0, 1, {});
  EXPECT_REFUSED(api().save_section_stream(save, &section, fail, nullptr, &error),
                 QVMSTATE_CALLBACK, "'uart': the host's callback returned -7");
  EXPECT_EQ(error.sys_errno, -7);
  EXPECT_REFUSED(api().save_end(save, nullptr, &error), QVMSTATE_CALLBACK, "-7");
  close();
}

TEST_P(Ending, FreedRamIsLost) {
  std::atomic<uint64_t> calls = 0;
  const auto count = [](void *user, const qvmstate_progress *progress) {
    static_cast<std::atomic<uint64_t> *>(user)->fetch_add(1);
    return progress->ram_bytes_done >= progress->ram_bytes_total / 2 ? 1 : 0;
  };
  begin(QVMSTATE_SAVE_MAY_FREE, count, &calls);
  EXPECT_REFUSED(api().save_ram(save, nullptr, 0, &error), QVMSTATE_CANCELLED,
                 "RAM was freed already");
  EXPECT_REFUSED(api().save_abort(save, &error), QVMSTATE_RAM_LOST, "load a snapshot");
  EXPECT_GE(calls, 1U);
  close();
  const auto freed = ram.blocks[0].second.page_at(10);  // had data
  EXPECT_TRUE(std::ranges::all_of(freed, [](std::byte b) { return b == std::byte{0}; }));
}

TEST_P(Ending, NothingIsLostBeforeTheFirstPageIsFreed) {
  begin(QVMSTATE_SAVE_MAY_FREE);
  api().save_cancel(save);
  EXPECT_REFUSED(api().save_ram(save, nullptr, 0, &error), QVMSTATE_CANCELLED, "cancelled");
  EXPECT_OK(api().save_abort(save, &error));
  close();
}

/// A disk that takes no more.
TEST_P(Ending, AFailedWrite) {
  begin();
  rlimit limit = {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &limit), 0);
  const sighandler_t handler = ::signal(SIGXFSZ, SIG_IGN);
  const rlimit low = {8 * 1024 * 1024, limit.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &low), 0);
  const int code = api().save_ram(save, nullptr, 0, &error);
  EXPECT_EQ(code, QVMSTATE_NO_SPACE) << error.message;
  EXPECT_NE(std::string(error.message).find(image.path()), std::string::npos) << error.message;
  EXPECT_EQ(api().save_end(save, nullptr, &error), code);
  EXPECT_EQ(api().save_abort(save, &error), QVMSTATE_OK) << error.message;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
  ::signal(SIGXFSZ, handler);
  close();
}

TEST_P(Ending, ALoadIsCancelled) {
  save_all(session.get(), save_options("state", GetParam()), ram, {});
  qvmstate_load *load = nullptr;
  for (const bool by_progress : {true, false}) {
    qvmstate_load_options options = load_options("state");
    if (by_progress) {
      options.progress = [](void *, const qvmstate_progress *) { return 1; };
    }
    ASSERT_OK(api().load_begin(session.get(), &options, &load, &error));
    const qvmstate_ram_block block = block_of(ram.blocks[0].first.c_str(), ram.blocks[0].second);
    ASSERT_OK(api().load_add_ram(load, &block, &error));
    if (!by_progress) {
      api().load_cancel(load);
    }
    EXPECT_REFUSED(api().load_ram(load, &error), QVMSTATE_CANCELLED, "cancelled");
    EXPECT_REFUSED(api().load_ram(load, &error), QVMSTATE_CANCELLED, "cancelled");
    EXPECT_REFUSED(api().load_sections(load, keep_section, nullptr, &error), QVMSTATE_CANCELLED,
                   "cancelled");
    api().load_close(load);
  }
}

TEST_P(Ending, ADamagedSnapshotIsRefused) {
  save_all(session.get(), save_options("state", GetParam()), ram, {});
  // Where the image has it, the stream's magic.
  Blob bytes = image.bytes();
  const Blob magic = bytes_of(std::string("QEVM\0\0\0\x03", 8));
  const auto at = std::search(bytes.begin(), bytes.end(), magic.begin(), magic.end());
  ASSERT_NE(at, bytes.end());
  *at = std::byte{0};
  const ScratchImage damaged;
  qcow2::test::write_file(damaged.path(), bytes);
  const OpenSession reading(damaged.path(), false);
  const qvmstate_load_options options = load_options("state");
  qvmstate_load *load = nullptr;
  EXPECT_REFUSED(api().load_begin(reading.get(), &options, &load, &error), QVMSTATE_BAD_STREAM,
                 "stream");
  EXPECT_EQ(load, nullptr);
}

}  // namespace
}  // namespace qvmstate::abi::test
