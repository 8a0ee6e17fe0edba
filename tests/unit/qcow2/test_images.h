// What the qcow2 tests share: a scratch folder, commands of the host run with their output, bytes
// of files, and images opened the way the program opens them.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "qcow2/image.h"
#include "qcow2/io/endian.h"
#include "qcow2/io/file.h"

namespace qvmstate::qcow2::test {

using Bytes = std::vector<std::byte>;

/// A folder that goes away with the object.
class ScratchFolder {
 public:
  ScratchFolder();
  ~ScratchFolder();
  ScratchFolder(const ScratchFolder &) = delete;
  ScratchFolder &operator=(const ScratchFolder &) = delete;
  std::string path(std::string_view name) const { return folder_ / name; }

 private:
  std::filesystem::path folder_;
};

struct CommandResult {
  int status = -1;     ///< exit status; -1 if it did not exit by itself
  std::string output;  ///< standard output and error together
};
CommandResult run_command(const std::vector<std::string> &words);
/// Whether `tool` starts and answers --version.
bool have_tool(const std::string &tool);

/// A command that waits for lines on its standard input, until finish().
class RunningCommand {
 public:
  explicit RunningCommand(const std::vector<std::string> &words);
  ~RunningCommand();
  RunningCommand(const RunningCommand &) = delete;
  RunningCommand &operator=(const RunningCommand &) = delete;
  /// Reads output until `text` came; false at its end.
  bool wait_for_output(std::string_view text);
  void send(std::string_view line);
  /// Closes its input and waits for its end.
  void finish();

 private:
  pid_t pid_ = -1;
  int input_ = -1;
  int output_ = -1;
  std::string seen_;
};

Bytes read_file(const std::string &path);
void write_file(const std::string &path, std::span<const std::byte> bytes);
/// Overwrites a big-endian integer in a file.
template <class T>
void patch_file(const std::string &path, uint64_t offset, T value) {
  Bytes bytes = read_file(path);
  store_be<T>(bytes.data() + offset, value);
  write_file(path, bytes);
}

/// A valid image made by hand: cluster 0 header, 1 refcount table, 2 refcount block, 3 L1 table of
/// 4 entries (the first points at cluster 4), 4 L2 table (its first three entries point at clusters
/// 5, 6, 7), 5 to 7 data of bytes 0x55, 0x66, 0x77. The disk is two spans, so a vmstate would start
/// at L1 entry 2.
Bytes minimal_image(uint32_t cluster_bits = 9, uint32_t version = 3, bool extended_l2 = false);

/// Bytes that look different at every place but have only 16 values, so that deflate gains on them.
Bytes compressible_bytes(size_t count, uint32_t seed);

/// Opens for reading, buffered; fails the test and ends it where that does not work.
std::unique_ptr<io::File> open_file(const std::string &path);

}  // namespace qvmstate::qcow2::test
