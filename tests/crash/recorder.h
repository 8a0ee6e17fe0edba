// Records what an edit does to image files in memory, and makes the files as a crash would leave
// them.
//
// All files of one recording share a Clock, so that "after the n-th change" means the same moment
// in every file, and "the n-th operation fails" is one operation of all of them.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "qcow2/image.h"
#include "qcow2/io/file.h"
#include "qcow2/io/memory_backend.h"
#include "unit/qcow2/edit_helpers.h"

namespace qvmstate::qcow2::test {

struct Clock {
  struct Change {
    size_t file;
    io::JournalEntry entry;
  };
  std::vector<Change> changes;  ///< of all files, in order
  uint64_t operations = 0;      ///< reads included
  uint64_t fail_at = UINT64_MAX;
  int fail_errno = 0;
  /// Of all files, except for that operation.
  io::MemoryOptions options = [] {
    io::MemoryOptions reordering;
    reordering.out_of_order = true;
    return reordering;
  }();
  bool failed = false;  ///< the operation `fail_at` came
  /// Where it would have written, if it was a synchronous write.
  std::optional<uint64_t> failed_offset;
  size_t failed_file = 0;
};

inline bool is_sync(const Clock::Change &change) {
  return change.entry.operation == io::FileOperation::sync;
}

/// One image in memory, opened.
class RecordedImage {
 public:
  /// Takes the contents of `path`.
  RecordedImage(Clock &clock, size_t file_index, const std::string &path);

  Image &operator*() { return *image_; }
  io::File &file() { return *file_; }
  /// From here on; the clock has those of the start.
  void set_options(const io::MemoryOptions &options) { backend_->set_options(options); }
  const Bytes &contents() const { return backend_->contents(); }

 private:
  std::unique_ptr<io::File> file_;
  io::MemoryBackend *backend_;
  std::unique_ptr<Image> image_;
};

/// A real file that recorded changes are applied to, one after another.
class CutFile {
 public:
  CutFile(const std::string &path, const Bytes &contents);
  ~CutFile();
  CutFile(const CutFile &) = delete;
  CutFile &operator=(const CutFile &) = delete;

  const std::string &path() const { return path_; }
  void apply(const io::JournalEntry &entry);
  /// A write of which some 512-byte sectors never reached the disk.
  void apply_torn(const io::JournalEntry &entry, std::mt19937_64 &random);

 private:
  void write(const std::byte *data, size_t bytes, uint64_t offset);

  std::string path_;
  int descriptor_;
};

/// A crash after the first `changes` of a recording, on disks with a cache.
class CacheLoss {
 public:
  CacheLoss(const Clock &clock, size_t changes);
  size_t unsynced() const { return unsynced_.size(); }
  /// What the crash cannot take away, in order: whatever has a sync of its own file behind it.
  void apply_synced(std::span<CutFile *const> files) const;
  /// Of the rest a random choice is lost, comes in another order, or is written in part.
  void apply_some(std::span<CutFile *const> files, std::mt19937_64 &random) const;

 private:
  const Clock &clock_;
  std::vector<size_t> synced_;  // indices of changes
  std::vector<size_t> unsynced_;
};

/// Writes a file that has holes where `contents` is zero.
void write_sparse(const std::string &path, const Bytes &contents);

/// What the image at `path` holds; throws if it cannot be opened and read.
ImageView view_of(const std::string &path);

/// EIO, ENOSPC and EDQUOT in turn.
int fault_errno(uint64_t turn);

/// How much more than the normal run to do: $QVMSTATE_CRASH_ROUNDS, 1 without it.
unsigned rounds();

/// What a run of the program tried, printed at its end.
struct Tally {
  uint64_t cuts = 0;        ///< crashes after one change, every earlier one on the disk
  uint64_t torn = 0;        ///< crashes with unsynced writes lost, reordered or torn
  uint64_t faults = 0;      ///< operations that failed
  uint64_t noisy = 0;       ///< runs with transfers cut short, interrupted and refused
  uint64_t recoveries = 0;  ///< of image pairs
  uint64_t checks = 0;      ///< by qemu-img check
  uint64_t converts = 0;    ///< disks read by qemu-img convert
};
Tally &tally();

/// check_complaint, counted; nothing where qemu-img is missing.
std::string checked(const std::string &path);
Bytes converted_counted(const std::string &path, const std::string &snapshot);

}  // namespace qvmstate::qcow2::test
