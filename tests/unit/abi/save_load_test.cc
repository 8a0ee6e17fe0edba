// What is saved comes back: both layouts, page sizes, rounds, sections of all kinds.

#include "host.h"

namespace qvmstate::abi::test {
namespace {

INSTANTIATE_TEST_SUITE_P(Abi, Layouts,
                         testing::Values(QVMSTATE_LAYOUT_LEGACY, QVMSTATE_LAYOUT_MAPPED_RAM),
                         layout_title);

Ram two_blocks() {
  Ram ram;
  ram.add("main.ram", 5 * 1024 * 1024 + 3 * page).fill(1);
  ram.add("video", 13 * page).fill(2);
  return ram;
}

TEST_P(Layouts, RamAndSectionsComeBack) {
  const ScratchImage image;
  const Ram ram = two_blocks();
  const std::vector<Section> sections = {{"timer", 0, 3, bytes_of("ticks")},
                                         {"uart", 0, 1, bytes_of("one")},
                                         {"uart", 1, 1, bytes_of("two")},
                                         {"nothing", 7, 65535, {}}};
  {
    const OpenSession session(image.path(), true);
    const qvmstate_save_report report =
        save_all(session.get(), save_options("first", GetParam()), ram, sections);
    EXPECT_STREQ(report.id, "1");
    EXPECT_EQ(report.ram_bytes, ram.blocks[0].second.size() + 13 * page);
    EXPECT_GT(report.stream_bytes, ram.blocks[0].second.size() / 2);
    EXPECT_GT(report.written_bytes, ram.blocks[0].second.size() / 2);
    EXPECT_EQ(report.freed_bytes, 0U);
  }
  image.check();
  const OpenSession session(image.path(), false);
  std::map<std::string, Blob> loaded;
  EXPECT_EQ(load_all(session.get(), load_options("first"), loaded), sections);
  expect_same_ram(loaded, ram);
  // By id as well.
  qvmstate_load_options by_id = load_options(nullptr);
  by_id.id = "1";
  by_id.machine = "toy-1.0";
  EXPECT_EQ(load_all(session.get(), by_id, loaded), sections);
}

TEST_P(Layouts, OddPagesAndClusters) {
  for (const uint32_t page_bytes : {8192U, 65536U}) {
    for (const uint32_t cluster_bits : {12U, 21U}) {
      SCOPED_TRACE(std::to_string(page_bytes) + " " + std::to_string(cluster_bits));
      const ScratchImage image(cluster_bits);
      Ram ram;
      ram.add("a machine's RAM, \xc3\xbc", 65536 * 40).fill(3);
      const OpenSession session(image.path(), true);
      qvmstate_save_options options = save_options("state", GetParam());
      options.guest_page_bytes = page_bytes;
      options.machine = "a name with spaces, \"quotes\" and \xc3\xbc";
      save_all(session.get(), options, ram, {{"cpu", 0, 0, bytes_of("r0")}});
      std::map<std::string, Blob> loaded;
      load_all(session.get(), load_options("state"), loaded);
      expect_same_ram(loaded, ram);
    }
  }
}

/// The command reads what the plugin wrote, and was built from other parts of the project.
TEST_P(Layouts, TheCommandReadsIt) {
  const ScratchImage image;
  const Ram ram = two_blocks();
  {
    const OpenSession session(image.path(), true);
    save_all(session.get(), save_options("state", GetParam()), ram,
             {{"timer", 0, 3, bytes_of("ticks")}});
  }
  const auto info = run_command({QVMSTATE_COMMAND, "info", image.path(), "state"});
  EXPECT_EQ(info.status, 0) << info.output;
  for (const char *word : {"toy-1.0", "main.ram", "video", "timer"}) {
    EXPECT_NE(info.output.find(word), std::string::npos) << info.output;
  }
  const auto checked = run_command({QVMSTATE_COMMAND, "check", image.path(), "state"});
  EXPECT_EQ(checked.status, 0) << checked.output;
  EXPECT_NE(checked.output.find("checksum: right"), std::string::npos) << checked.output;
  const std::string out = image.folder().path("main.ram");
  const auto extracted = run_command(
      {QVMSTATE_COMMAND, "extract", image.path(), "state", "--as", "block", "main.ram", "-o", out});
  ASSERT_EQ(extracted.status, 0) << extracted.output;
  EXPECT_TRUE(qcow2::test::read_file(out) == ram.blocks[0].second.copy());
}

TEST_P(Layouts, LaterRoundsSupersede) {
  const ScratchImage image;
  Ram ram = two_blocks();
  Memory &main = ram.blocks[0].second;
  const OpenSession session(image.path(), true);
  qvmstate_save_options options = save_options("live", GetParam());
  options.flags = QVMSTATE_SAVE_LIVE;
  qvmstate_error error = {};
  qvmstate_save *save = nullptr;
  ASSERT_OK(api().save_begin(session.get(), &options, &save, &error));
  add_ram(save, ram);
  ASSERT_OK(api().save_ram(save, nullptr, 0, &error));

  const size_t pages = main.size() / page;
  std::vector<uint64_t> dirty((pages + 63) / 64);
  const auto touch = [&](size_t number, int value) {
    std::memset(main.page_at(number).data(), value, page);
    dirty[number / 64] |= uint64_t{1} << number % 64;
  };
  touch(0, 0x11);  // was never touched
  touch(10, 0);    // had data
  touch(63, 0x22);
  touch(64, 0x33);
  touch(pages - 1, 0x44);
  dirty.back() |= ~uint64_t{0} << pages % 64;  // past the end
  const uint64_t *bitmaps[] = {dirty.data(), nullptr};
  ASSERT_OK(api().save_ram(save, bitmaps, 2, &error));

  std::fill(dirty.begin(), dirty.end(), 0);
  touch(10, 0x55);  // had data, was zero, has data again
  touch(63, 0);
  touch(700, 0x66);
  const uint64_t video = 0b100;
  std::memset(ram.blocks[1].second.page_at(2).data(), 0x77, page);
  const uint64_t *more[] = {dirty.data(), &video};
  ASSERT_OK(api().save_ram(save, more, 2, &error));

  const uint64_t *nothing[] = {nullptr, nullptr};
  ASSERT_OK(api().save_ram(save, nothing, 2, &error));
  ASSERT_OK(api().save_end(save, nullptr, &error));
  api().save_close(save);
  image.check();
  std::map<std::string, Blob> loaded;
  load_all(session.get(), load_options("live"), loaded);
  expect_same_ram(loaded, ram);
}

/// In a device's bytes a guest may put what looks like the end of its section, and another section.
TEST_P(Layouts, ForgedFootersStayWhatTheyAre) {
  const ScratchImage image;
  Ram ram;
  ram.add("ram0", 16 * page).fill(1);
  Blob forged;
  for (uint32_t id = 0; id < 64; ++id) {
    std::string text = {0x7e, 0, 0, 0, static_cast<char>(id)};
    text += std::string("\x04\0\0\x10\0\x04", 6) + "evil" + std::string("\0\0\0\0\0\0\0\x01", 8);
    text += std::string("body\x7e\0\0\x10\0\0\x06\0\0\0\x02{}", 16);
    const Blob bytes = bytes_of(text);
    forged.insert(forged.end(), bytes.begin(), bytes.end());
  }
  const std::vector<Section> sections = {
      {"first", 0, 1, forged}, {"second", 0, 1, forged}, {"third", 0, 1, bytes_of("x")}};
  const OpenSession session(image.path(), true);
  save_all(session.get(), save_options("state", GetParam()), ram, sections);
  std::map<std::string, Blob> loaded;
  EXPECT_EQ(load_all(session.get(), load_options("state"), loaded), sections);
  expect_same_ram(loaded, ram);
}

int put_in_pieces(void *user, qvmstate_sink *sink) {
  const auto &bytes = *static_cast<const Blob *>(user);
  for (size_t at = 0; at < bytes.size(); at += 1000) {
    const size_t part = std::min<size_t>(1000, bytes.size() - at);
    const int code = api().section_put(sink, bytes.data() + at, part, nullptr);
    if (code != QVMSTATE_OK) {
      return code;
    }
  }
  return 0;
}

TEST_P(Layouts, SectionsAreStreamedAndMayComeBeforeRam) {
  const ScratchImage image;
  Ram ram;
  ram.add("ram0", 16 * page).fill(1);
  Blob large(3 * 1024 * 1024 + 17);  // more than readers look at in one piece at first
  for (size_t i = 0; i < large.size(); ++i) {
    large[i] = static_cast<std::byte>(i * 7 + i / 251);
  }
  const OpenSession session(image.path(), true);
  const qvmstate_save_options options = save_options("state", GetParam());
  qvmstate_error error = {};
  qvmstate_save *save = nullptr;
  ASSERT_OK(api().save_begin(session.get(), &options, &save, &error));
  add_ram(save, ram);
  const qvmstate_section section = section_of("disk.cache", 4, 2, {});
  ASSERT_OK(api().save_section_stream(save, &section, put_in_pieces, &large, &error));
  ASSERT_OK(api().save_ram(save, nullptr, 0, &error));
  ASSERT_OK(api().save_end(save, nullptr, &error));
  api().save_close(save);
  std::map<std::string, Blob> loaded;
  const std::vector<Section> expected = {{"disk.cache", 4, 2, large}};
  EXPECT_EQ(load_all(session.get(), load_options("state"), loaded), expected);
}

TEST_P(Layouts, ReplacedListedDeleted) {
  const ScratchImage image;
  Ram ram;
  ram.add("ram0", 64 * page).fill(1);
  const OpenSession session(image.path(), true);
  qvmstate_save_options options = save_options("state", GetParam());
  options.vm_clock_ns = 1234567890123;
  save_all(session.get(), options, ram, {});
  save_all(session.get(), save_options("other", GetParam()), ram, {});
  ram.blocks[0].second.fill(2);
  qvmstate_error error = {};
  qvmstate_save *save = nullptr;
  EXPECT_REFUSED(api().save_begin(session.get(), &options, &save, &error), QVMSTATE_EXISTS,
                 "QVMSTATE_SAVE_REPLACE");
  EXPECT_EQ(save, nullptr);
  options.flags = QVMSTATE_SAVE_REPLACE;
  EXPECT_STREQ(save_all(session.get(), options, ram, {}).id, "3");

  uint64_t count = 0;
  ASSERT_OK(api().snapshot_count(session.get(), &count, &error));
  ASSERT_EQ(count, 2U);
  qvmstate_snapshot_info info = {};
  info.size = sizeof info;
  ASSERT_OK(api().snapshot_info(session.get(), 1, &info, &error));
  EXPECT_STREQ(info.name, "state");
  EXPECT_STREQ(info.id, "3");
  EXPECT_EQ(info.vm_clock_ns, 1234567890123U);
  EXPECT_GT(info.vmstate_bytes, 32 * page);
  EXPECT_GT(info.date_seconds, 1600000000U);

  std::map<std::string, Blob> loaded;
  load_all(session.get(), load_options("state"), loaded);
  expect_same_ram(loaded, ram);
  ASSERT_OK(api().snapshot_delete(session.get(), "state", &error));
  EXPECT_REFUSED(api().snapshot_delete(session.get(), "state", &error), QVMSTATE_NOT_FOUND,
                 "no snapshot named 'state'");
  ASSERT_OK(api().snapshot_count(session.get(), &count, &error));
  EXPECT_EQ(count, 1U);
  image.check();
}

TEST_P(Layouts, FreedRamIsStillInTheSnapshot) {
  const ScratchImage image;
  Ram ram;
  const Memory &memory = ram.add("ram0", 24 * 1024 * 1024);
  memory.fill(9);
  const Blob before = memory.copy();
  const OpenSession session(image.path(), true);
  qvmstate_save_options options = save_options("state", GetParam());
  options.flags = QVMSTATE_SAVE_MAY_FREE;
  const qvmstate_save_report report = save_all(session.get(), options, ram, {});
  EXPECT_EQ(report.freed_bytes, memory.size());
  EXPECT_TRUE(memory.copy() == Blob(memory.size()));
  std::map<std::string, Blob> loaded;
  load_all(session.get(), load_options("state"), loaded);
  EXPECT_TRUE(loaded["ram0"] == before);
}

/// Memory that the host says is of huge pages is freed in those, however it was written.
TEST_P(Layouts, HugePagesAreFreedWhole) {
  constexpr size_t huge = 2 * 1024 * 1024;
  const ScratchImage image;
  const Memory memory(5 * huge);
  memory.fill(4);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  const OpenSession session(image.path(), true);
  qvmstate_save_options options = save_options("state", GetParam());
  options.flags = QVMSTATE_SAVE_MAY_FREE;
  qvmstate_error error = {};
  qvmstate_save *save = nullptr;
  ASSERT_OK(api().save_begin(session.get(), &options, &save, &error));
  qvmstate_ram_block block = block_of("ram0", memory);
  block.address = reinterpret_cast<void *>((address + huge - 1) / huge * huge);
  block.bytes = 3 * huge + 5 * page;  // the last one is freed never
  block.host_page_bytes = huge;
  ASSERT_OK(api().save_add_ram(save, &block, &error));
  ASSERT_OK(api().save_ram(save, nullptr, 0, &error));
  qvmstate_save_report report = {};
  report.size = sizeof report;
  ASSERT_OK(api().save_end(save, &report, &error));
  EXPECT_EQ(report.freed_bytes, 3 * huge);
  api().save_close(save);
}

}  // namespace
}  // namespace qvmstate::abi::test
