// Bytes of the QEMU that is installed: its migration stream, whose vmdescription tells the size of
// every section, and its xen-save-devices-state, which has no sizes.

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "stream_fixture.h"
#include "vmstate/device_sections.h"

namespace qvmstate::vmstate::test {
namespace {

using nlohmann::json;

/// QEMU with QMP on its standard input, its answers in a file.
class Qemu {
 public:
  explicit Qemu(const std::filesystem::path &directory) : answers_(directory / "answers") {
    int pipe_ends[2];
    EXPECT_EQ(pipe2(pipe_ends, O_CLOEXEC), 0);
    pid_ = fork();
    if (pid_ == 0) {
      dup2(pipe_ends[0], 0);
      const int log = open(answers_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
      dup2(log, 1);
      dup2(log, 2);
      execlp("qemu-system-x86_64", "qemu-system-x86_64", "-S", "-accel", "tcg", "-m", "48", "-smp",
             "2", "-display", "none", "-nodefaults", "-vga", "std", "-device", "e1000", "-device",
             "virtio-balloon", "-qmp", "stdio", nullptr);
      _exit(127);
    }
    close(pipe_ends[0]);
    input_ = pipe_ends[1];
    say(R"({"execute": "qmp_capabilities"})");
  }
  ~Qemu() {
    close(input_);
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  Qemu(const Qemu &) = delete;
  Qemu &operator=(const Qemu &) = delete;

  void say(const std::string &command) {
    EXPECT_EQ(write(input_, command.data(), command.size()), static_cast<ssize_t>(command.size()));
  }
  /// Waits until QEMU has said `text`; `ask` is said again each time.
  bool wait_for(const std::string &text, const std::string &ask = "") {
    for (int i = 0; i < 300; ++i) {
      if (answers().find(text) != std::string::npos) {
        return true;
      }
      if (!ask.empty()) {
        say(ask);
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
    return false;
  }
  std::string answers() const {
    std::ifstream file(answers_);
    return {std::istreambuf_iterator<char>(file), {}};
  }

 private:
  std::filesystem::path answers_;
  pid_t pid_ = 0;
  int input_ = -1;
};

Blob read_file(const std::filesystem::path &path) {
  std::ifstream file(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  return Bytes().text(text).done();
}

uint64_t described_bytes(const json &description) {
  uint64_t bytes = 0;
  for (const json &field : description.value("fields", json::array())) {
    bytes += field.at("size").get<uint64_t>() * field.value("array_len", uint64_t{1});
  }
  for (const json &subsection : description.value("subsections", json::array())) {
    // Type byte, length byte, name, u32 version.
    bytes += 6 + subsection.at("vmsd_name").get<std::string>().size() + described_bytes(subsection);
  }
  return bytes;
}

class RealQemu : public testing::Test {
 protected:
  void SetUp() override {
    if (std::system("qemu-system-x86_64 --version >/dev/null 2>&1") != 0) {
      GTEST_SKIP() << "qemu-system-x86_64 is not installed (package qemu-system-x86)";
    }
    std::string name = (std::filesystem::temp_directory_path() / "qvmstate-unit-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    directory_ = name;
  }
  void TearDown() override {
    if (!directory_.empty()) {
      std::filesystem::remove_all(directory_);
    }
  }
  std::filesystem::path directory_;
};

TEST_F(RealQemu, sections_are_as_long_as_qemu_says) {
  const auto devices_file = directory_ / "devices";
  const auto stream_file = directory_ / "stream";
  {
    Qemu qemu(directory_);
    qemu.say(R"({"execute": "stop"})");
    qemu.say(R"({"execute": "xen-save-devices-state", "id": "saved", "arguments": {"live": false,)"
             R"( "filename": ")" +
             devices_file.string() + R"("}})");
    ASSERT_TRUE(qemu.wait_for(R"("id": "saved")")) << qemu.answers();
    qemu.say(R"({"execute": "migrate", "arguments": {"uri": "exec:cat > )" + stream_file.string() +
             R"("}})");
    ASSERT_TRUE(qemu.wait_for(R"("status": "completed")", R"({"execute": "query-migrate"})"))
        << qemu.answers();
  }

  const Blob stream = read_file(stream_file);
  BlobSource source(stream);
  const auto summary = read_stream(source);
  ASSERT_TRUE(summary) << summary.error().message;
  EXPECT_EQ(summary->stream_bytes, stream.size());
  EXPECT_EQ(summary->machine_type.rfind("pc-i440fx-", 0), 0U) << summary->machine_type;
  EXPECT_EQ(summary->blocks.at(0).idstr, "pc.ram");
  EXPECT_EQ(summary->blocks.at(0).used_bytes, 48 * mib);
  uint64_t ram_bytes = 0;
  for (const StreamBlock &block : summary->blocks) {
    ram_bytes += block.used_bytes;
  }
  EXPECT_GE((summary->data_pages + summary->zero_pages) * page, ram_bytes);

  const json description = json::parse(summary->vmdescription);
  const json &described = description.at("devices");
  ASSERT_GT(described.size(), 15U);
  ASSERT_EQ(summary->devices.size(), described.size());
  for (size_t i = 0; i < described.size(); ++i) {
    const StreamSection &section = summary->devices[i];
    EXPECT_EQ(section.idstr, described[i].at("name"));
    EXPECT_EQ(section.instance, described[i].at("instance_id"));
    EXPECT_EQ(section.bytes, described_bytes(described[i])) << section.idstr;
  }

  // The same sections, and as long, from xen-save-devices-state. globalstate is not among them on
  // every release, so it is not demanded.
  const Blob device_state = read_file(devices_file);
  const auto sections = split_device_sections(device_state);
  ASSERT_TRUE(sections) << sections.error().message;
  for (const StreamSection &section : summary->devices) {
    const auto same = std::ranges::find_if(*sections, [&](const DeviceSection &other) {
      return other.idstr == section.idstr && other.instance == section.instance;
    });
    ASSERT_NE(same, sections->end()) << section.idstr;
    EXPECT_EQ(same->version, section.version) << section.idstr;
    if (section.idstr != "globalstate") {
      EXPECT_EQ(same->body.size(), section.bytes) << section.idstr;
    }
  }
  EXPECT_TRUE(vm_clock_nanos(*sections));

  // And what we write of them describes itself truly.
  FakeRam ram(true);
  const std::vector<Touch> touch(10, Touch::data);
  ram.add_block("pc.ram", touch, 1);
  const Written written = write_stream(ram, {"pc-i440fx-7.2", {}, page}, *sections);
  ASSERT_TRUE(written.stats) << written.stats.error().message;
  BlobSource ours(written.bytes);
  const auto own = read_stream(ours);
  ASSERT_TRUE(own) << own.error().message;
  ASSERT_EQ(own->devices.size(), sections->size());
  const json own_description = json::parse(own->vmdescription);
  for (size_t i = 0; i < sections->size(); ++i) {
    EXPECT_EQ(own->devices[i].bytes, (*sections)[i].body.size());
    EXPECT_EQ(described_bytes(own_description.at("devices")[i]), own->devices[i].bytes);
    EXPECT_TRUE(std::ranges::equal(
        std::span(written.bytes).subspan(own->devices[i].offset, own->devices[i].bytes),
        (*sections)[i].body));
  }
  EXPECT_EQ(described_bytes(own_description.at("configuration")), 4 + summary->machine_type.size());
}

}  // namespace
}  // namespace qvmstate::vmstate::test
