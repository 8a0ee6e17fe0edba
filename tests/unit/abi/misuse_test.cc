// Mistakes of a host: each is told by a code and a message, and changes nothing.

#include <dlfcn.h>

#include <limits>

#include "host.h"

namespace qvmstate::abi::test {
namespace {

TEST(Entry, GivesTheTable) {
  EXPECT_EQ(api().version, QVMSTATE_API_VERSION);
  EXPECT_EQ(api().size, sizeof(qvmstate_api));
  EXPECT_STRNE(api().library_version, "");
}

TEST(Entry, RefusesANewerTable) {
  void *library = ::dlopen(QVMSTATE_PLUGIN, RTLD_NOW | RTLD_LOCAL);
  ASSERT_NE(library, nullptr) << ::dlerror();
  const auto get_api = reinterpret_cast<qvmstate_get_api_fn>(::dlsym(library, QVMSTATE_ENTRY));
  ASSERT_NE(get_api, nullptr);
  qvmstate_error error = {};
  EXPECT_EQ(get_api(QVMSTATE_API_VERSION + 1, &error), nullptr);
  EXPECT_EQ(error.code, QVMSTATE_NOT_SUPPORTED);
  EXPECT_STREQ(error.message,
               "this host needs version 2 of the plugin's table, and libqvmstate.so 0.1.0 has "
               "version 1; load a newer libqvmstate.so");
  EXPECT_EQ(get_api(0, &error), nullptr);
  EXPECT_EQ(get_api(UINT32_MAX, nullptr), nullptr);
  ::dlclose(library);
}

TEST(Entry, ExportsNothingElse) {
  if (!have_tool("nm")) {
    GTEST_SKIP() << "nm is not installed";
  }
  const auto symbols = run_command({"nm", "-D", "--defined-only", "-j", QVMSTATE_PLUGIN});
  EXPECT_EQ(symbols.output, "qemu_plugin_install\nqemu_plugin_version\nqvmstate_get_api\n");
}

TEST(Misuse, OfNull) {
  qvmstate_error error;
  const auto null = "NULL";
  qvmstate_session *session = nullptr;
  qvmstate_save *save = nullptr;
  qvmstate_load *load = nullptr;
  uint64_t count = 0;
  EXPECT_REFUSED(api().session_open(nullptr, &session, &error), QVMSTATE_BAD_ARGUMENT, null);
  EXPECT_REFUSED(api().session_open(nullptr, nullptr, &error), QVMSTATE_BAD_ARGUMENT, null);
  EXPECT_REFUSED(api().snapshot_count(nullptr, &count, &error), QVMSTATE_BAD_ARGUMENT, null);
  EXPECT_REFUSED(api().snapshot_info(nullptr, 0, nullptr, &error), QVMSTATE_BAD_ARGUMENT, null);
  EXPECT_REFUSED(api().snapshot_delete(nullptr, "x", &error), QVMSTATE_BAD_ARGUMENT, null);
  EXPECT_REFUSED(api().save_begin(nullptr, nullptr, &save, &error), QVMSTATE_BAD_ARGUMENT, null);
  EXPECT_REFUSED(api().save_add_ram(nullptr, nullptr, &error), QVMSTATE_BAD_ARGUMENT, null);
  EXPECT_REFUSED(api().save_ram(nullptr, nullptr, 0, &error), QVMSTATE_BAD_ARGUMENT, null);
  EXPECT_REFUSED(api().save_section(nullptr, nullptr, &error), QVMSTATE_BAD_ARGUMENT, null);
  EXPECT_REFUSED(api().save_section_stream(nullptr, nullptr, nullptr, nullptr, &error),
                 QVMSTATE_BAD_ARGUMENT, null);
  EXPECT_REFUSED(api().section_put(nullptr, nullptr, 0, &error), QVMSTATE_BAD_ARGUMENT, null);
  EXPECT_REFUSED(api().save_end(nullptr, nullptr, &error), QVMSTATE_BAD_ARGUMENT, null);
  EXPECT_REFUSED(api().save_abort(nullptr, &error), QVMSTATE_BAD_ARGUMENT, null);
  EXPECT_REFUSED(api().load_begin(nullptr, nullptr, &load, &error), QVMSTATE_BAD_ARGUMENT, null);
  EXPECT_REFUSED(api().load_info(nullptr, nullptr, &error), QVMSTATE_BAD_ARGUMENT, null);
  EXPECT_REFUSED(api().load_block_info(nullptr, 0, nullptr, &error), QVMSTATE_BAD_ARGUMENT, null);
  EXPECT_REFUSED(api().load_add_ram(nullptr, nullptr, &error), QVMSTATE_BAD_ARGUMENT, null);
  EXPECT_REFUSED(api().load_ram(nullptr, &error), QVMSTATE_BAD_ARGUMENT, null);
  EXPECT_REFUSED(api().load_sections(nullptr, nullptr, nullptr, &error), QVMSTATE_BAD_ARGUMENT,
                 null);
  EXPECT_EQ(api().load_ram(nullptr, nullptr), QVMSTATE_BAD_ARGUMENT);  // no struct to fill
  api().session_close(nullptr);
  api().save_close(nullptr);
  api().load_close(nullptr);
  api().save_cancel(nullptr);
  api().load_cancel(nullptr);
}

TEST(Misuse, OfSessionOptions) {
  const ScratchImage image;
  qvmstate_error error;
  qvmstate_session *session = nullptr;
  const auto refused = [&](auto change, const char *text, int code = QVMSTATE_BAD_ARGUMENT) {
    qvmstate_session_options options = session_options(image.path(), true);
    change(options);
    EXPECT_REFUSED(api().session_open(&options, &session, &error), code, text);
    EXPECT_EQ(session, nullptr);
  };
  refused([](auto &options) { options.size -= 1; }, "sizeof(struct qvmstate_session_options)");
  refused([](auto &options) { options.size = 0xdeadbeef; }, "sizeof");
  refused([](auto &options) { options.path = nullptr; }, "names no image");
  refused([](auto &options) { options.path = ""; }, "names no image");
  refused([](auto &options) { options.fds = reinterpret_cast<const int *>(&options); },
          "names no image, or two");
  refused([](auto &options) { options.flags = 2; }, "flags");
  refused([](auto &options) { options.direct = 3; }, "direct");
  refused([](auto &options) { options.path = "/nonexistent/image"; }, "/nonexistent/image",
          QVMSTATE_NOT_FOUND);
  refused([](auto &options) { options.path = QVMSTATE_PLUGIN; }, "qcow2", QVMSTATE_BAD_IMAGE);
  refused([](auto &options) { options.path = "/dev/null"; }, "regular file");
  const int closed = 9999;
  refused(
      [&](auto &options) {
        options.path = nullptr;
        options.fds = &closed;
        options.fd_count = 1;
      },
      "is not open");

  // A host that was built with a later header: unknown members must be 0.
  struct {
    qvmstate_session_options known;
    uint64_t later;
  } newer = {session_options(image.path(), true), 0};
  newer.known.size = sizeof newer;
  ASSERT_OK(api().session_open(&newer.known, &session, &error));
  api().session_close(session);
  newer.later = 1;
  EXPECT_REFUSED(api().session_open(&newer.known, &session, &error), QVMSTATE_NOT_SUPPORTED,
                 "does not know");
}

class InSession : public testing::Test {
 protected:
  ScratchImage image;
  OpenSession session{image.path(), true};
  qvmstate_error error = {};
};

class InSave : public InSession {
 protected:
  InSave() {
    const qvmstate_save_options options = save_options("state", QVMSTATE_LAYOUT_LEGACY);
    EXPECT_OK(api().save_begin(session.get(), &options, &save, &error));
  }
  ~InSave() override {
    api().save_close(save);
    uint64_t count = 0;
    EXPECT_OK(api().snapshot_count(session.get(), &count, &error));
    EXPECT_EQ(count, 0U);
    image.check();
  }
  void add_block() {
    const qvmstate_ram_block block = block_of("ram0", memory);
    ASSERT_OK(api().save_add_ram(save, &block, &error));
  }
  Memory memory{16 * page};
  qvmstate_save *save = nullptr;
};

TEST_F(InSession, SaveOptions) {
  const std::string long_name(256, 'n');
  qvmstate_save *save = nullptr;
  const auto refused = [&](auto change, const char *text, int code = QVMSTATE_BAD_ARGUMENT) {
    qvmstate_save_options options = save_options("state", QVMSTATE_LAYOUT_LEGACY);
    change(options);
    EXPECT_REFUSED(api().save_begin(session.get(), &options, &save, &error), code, text);
    EXPECT_EQ(save, nullptr);
  };
  refused([](auto &options) { options.size = 8; }, "sizeof(struct qvmstate_save_options)");
  refused([](auto &options) { options.name = nullptr; }, "NULL");
  refused([](auto &options) { options.name = ""; }, "name");
  refused([](auto &options) { options.name = "17"; }, "number");
  refused([&](auto &options) { options.name = long_name.c_str(); }, "255");
  refused([](auto &options) { options.machine = nullptr; }, "machine");
  refused([](auto &options) { options.machine = ""; }, "machine");
  refused([&](auto &options) { options.machine = long_name.c_str(); }, "255");
  refused([](auto &options) { options.layout = 2; }, "layout");
  refused([](auto &options) { options.guest_page_bytes = 2048; }, "guest_page_bytes");
  refused([](auto &options) { options.guest_page_bytes = 12288; }, "guest_page_bytes");
  refused([](auto &options) { options.guest_page_bytes = 131072; }, "guest_page_bytes");
  refused([](auto &options) { options.threads = 65; }, "64");
  refused([](auto &options) { options.flags = 8; }, "flags");
  refused([](auto &options) { options.flags = QVMSTATE_SAVE_LIVE | QVMSTATE_SAVE_MAY_FREE; },
          "exclude");
  const qvmstate_save_options options = save_options("state", QVMSTATE_LAYOUT_LEGACY);
  EXPECT_REFUSED(api().save_begin(session.get(), &options, nullptr, &error), QVMSTATE_BAD_ARGUMENT,
                 "NULL");
}

TEST_F(InSession, LoadOptions) {
  Ram ram;
  ram.add("ram0", 4 * page).fill(1);
  save_all(session.get(), save_options("state", QVMSTATE_LAYOUT_LEGACY), ram, {});
  qvmstate_load *load = nullptr;
  const auto refused = [&](auto change, const char *text, int code) {
    qvmstate_load_options options = load_options("state");
    change(options);
    EXPECT_REFUSED(api().load_begin(session.get(), &options, &load, &error), code, text);
    EXPECT_EQ(load, nullptr);
  };
  refused([](auto &options) { options.size = 0; }, "sizeof", QVMSTATE_BAD_ARGUMENT);
  refused([](auto &options) { options.name = nullptr; }, "neither", QVMSTATE_BAD_ARGUMENT);
  refused([](auto &options) { options.flags = 2; }, "flags", QVMSTATE_BAD_ARGUMENT);
  refused([](auto &options) { options.threads = 65; }, "64", QVMSTATE_BAD_ARGUMENT);
  refused([](auto &options) { options.name = "1"; }, "named '1'", QVMSTATE_NOT_FOUND);
  refused([](auto &options) { options.id = "2"; }, "with id '2'", QVMSTATE_NOT_FOUND);
  refused([](auto &options) { options.machine = "toy-2.0"; }, "is of machine 'toy-1.0'",
          QVMSTATE_MISMATCH);
}

TEST_F(InSave, RamBlocks) {
  const std::string long_name(256, 'n');
  add_block();
  const auto refused = [&](auto change, const char *text) {
    qvmstate_ram_block block = block_of("ram1", memory);
    change(block);
    EXPECT_REFUSED(api().save_add_ram(save, &block, &error), QVMSTATE_BAD_ARGUMENT, text);
  };
  refused([](auto &block) { block.size = 4; }, "sizeof(struct qvmstate_ram_block)");
  refused([](auto &block) { block.name = nullptr; }, "1 to 255 bytes");
  refused([](auto &block) { block.name = ""; }, "1 to 255 bytes");
  refused([&](auto &block) { block.name = long_name.c_str(); }, "1 to 255 bytes");
  refused([](auto &block) { block.name = "ram0"; }, "of this name already");
  refused([](auto &block) { block.bytes = 0; }, "size of 0 bytes");
  refused([](auto &block) { block.bytes = 4097; }, "4097");
  refused([](auto &block) { block.bytes = std::numeric_limits<uint64_t>::max() - 4095; }, "size");
  refused([](auto &block) { block.address = nullptr; }, "NULL");
  refused([](auto &block) { block.address = static_cast<char *>(block.address) + 512; },
          "multiple of its page size");
  refused([](auto &block) { block.host_page_bytes = 5000; }, "power of two");
  refused([](auto &block) { block.host_page_bytes = uint64_t{1} << 40; },
          "multiple of its page size");
  refused([](auto &block) { block.bytes = uint64_t{1} << 46; }, "not all of its memory is mapped");
  EXPECT_REFUSED(api().save_add_ram(save, nullptr, &error), QVMSTATE_BAD_ARGUMENT, "NULL");
  // None of this has harmed the save.
  EXPECT_OK(api().save_ram(save, nullptr, 0, &error));
}

TEST_F(InSave, Sections) {
  const std::string long_name(256, 'n');
  const Blob bytes(10);
  const auto refused = [&](auto change, const char *text) {
    qvmstate_section section = section_of("uart", 0, 1, bytes);
    change(section);
    EXPECT_REFUSED(api().save_section(save, &section, &error), QVMSTATE_BAD_ARGUMENT, text);
  };
  const qvmstate_section first = section_of("uart", 0, 1, bytes);
  ASSERT_OK(api().save_section(save, &first, &error));
  refused([](auto &) {}, "of this name and instance 0 already");
  refused([](auto &section) { section.size = 0; }, "sizeof(struct qvmstate_section)");
  refused([](auto &section) { section.name = nullptr; }, "1 to 255");
  refused([](auto &section) { section.name = ""; }, "1 to 255");
  refused([&](auto &section) { section.name = long_name.c_str(); }, "1 to 255");
  refused([](auto &section) { section.name = "a\nb"; }, "printable");
  refused([](auto &section) { section.name = "ram"; }, "RAM section");
  refused([](auto &section) { section.version = 65536; }, "65535");
  refused(
      [](auto &section) {
        section.instance = 1;
        section.data = nullptr;
      },
      "NULL");
  refused(
      [](auto &section) {
        section.instance = 1;
        section.bytes = uint64_t{1} << 40;
      },
      "192 MiB");
  EXPECT_REFUSED(api().save_section(save, nullptr, &error), QVMSTATE_BAD_ARGUMENT, "NULL");
  const qvmstate_section second = section_of("uart", 1, 1, bytes);
  EXPECT_REFUSED(api().save_section_stream(save, &second, nullptr, nullptr, &error),
                 QVMSTATE_BAD_ARGUMENT, "NULL");
  // What a callback may do wrong without failing itself.
  const auto put_null = [](void *, qvmstate_sink *sink) {
    EXPECT_EQ(api().section_put(sink, nullptr, 5, nullptr), QVMSTATE_BAD_ARGUMENT);
    EXPECT_EQ(api().section_put(sink, "x", 1, nullptr), QVMSTATE_BAD_ARGUMENT);
    return 0;
  };
  EXPECT_REFUSED(api().save_section_stream(save, &second, put_null, nullptr, &error),
                 QVMSTATE_BAD_ARGUMENT, "its data is NULL");
  EXPECT_OK(api().save_section(save, &second, &error));
}

TEST_F(InSave, OrderOfCalls) {
  const uint64_t word = 0;
  const uint64_t *bitmaps[] = {&word};
  EXPECT_REFUSED(api().save_end(save, nullptr, &error), QVMSTATE_BAD_STATE, "save_ram");
  EXPECT_REFUSED(api().save_ram(save, nullptr, 0, &error), QVMSTATE_BAD_STATE, "save_add_ram");
  add_block();
  EXPECT_REFUSED(api().save_ram(save, bitmaps, 1, &error), QVMSTATE_BAD_STATE, "NULL");
  ASSERT_OK(api().save_ram(save, nullptr, 0, &error));
  EXPECT_REFUSED(api().save_ram(save, nullptr, 0, &error), QVMSTATE_BAD_STATE, "LIVE");
  EXPECT_REFUSED(api().save_ram(save, bitmaps, 1, &error), QVMSTATE_BAD_STATE, "LIVE");
  const qvmstate_ram_block block = block_of("late", memory);
  EXPECT_REFUSED(api().save_add_ram(save, &block, &error), QVMSTATE_BAD_STATE, "already");

  // One at a time in a session.
  const qvmstate_save_options options = save_options("other", QVMSTATE_LAYOUT_LEGACY);
  qvmstate_save *other = nullptr;
  EXPECT_REFUSED(api().save_begin(session.get(), &options, &other, &error), QVMSTATE_BAD_STATE,
                 "open save");
  const qvmstate_load_options wanted = load_options("state");
  qvmstate_load *load = nullptr;
  EXPECT_REFUSED(api().load_begin(session.get(), &wanted, &load, &error), QVMSTATE_BAD_STATE,
                 "open save");
  EXPECT_REFUSED(api().snapshot_delete(session.get(), "x", &error), QVMSTATE_BAD_STATE,
                 "open save");

  qvmstate_save_report report = {};
  EXPECT_REFUSED(api().save_end(save, &report, &error), QVMSTATE_BAD_ARGUMENT, "sizeof");
  ASSERT_OK(api().save_abort(save, &error));
  EXPECT_OK(api().save_abort(save, &error));
  EXPECT_REFUSED(api().save_end(save, nullptr, &error), QVMSTATE_BAD_STATE, "aborted");
  EXPECT_REFUSED(api().save_ram(save, nullptr, 0, &error), QVMSTATE_BAD_STATE, "aborted");
}

TEST_F(InSession, NothingFollowsAnEnd) {
  const qvmstate_save_options options = save_options("state", QVMSTATE_LAYOUT_MAPPED_RAM);
  Ram ram;
  ram.add("ram0", 4 * page);
  qvmstate_save *save = nullptr;
  ASSERT_OK(api().save_begin(session.get(), &options, &save, &error));
  add_ram(save, ram);
  ASSERT_OK(api().save_ram(save, nullptr, 0, &error));
  ASSERT_OK(api().save_end(save, nullptr, &error));
  EXPECT_REFUSED(api().save_end(save, nullptr, &error), QVMSTATE_BAD_STATE, "ended");
  EXPECT_REFUSED(api().save_abort(save, &error), QVMSTATE_BAD_STATE, "committed");
  api().save_cancel(save);
  api().save_close(save);
}

TEST_F(InSession, RoundsNeedABitmapForEachBlock) {
  qvmstate_save_options options = save_options("state", QVMSTATE_LAYOUT_MAPPED_RAM);
  options.flags = QVMSTATE_SAVE_LIVE;
  Ram ram;
  ram.add("ram0", 4 * page);
  qvmstate_save *save = nullptr;
  ASSERT_OK(api().save_begin(session.get(), &options, &save, &error));
  add_ram(save, ram);
  ASSERT_OK(api().save_ram(save, nullptr, 0, &error));
  const uint64_t *bitmaps[] = {nullptr, nullptr};
  EXPECT_REFUSED(api().save_ram(save, nullptr, 1, &error), QVMSTATE_BAD_ARGUMENT, "bitmap");
  EXPECT_REFUSED(api().save_ram(save, bitmaps, 2, &error), QVMSTATE_BAD_ARGUMENT, "bitmap");
  EXPECT_OK(api().save_ram(save, bitmaps, 1, &error));
  api().save_close(save);
}

TEST_F(InSession, ASessionForLoadsDoesNotSave) {
  const ScratchImage other;
  const OpenSession reading(other.path(), false);
  const qvmstate_save_options options = save_options("state", QVMSTATE_LAYOUT_LEGACY);
  qvmstate_save *save = nullptr;
  EXPECT_REFUSED(api().save_begin(reading.get(), &options, &save, &error), QVMSTATE_BAD_STATE,
                 "QVMSTATE_SESSION_WRITE");
  EXPECT_REFUSED(api().snapshot_delete(reading.get(), "x", &error), QVMSTATE_BAD_STATE,
                 "QVMSTATE_SESSION_WRITE");
}

/// A session, or a save in it, that a callback of its own calls into.
TEST_F(InSave, CallsFromACallback) {
  struct Handles {
    qvmstate_session *session;
    qvmstate_save *save;
  } handles = {session.get(), save};
  const auto meddle = [](void *user, qvmstate_sink *) {
    const auto *mine = static_cast<Handles *>(user);
    qvmstate_error error;
    uint64_t count = 0;
    EXPECT_REFUSED(api().snapshot_count(mine->session, &count, &error), QVMSTATE_BAD_STATE,
                   "callback");
    EXPECT_REFUSED(api().save_ram(mine->save, nullptr, 0, &error), QVMSTATE_BAD_STATE, "callback");
    api().save_close(mine->save);        // ignored
    api().session_close(mine->session);  // ignored
    return 0;
  };
  const qvmstate_section section = section_of("uart", 0, 1, {});
  EXPECT_OK(api().save_section_stream(save, &section, meddle, &handles, &error));
}

class InLoad : public InSession {
 protected:
  void begin(uint32_t layout) {
    Ram ram;
    ram.add("a.ram", 8 * page).fill(1);
    ram.add("b.ram", 16 * page).fill(2);
    save_all(session.get(), save_options("state", layout), ram, {{"uart", 0, 1, Blob(3)}});
    const qvmstate_load_options options = load_options("state");
    ASSERT_OK(api().load_begin(session.get(), &options, &load, &error));
    std::memset(a.data(), 0xcc, a.size());
    std::memset(b.data(), 0xcc, b.size());
  }
  ~InLoad() override { api().load_close(load); }
  int add(const std::string &name, const Memory &memory, uint64_t bytes) {
    qvmstate_ram_block block = block_of(name.c_str(), memory);
    block.bytes = bytes;
    return api().load_add_ram(load, &block, &error);
  }
  bool untouched(const Memory &memory) const {
    return memory.copy() == Blob(memory.size(), std::byte{0xcc});
  }
  Memory a{8 * page};
  Memory b{16 * page};
  qvmstate_load *load = nullptr;
};

TEST_F(InLoad, MismatchesAreRefusedBeforeRamIsWritten) {
  for (const uint32_t layout : {QVMSTATE_LAYOUT_LEGACY, QVMSTATE_LAYOUT_MAPPED_RAM}) {
    const ScratchImage other;
    begin(layout);
    EXPECT_REFUSED(add("c.ram", a, a.size()), QVMSTATE_MISMATCH, "has no RAM block 'c.ram'");
    EXPECT_REFUSED(add("a.ram", a, 4 * page), QVMSTATE_MISMATCH, "32768 bytes, the host's 16384");
    EXPECT_REFUSED(add("a.ram", a, 0), QVMSTATE_BAD_ARGUMENT, "size of 0");
    ASSERT_OK(add("a.ram", a, a.size()));
    EXPECT_REFUSED(add("a.ram", b, a.size()), QVMSTATE_BAD_ARGUMENT, "already");
    EXPECT_REFUSED(api().load_ram(load, &error), QVMSTATE_MISMATCH, "'b.ram'");
    EXPECT_TRUE(untouched(a));
    EXPECT_REFUSED(api().load_sections(load, keep_section, nullptr, &error), QVMSTATE_BAD_STATE,
                   "load_ram");
    ASSERT_OK(add("b.ram", b, b.size()));
    ASSERT_OK(api().load_ram(load, &error));
    EXPECT_FALSE(untouched(a));
    EXPECT_REFUSED(api().load_ram(load, &error), QVMSTATE_BAD_STATE, "already");
    EXPECT_REFUSED(add("a.ram", a, a.size()), QVMSTATE_BAD_STATE, "already");
    EXPECT_REFUSED(api().load_sections(load, nullptr, nullptr, &error), QVMSTATE_BAD_ARGUMENT,
                   "NULL");
    api().load_close(load);
    load = nullptr;
    ASSERT_OK(api().snapshot_delete(session.get(), "state", &error));
  }
}

TEST_F(InLoad, UnknownSectionsAreReported) {
  Ram ram;
  ram.add("a.ram", 8 * page);
  save_all(session.get(), save_options("state", QVMSTATE_LAYOUT_LEGACY), ram,
           {{"uart", 0, 1, {}}, {"gpu", 2, 9, Blob(3)}, {"timer", 0, 1, {}}});
  std::vector<std::string> seen;
  const auto know = [](void *user, const qvmstate_section *section) {
    static_cast<std::vector<std::string> *>(user)->emplace_back(section->name);
    return section->name == std::string("gpu") ? QVMSTATE_SECTION_UNKNOWN : 0;
  };
  std::vector<std::string> lines;
  const auto log = [](void *user, int level, const char *line) {
    if (level == QVMSTATE_LOG_WARNING) {
      static_cast<std::vector<std::string> *>(user)->emplace_back(line);
    }
  };
  const std::string gpu = "does not know: 'gpu' (instance 2, version 9)";
  for (const uint32_t flags : {0U, QVMSTATE_LOAD_SKIP_UNKNOWN}) {
    seen.clear();
    const ScratchImage copy;
    qcow2::test::write_file(copy.path(), image.bytes());
    qvmstate_session_options options = session_options(copy.path(), false);
    options.log = log;
    options.log_user = &lines;
    const OpenSession logged(options);
    qvmstate_load_options wanted = load_options("state");
    wanted.flags = flags;
    ASSERT_OK(api().load_begin(logged.get(), &wanted, &load, &error));
    ASSERT_OK(add("a.ram", a, a.size()));
    ASSERT_OK(api().load_ram(load, &error));
    if (flags == 0) {
      EXPECT_REFUSED(api().load_sections(load, know, &seen, &error), QVMSTATE_MISMATCH, gpu);
    } else {
      EXPECT_OK(api().load_sections(load, know, &seen, &error));
    }
    EXPECT_EQ(seen, (std::vector<std::string>{"uart", "gpu", "timer"}));
    api().load_close(load);
    load = nullptr;
  }
  ASSERT_EQ(lines.size(), 1U);
  EXPECT_NE(lines[0].find(gpu), std::string::npos) << lines[0];
}

TEST_F(InLoad, AHostsCallbackFails) {
  begin(QVMSTATE_LAYOUT_LEGACY);
  ASSERT_OK(add("a.ram", a, a.size()));
  ASSERT_OK(add("b.ram", b, b.size()));
  ASSERT_OK(api().load_ram(load, &error));
  const auto fail = [](void *, const qvmstate_section *) { return 42; };
  EXPECT_REFUSED(api().load_sections(load, fail, nullptr, &error), QVMSTATE_CALLBACK,
                 "'uart': the host's callback returned 42");
  EXPECT_EQ(error.sys_errno, 42);
  const auto fine = [](void *, const qvmstate_section *) { return 0; };
  EXPECT_REFUSED(api().load_sections(load, fine, nullptr, &error), QVMSTATE_CALLBACK, "42");
}

}  // namespace
}  // namespace qvmstate::abi::test
