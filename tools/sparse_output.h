// A file that appears under its name only when it is complete: until then it has a temporary name
// beside it, and goes away if that never happens. What is not written is a hole, if it is large
// enough to be worth one.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "qcow2/io/buffer_pool.h"
#include "qcow2/io/file.h"
#include "qcow2/io/offsets.h"
#include "qcow2/io/result.h"

namespace qvmstate::tools {

/// Threads: one. Readable by its owner only: RAM holds secrets.
class SparseOutput {
 public:
  /// Refuses a name that exists.
  static Result<std::unique_ptr<SparseOutput>> create(const std::string &path, uint64_t bytes);
  ~SparseOutput();
  SparseOutput(const SparseOutput &) = delete;
  SparseOutput &operator=(const SparseOutput &) = delete;

  /// To what io::File::open() takes; stays valid as long as this lives.
  std::string open_path() const;
  const std::string &name() const { return path_; }
  /// Flushes to the disk and gives the file its name. All writers must have finished.
  Result<void> finish();

 private:
  SparseOutput(std::string path, std::string temporary, int descriptor)
      : path_(std::move(path)), temporary_(std::move(temporary)), descriptor_(descriptor) {}

  std::string path_;
  std::string temporary_;  ///< empty: it has its name
  int descriptor_;
};

/// Writes to a SparseOutput asynchronously, bytes that follow one another in one transfer.
///
/// Threads: one at a time. Several writers may write to the same output; short gaps are written as
/// zeros, unless leave_gap() says that they belong to another one.
class SparseWriter {
 public:
  static Result<std::unique_ptr<SparseWriter>> create(const SparseOutput &output,
                                                      const io::OpenOptions &options,
                                                      size_t buffers);
  ~SparseWriter();
  SparseWriter(const SparseWriter &) = delete;
  SparseWriter &operator=(const SparseWriter &) = delete;

  /// Takes a copy. A later write of the same place wins.
  Result<void> write(uint64_t offset, std::span<const std::byte> data);
  /// The next write() does not fill the gap before it: somebody else writes there.
  void leave_gap() { may_fill_gap_ = false; }
  /// What was written there so far; zeros where nothing was. Waits for what is being written.
  Result<void> read_back(uint64_t offset, std::span<std::byte> to);
  /// Makes a range zeros again, if any of it was written.
  Result<void> zero(uint64_t offset, uint64_t bytes);
  /// Waits until everything is written.
  Result<void> finish();

 private:
  SparseWriter(io::BufferPool pool, std::unique_ptr<io::File> file)
      : pool_(std::move(pool)), file_(std::move(file)) {}
  uint64_t gap_before(uint64_t offset) const;
  Result<void> flush();
  Result<void> land_one();

  io::BufferPool pool_;  // before the file, which may have registered the memory
  std::unique_ptr<io::File> file_;
  io::Buffer *current_ = nullptr;
  uint64_t current_offset_ = 0;
  uint64_t written_end_ = 0;  ///< nothing was written from here on
  bool may_fill_gap_ = true;
};

}  // namespace qvmstate::tools
