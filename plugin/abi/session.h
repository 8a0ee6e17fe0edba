// An open image: its descriptors, its locks, its list of snapshots.
//
// Threads: one at a time.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "plugin/abi/failure.h"
#include "plugin/abi/open_images.h"
#include "plugin/qvmstate.h"
#include "qcow2/image.h"
#include "qcow2/io/descriptors.h"
#include "qcow2/io/file.h"
#include "qcow2/locks.h"

namespace qvmstate::abi {

class Session {
 public:
  static Outcome<std::unique_ptr<Session>> open(const qvmstate_session_options &options);

  const std::string &name() const { return name_; }
  bool is_writable() const { return writable_; }
  qcow2::Image &image() { return image_; }
  io::File &file() { return *file_; }
  /// One more File over the same open files, for a thread of its own.
  Result<std::unique_ptr<io::File>> another_file(unsigned depth) const;

  Outcome<void> delete_snapshot(const char *name);
  void log(qvmstate_log_level level, const std::string &line) const;

 private:
  Session(const qvmstate_session_options &options, std::string name);
  Result<void> open_descriptors(const qvmstate_session_options &options, io::DirectMode direct);

  std::string name_;
  bool writable_;
  qvmstate_log_fn log_;
  void *log_user_;
  OpenImage open_image_;
  io::Descriptors descriptors_;
  std::unique_ptr<io::File> file_;
  qcow2::ImageLock lock_;
  qcow2::Image image_;
};

}  // namespace qvmstate::abi
