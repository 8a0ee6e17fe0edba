#include "test_images.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <stdexcept>

namespace qvmstate::qcow2::test {
namespace {

/// Starts `words` with its standard input from `input` (or /dev/null) and its output to `output`.
pid_t start(const std::vector<std::string> &words, int input, int output) {
  std::vector<char *> arguments;
  for (const std::string &word : words) {
    arguments.push_back(const_cast<char *>(word.c_str()));
  }
  arguments.push_back(nullptr);
  const pid_t pid = fork();
  if (pid == 0) {
    dup2(input >= 0 ? input : open("/dev/null", O_RDONLY), STDIN_FILENO);
    dup2(output, STDOUT_FILENO);
    dup2(output, STDERR_FILENO);
    execvp(arguments[0], arguments.data());
    _exit(127);
  }
  return pid;
}

struct Pipe {
  Pipe() {
    if (pipe2(ends, O_CLOEXEC) != 0) {
      throw std::runtime_error("no pipe");
    }
  }
  int ends[2];
};

}  // namespace

ScratchFolder::ScratchFolder() {
  std::string pattern = std::filesystem::temp_directory_path() / "qvmstate-test-XXXXXX";
  if (!mkdtemp(pattern.data())) {
    throw std::runtime_error("no scratch folder " + pattern);
  }
  folder_ = pattern;
}

ScratchFolder::~ScratchFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

CommandResult run_command(const std::vector<std::string> &words) {
  Pipe output;
  const pid_t pid = start(words, -1, output.ends[1]);
  close(output.ends[1]);
  CommandResult result;
  char buffer[4096];
  for (ssize_t count; (count = read(output.ends[0], buffer, sizeof buffer)) > 0;) {
    result.output.append(buffer, count);
  }
  close(output.ends[0]);
  int status = 0;
  if (pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status)) {
    result.status = WEXITSTATUS(status);
  }
  return result;
}

bool have_tool(const std::string &tool) {
  return run_command({tool, "--version"}).status == 0;
}

RunningCommand::RunningCommand(const std::vector<std::string> &words) {
  Pipe input, output;
  pid_ = start(words, input.ends[0], output.ends[1]);
  close(input.ends[0]);
  close(output.ends[1]);
  input_ = input.ends[1];
  output_ = output.ends[0];
}

RunningCommand::~RunningCommand() {
  finish();
}

bool RunningCommand::wait_for_output(std::string_view text) {
  while (seen_.find(text) == std::string::npos) {
    char buffer[4096];
    const ssize_t count = read(output_, buffer, sizeof buffer);
    if (count <= 0) {
      return false;
    }
    seen_.append(buffer, count);
  }
  return true;
}

void RunningCommand::send(std::string_view line) {
  seen_.clear();
  const std::string text = std::string(line) + "\n";
  EXPECT_EQ(write(input_, text.data(), text.size()), static_cast<ssize_t>(text.size()));
}

void RunningCommand::finish() {
  if (pid_ <= 0) {
    return;
  }
  close(input_);
  char buffer[4096];
  while (read(output_, buffer, sizeof buffer) > 0) {
  }
  close(output_);
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

Bytes read_file(const std::string &path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("cannot read " + path);
  }
  Bytes bytes(std::filesystem::file_size(path));
  file.read(reinterpret_cast<char *>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  return bytes;
}

void write_file(const std::string &path, std::span<const std::byte> bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char *>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  if (!file.flush()) {
    throw std::runtime_error("cannot write " + path);
  }
}

Bytes minimal_image(uint32_t cluster_bits, uint32_t version, bool extended_l2) {
  const uint64_t cluster = uint64_t{1} << cluster_bits;
  const uint64_t l2_entry_bytes = extended_l2 ? 16 : 8;
  const uint64_t span = cluster / l2_entry_bytes * cluster;
  Bytes image(8 * cluster);
  const auto put32 = [&image](uint64_t offset, uint32_t value) {
    store_be<uint32_t>(image.data() + offset, value);
  };
  const auto put64 = [&image](uint64_t offset, uint64_t value) {
    store_be<uint64_t>(image.data() + offset, value);
  };
  put32(0, 0x514649fb);
  put32(4, version);
  put32(20, cluster_bits);
  put64(24, 2 * span);     // disk size
  put32(36, 4);            // L1 entries
  put64(40, 3 * cluster);  // L1 offset
  put64(48, 1 * cluster);  // refcount table
  put32(56, 1);            // its clusters
  if (version == 3) {
    put64(72, extended_l2 ? 0x10 : 0);  // incompatible features
    put32(96, 4);                       // 16-bit refcounts
    put32(100, 104);                    // header length
  }
  put64(1 * cluster, 2 * cluster);
  for (uint64_t i = 0; i < 8; ++i) {
    store_be<uint16_t>(image.data() + 2 * cluster + 2 * i, 1);
  }
  constexpr uint64_t copied = uint64_t{1} << 63;
  put64(3 * cluster, copied | 4 * cluster);
  for (uint64_t i = 0; i < 3; ++i) {
    put64(4 * cluster + i * l2_entry_bytes, copied | (5 + i) * cluster);
    if (extended_l2) {
      put64(4 * cluster + i * l2_entry_bytes + 8, 0xffffffff);  // all subclusters allocated
    }
    std::fill_n(image.begin() + static_cast<int64_t>((5 + i) * cluster), cluster,
                static_cast<std::byte>(0x55 + 0x11 * i));
  }
  return image;
}

Bytes compressible_bytes(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  Bytes bytes(count);
  for (std::byte &byte : bytes) {
    byte = static_cast<std::byte>('a' + random() % 16);
  }
  return bytes;
}

std::unique_ptr<io::File> open_file(const std::string &path) {
  io::OpenOptions options;
  options.direct = io::DirectMode::off;
  options.engine = io::Engine::threads;
  auto file = io::File::open(path, options);
  if (!file) {
    throw std::runtime_error(file.error().message);
  }
  return std::move(*file);
}

}  // namespace qvmstate::qcow2::test
