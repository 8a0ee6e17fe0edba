// The stream of a migration file: the whole file, so that offsets in a mapped-ram stream fit, with
// the stream beginning anywhere in it.
#pragma once

#include <memory>
#include <span>
#include <string>

#include "qcow2/io/file.h"
#include "vmstate/stream_source.h"

namespace qvmstate::vmstate {

/// Opens the file behind `file` once more, whatever its name leads to by now.
Result<std::unique_ptr<io::File>> reopen_file(const io::File &file, const io::OpenOptions &options);

class FileSource : public StreamSource {
 public:
  /// The size is asked once; a file that grows afterwards is read up to there.
  static Result<std::unique_ptr<FileSource>> create(std::unique_ptr<io::File> file);

  Result<void> read(StreamOffset offset, std::span<std::byte> to) override;
  uint64_t bytes_max() const override { return file_bytes_; }
  Result<StreamRun> run_at(StreamOffset offset, uint64_t bytes) override;
  io::File *file() override { return file_.get(); }

 private:
  FileSource(std::unique_ptr<io::File> file, uint64_t file_bytes)
      : file_(std::move(file)), file_bytes_(file_bytes) {}
  void find_extent(uint64_t offset);

  std::unique_ptr<io::File> file_;
  uint64_t file_bytes_;
  // What the file system said last: data or a hole, in [start, end).
  bool extent_is_hole_ = false;
  uint64_t extent_start_ = 0;
  uint64_t extent_end_ = 0;
};

}  // namespace qvmstate::vmstate
