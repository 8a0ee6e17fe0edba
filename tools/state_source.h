// The VM state that a command reads: of a snapshot in a qcow2 image, or in a migration file.
//
// An image is held by the lock of a reader, so that no VM starts to write what is being read; with
// force-share by none. Migration files are not locked by anybody.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "qcow2/image.h"
#include "qcow2/io/file.h"
#include "qcow2/locks.h"
#include "vmstate/stream_source.h"

namespace qvmstate::tools {

struct OpenImage {
  std::unique_ptr<io::File> file;
  qcow2::ImageLock lock;
  qcow2::Image image;
};
Result<OpenImage> open_image(const std::string &path, bool writable, bool locked);

/// The snapshot of that name, or not_found.
Result<const qcow2::Snapshot *> named_snapshot(const qcow2::Image &image, const std::string &name);

struct StateLocation {
  std::string path;
  std::string name;                ///< of the snapshot; empty for a migration file
  std::optional<uint64_t> offset;  ///< where in a migration file the stream begins
  bool force_share = false;
};

/// Whether the location is a migration file: an offset was given, or its first bytes say so.
Result<bool> is_migration_file(const StateLocation &location);

class StateSource {
 public:
  static Result<StateSource> open(const StateLocation &location);
  vmstate::StreamSource &stream() { return *stream_; }
  StreamOffset start() const { return start_; }
  /// For error messages: the file, and the snapshot in it.
  const std::string &name() const { return name_; }
  /// One more source of the same bytes, for a thread of its own.
  Result<std::unique_ptr<vmstate::StreamSource>> reopen(const io::OpenOptions &options) const;

 private:
  std::unique_ptr<OpenImage> image_;  ///< null: a migration file
  const qcow2::Snapshot *snapshot_ = nullptr;
  std::unique_ptr<vmstate::StreamSource> stream_;
  StreamOffset start_;
  std::string name_;
};

}  // namespace qvmstate::tools
