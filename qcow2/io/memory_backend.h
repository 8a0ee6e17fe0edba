// A file in memory behind the seam of the real backends, for tests: it records every change, so
// that a crash after any of them can be replayed, and it fails, cuts and reorders operations by a
// seed.
//
// Asynchronous transfers are carried out, and recorded, when they are reaped: until then the file
// holds nothing of a write, and a buffer that is reused too early is written wrongly, as on a real
// disk.
//
// Threads: one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "qcow2/io/backend.h"
#include "qcow2/io/result.h"

namespace qvmstate::io {

enum class FileOperation { read, write, sync, resize, preallocate, punch_hole };

/// One change, as it was made: of a write that was cut short, the part that was written.
struct JournalEntry {
  FileOperation operation;      ///< never `read`
  uint64_t offset = 0;          ///< 0 for sync and resize
  uint64_t bytes = 0;           ///< resize: the new size; 0 for sync
  std::vector<std::byte> data;  ///< of a write
};

/// The n-th operation (0 is the first) of a kind, or of any kind, has this result.
struct Fault {
  std::optional<FileOperation> operation;
  uint64_t nth = 0;
  int result = 0;  ///< -errno; transfers: so many bytes go through, 0 as well
};

struct MemoryOptions {
  uint32_t direct_alignment = 0;  ///< 0: as if without O_DIRECT
  uint64_t seed = 0;
  // Chances in 100, for each operation.
  unsigned short_percent = 0;        ///< transfers end early; direct ones between two sectors
  unsigned interrupted_percent = 0;  ///< any: EINTR
  unsigned again_percent = 0;        ///< start() and transfers: EAGAIN
  bool out_of_order = false;         ///< reap any of those in flight, not the oldest
  std::vector<Fault> faults;
  /// After so many changes every operation fails with EIO and changes nothing: the power is gone.
  uint64_t changes_max = UINT64_MAX;
};

class MemoryBackend : public Backend {
 public:
  explicit MemoryBackend(std::vector<std::byte> contents = {}, MemoryOptions options = {});

  const std::vector<std::byte> &contents() const { return contents_; }
  const std::vector<JournalEntry> &journal() const { return journal_; }
  /// The file as it was after the first `changes` entries of the journal.
  std::vector<std::byte> contents_after(size_t changes) const;
  /// Makes one recorded change to a file; for tests that lose or reorder changes between syncs.
  static void apply(const JournalEntry &entry, std::vector<std::byte> &contents);

  /// Replaces all options, for faults that begin later; operations are counted anew from here.
  void set_options(MemoryOptions options);

  std::string name() const override { return "fake"; }
  bool direct() const override { return options_.direct_alignment != 0; }
  uint32_t direct_alignment() const override;
  void register_buffers(std::span<const std::span<std::byte>>) override {}
  int start(const BackendOp &op) override;
  BackendCompletion reap() override;
  int64_t read_some(void *data, size_t bytes, uint64_t offset) override;
  int64_t write_some(const void *data, size_t bytes, uint64_t offset) override;
  int sync() override;
  int64_t size() override;
  int resize(uint64_t bytes) override;
  int preallocate(uint64_t offset, uint64_t bytes) override;
  int punch_hole(uint64_t offset, uint64_t bytes) override;
  bool is_block_device() const override { return false; }
  std::vector<int> descriptors() const override { return {}; }

 private:
  bool chance(unsigned percent);
  bool is_dead() const { return journal_.size() >= options_.changes_max; }
  std::optional<int> fault(FileOperation operation);
  size_t cut(size_t bytes, size_t unit);
  int64_t read(void *data, size_t bytes, uint64_t offset, size_t unit);
  int64_t write(const void *data, size_t bytes, uint64_t offset, size_t unit);
  int change(JournalEntry entry);

  MemoryOptions options_;
  std::vector<std::byte> initial_;
  std::vector<std::byte> contents_;
  std::vector<JournalEntry> journal_;
  std::vector<BackendOp> in_flight_;
  std::vector<uint64_t> operations_;  ///< by FileOperation, and of any kind last
  std::mt19937_64 random_;
};

/// A real file's contents, and back.
Result<std::vector<std::byte>> load_contents(const std::string &path);
Result<void> save_contents(const std::string &path, std::span<const std::byte> contents);

}  // namespace qvmstate::io
