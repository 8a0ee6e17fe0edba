// What the tests of the C ABI share: the plugin, loaded as a host loads it; RAM as a host has it; a
// scratch image; a save and a load in one call each.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "plugin/qvmstate.h"
#include "unit/qcow2/test_images.h"

namespace qvmstate::abi::test {

using Blob = std::vector<std::byte>;
using qcow2::test::have_tool;
using qcow2::test::minimal_image;
using qcow2::test::run_command;
using qcow2::test::ScratchFolder;

constexpr size_t page = 4096;

/// Of the plugin, loaded as a host loads it.
const qvmstate_api &api();

/// EXPECT_OK(api().f(..., &error));
#define EXPECT_OK(call) EXPECT_EQ((call), QVMSTATE_OK) << error.message
#define ASSERT_OK(call) ASSERT_EQ((call), QVMSTATE_OK) << error.message

/// A call that must fail with this code, a message that has `text`, and the code in the struct too.
#define EXPECT_REFUSED(call, expected_code, text)                       \
  do {                                                                  \
    std::memset(&error, 0, sizeof error);                               \
    EXPECT_EQ((call), (expected_code)) << error.message;                \
    EXPECT_EQ(error.code, (expected_code));                             \
    EXPECT_NE(std::string(error.message).find(text), std::string::npos) \
        << "'" << error.message << "' has no '" << (text) << "'";       \
  } while (0)

/// Page aligned memory, as an emulator has it.
class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes) {
    void *mapped =
        ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EXPECT_NE(mapped, MAP_FAILED);
    data_ = static_cast<std::byte *>(mapped);
  }
  Memory(Memory &&other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Memory &operator=(Memory &&) = delete;
  ~Memory() {
    if (data_ != nullptr) {
      ::munmap(data_, bytes_);
    }
  }

  std::byte *data() const { return data_; }
  size_t size() const { return bytes_; }
  std::span<std::byte> page_at(size_t number) const { return {data_ + number * page, page}; }
  Blob copy() const { return {data_, data_ + bytes_}; }

  /// Of every 32 pages four never touched, four zero, the others random.
  void fill(uint32_t seed) const {
    std::mt19937_64 random(seed);
    for (size_t number = 0; number < bytes_ / page; ++number) {
      if (number % 32 < 4) {
        continue;
      }
      for (size_t at = 0; at < page; at += 8) {
        const uint64_t word = number % 32 < 8 ? 0 : random();
        std::memcpy(page_at(number).data() + at, &word, 8);
      }
    }
  }

 private:
  std::byte *data_ = nullptr;
  size_t bytes_;
};

/// RAM blocks by name, in the order in which they are added.
struct Ram {
  std::vector<std::pair<std::string, Memory>> blocks;

  Memory &add(const std::string &name, size_t bytes) {
    return blocks.emplace_back(name, Memory(bytes)).second;
  }
};

/// `name` must live as long.
inline qvmstate_ram_block block_of(const char *name, const Memory &memory) {
  return {sizeof(qvmstate_ram_block), 0, name, memory.data(), memory.size(), 0};
}

inline qvmstate_section section_of(const char *name, uint32_t instance, uint32_t version,
                                   std::span<const std::byte> bytes) {
  return {sizeof(qvmstate_section), instance, version, 0, name, bytes.data(), bytes.size()};
}

inline Blob bytes_of(const std::string &text) {
  const auto *data = reinterpret_cast<const std::byte *>(text.data());
  return {data, data + text.size()};
}

inline qvmstate_session_options session_options(const std::string &path, bool write) {
  qvmstate_session_options options = {};
  options.size = sizeof options;
  options.flags = write ? QVMSTATE_SESSION_WRITE : 0;
  options.path = path.c_str();
  return options;
}

inline qvmstate_save_options save_options(const char *name, uint32_t layout) {
  qvmstate_save_options options = {};
  options.size = sizeof options;
  options.name = name;
  options.machine = "toy-1.0";
  options.layout = layout;
  options.threads = 2;
  return options;
}

inline qvmstate_load_options load_options(const char *name) {
  qvmstate_load_options options = {};
  options.size = sizeof options;
  options.name = name;
  options.threads = 2;
  return options;
}

/// A session that closes itself.
class OpenSession {
 public:
  explicit OpenSession(const qvmstate_session_options &options) {
    qvmstate_error error = {};
    EXPECT_OK(api().session_open(&options, &session_, &error));
  }
  OpenSession(const std::string &path, bool write) : OpenSession(session_options(path, write)) {}
  OpenSession(const OpenSession &) = delete;
  OpenSession &operator=(const OpenSession &) = delete;
  ~OpenSession() { api().session_close(session_); }
  qvmstate_session *get() const { return session_; }

 private:
  qvmstate_session *session_ = nullptr;
};

/// An image with a disk of two L2 tables, three clusters of which have data.
class ScratchImage {
 public:
  explicit ScratchImage(uint32_t cluster_bits = 16) : path_(folder_.path("image.qcow2")) {
    qcow2::test::write_file(path_, minimal_image(cluster_bits));
  }
  const std::string &path() const { return path_; }
  Blob bytes() const { return qcow2::test::read_file(path_); }
  const ScratchFolder &folder() const { return folder_; }
  /// By QEMU's own tool, where it is installed; also while a session has the image.
  void check() const {
    if (have_tool("qemu-img")) {
      const auto checked = run_command({"qemu-img", "check", "-U", path_});
      EXPECT_EQ(checked.status, 0) << checked.output;
    }
  }

 private:
  ScratchFolder folder_;
  std::string path_;
};

struct Section {
  std::string name;
  uint32_t instance = 0;
  uint32_t version = 0;
  Blob bytes;
  bool operator==(const Section &) const = default;
};

inline void add_ram(qvmstate_save *save, const Ram &ram) {
  qvmstate_error error = {};
  for (const auto &[name, memory] : ram.blocks) {
    const qvmstate_ram_block block = block_of(name.c_str(), memory);
    ASSERT_OK(api().save_add_ram(save, &block, &error));
  }
}

/// Everything in one round.
inline qvmstate_save_report save_all(qvmstate_session *session,
                                     const qvmstate_save_options &options, const Ram &ram,
                                     const std::vector<Section> &sections) {
  qvmstate_error error = {};
  qvmstate_save *save = nullptr;
  qvmstate_save_report report = {};
  report.size = sizeof report;
  EXPECT_OK(api().save_begin(session, &options, &save, &error));
  add_ram(save, ram);
  EXPECT_OK(api().save_ram(save, nullptr, 0, &error));
  for (const Section &section : sections) {
    const qvmstate_section given =
        section_of(section.name.c_str(), section.instance, section.version, section.bytes);
    EXPECT_OK(api().save_section(save, &given, &error));
  }
  EXPECT_OK(api().save_end(save, &report, &error));
  api().save_close(save);
  return report;
}

inline int keep_section(void *user, const qvmstate_section *section) {
  const auto *data = static_cast<const std::byte *>(section->data);
  static_cast<std::vector<Section> *>(user)->push_back(
      {section->name, section->instance, section->version, {data, data + section->bytes}});
  return 0;
}

/// Into memory that holds other bytes before.
inline std::vector<Section> load_all(qvmstate_session *session,
                                     const qvmstate_load_options &options,
                                     std::map<std::string, Blob> &ram) {
  qvmstate_error error = {};
  qvmstate_load *load = nullptr;
  std::vector<Section> sections;
  EXPECT_OK(api().load_begin(session, &options, &load, &error));
  if (load == nullptr) {
    return sections;
  }
  qvmstate_load_info info = {};
  info.size = sizeof info;
  EXPECT_OK(api().load_info(load, &info, &error));
  std::vector<Memory> memory;
  for (uint64_t i = 0; i < info.block_count; ++i) {
    qvmstate_block_info block = {};
    block.size = sizeof block;
    EXPECT_OK(api().load_block_info(load, i, &block, &error));
    memory.emplace_back(block.bytes);
    std::memset(memory.back().data(), 0xcc, block.bytes);
    const qvmstate_ram_block place = block_of(block.name, memory.back());
    EXPECT_OK(api().load_add_ram(load, &place, &error));
  }
  EXPECT_OK(api().load_ram(load, &error));
  for (uint64_t i = 0; i < info.block_count; ++i) {
    qvmstate_block_info block = {};
    block.size = sizeof block;
    EXPECT_OK(api().load_block_info(load, i, &block, &error));
    ram[block.name] = memory[i].copy();
  }
  EXPECT_OK(api().load_sections(load, keep_section, &sections, &error));
  api().load_close(load);
  return sections;
}

inline void expect_same_ram(const std::map<std::string, Blob> &loaded, const Ram &ram) {
  EXPECT_EQ(loaded.size(), ram.blocks.size());
  for (const auto &[name, memory] : ram.blocks) {
    const auto found = loaded.find(name);
    ASSERT_NE(found, loaded.end()) << name;
    EXPECT_TRUE(found->second == memory.copy()) << name;
  }
}

/// Both layouts.
class Layouts : public testing::TestWithParam<uint32_t> {};
inline std::string layout_title(const testing::TestParamInfo<uint32_t> &info) {
  return info.param == QVMSTATE_LAYOUT_LEGACY ? "legacy" : "mapped_ram";
}

}  // namespace qvmstate::abi::test
