// The plain file that a save goes to instead of a qcow2: begun, written by one or more threads, and
// in the end either there as a whole or not at all.
//
// Where the bytes go until finish():
// - a path without an offset: to a new file without a name in the same folder (mode 0600; owner and
//   mode of the file that it replaces, if there is one). finish() gives it the name. What had
//   the name before stays as it was until then and after every failure, a kill included. A symlink
//   is followed: the file that it leads to is replaced, the link stays.
// - a path with an offset: into the file itself from there on, as QEMU's `file:PATH,offset=N` does.
//   It is made if it is not there (0600). What lay behind the offset is cut off at once. abort()
//   cuts again, and removes a file that was made.
// - a block device: into the device, from the offset (0 if none) on. It keeps its size and what a
//   failed save wrote.
// - passed descriptors: as with a path and an offset; the file is never removed.
//
// Offsets in file() and channel() are those of the file, the given offset included.
//
// Several Files over one file: a page of the page cache must not be written buffered through one
// while O_DIRECT writes it through another (file.h says why; a File only watches itself). Ranges
// that start and end at multiples of 4096 keep them apart.
//
// Threads: one at a time uses a TargetFile, and one at a time each of its Files; finish() and
// abort() when no other uses any.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "qcow2/io/descriptors.h"
#include "qcow2/io/file.h"
#include "qcow2/io/result.h"

namespace qvmstate::io {

struct TargetOptions {
  DirectMode direct = DirectMode::automatic;
  Engine engine = Engine::automatic;
  unsigned depth = 8;     ///< transfers in flight, of each File
  unsigned channels = 0;  ///< Files beside file()
};

class TargetFile {
 public:
  /// Errors: bad_argument (neither a regular file nor a block device), locked (somebody holds a
  /// lock on it, as QEMU does on an image in use), not_supported (a name that cannot be replaced;
  /// says to give an offset), and those of File::open. Nothing is changed by a refusal.
  static Result<std::unique_ptr<TargetFile>> open(const std::string &path,
                                                  std::optional<uint64_t> offset,
                                                  const TargetOptions &options);
  /// The descriptors belong to the target from the call on (Descriptors::adopt says what they must
  /// be); they are closed when it ends, and on every refusal. `shown_name` is for messages.
  static Result<std::unique_ptr<TargetFile>> adopt(std::span<const int> passed, uint64_t offset,
                                                   const TargetOptions &options,
                                                   const std::string &shown_name);
  ~TargetFile();  ///< abort(), unless finished
  TargetFile(const TargetFile &) = delete;
  TargetFile &operator=(const TargetFile &) = delete;

  const std::string &name() const { return name_; }  ///< path, or what adopt() was given
  uint64_t offset() const { return offset_; }        ///< where the save begins
  bool is_block_device() const { return descriptors_.is_block_device(); }
  File &file() { return *files_.front(); }
  unsigned channels() const { return static_cast<unsigned>(files_.size() - 1); }
  File &channel(unsigned index);
  uint64_t bytes_written() const;  ///< through all Files

  /// Whether `bytes` from offset() on have room: on the device, or in the file system (by what it
  /// says now). ErrorCode::no_space otherwise.
  Result<void> check_room(uint64_t bytes) const;

  /// Waits for every File, ends a regular file at `end_bytes` (of the file; at least offset()),
  /// flushes it, and makes it visible. After an error abort() is still due, unless the error says
  /// that the file is there.
  Result<void> finish(uint64_t end_bytes);
  /// Leaves nothing behind. Later calls do nothing.
  Result<void> abort();

 private:
  TargetFile(std::string name, uint64_t offset) : name_(std::move(name)), offset_(offset) {}
  Result<void> begin_replacing(const std::string &path, DirectMode direct);
  Result<void> begin_in_place(const std::string &path, DirectMode direct);
  Result<void> cut_off();
  Result<void> open_files(const TargetOptions &options);
  Result<void> give_name();
  Result<void> sync_folder() const;

  std::string name_;
  uint64_t offset_;
  Descriptors descriptors_;
  std::vector<std::unique_ptr<File>> files_;  // the first is file(), then the channels

  std::string final_path_;      // to be replaced, or of the file that was made; else empty
  std::string temporary_path_;  // while the new file has that name; else empty
  bool replaces_ = false;
  std::optional<struct stat> made_;      // the file that was made in place
  std::optional<uint64_t> abort_bytes_;  // size to cut back to
  bool is_over_ = false;
};

}  // namespace qvmstate::io
