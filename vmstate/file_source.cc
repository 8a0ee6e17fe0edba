#include "vmstate/file_source.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>
#include <vector>

namespace qvmstate::vmstate {

Result<std::unique_ptr<io::File>> reopen_file(const io::File &file,
                                              const io::OpenOptions &options) {
  const std::vector<int> descriptors = file.descriptors();
  if (descriptors.empty()) {
    return fail(ErrorCode::not_supported, file.name() + ": cannot be opened a second time");
  }
  return io::File::open("/proc/self/fd/" + std::to_string(descriptors.front()), options,
                        file.name());
}

Result<std::unique_ptr<FileSource>> FileSource::create(std::unique_ptr<io::File> file) {
  QV_ASSIGN(const uint64_t file_bytes, file->size());
  return std::unique_ptr<FileSource>(new FileSource(std::move(file), file_bytes));
}

Result<void> FileSource::read(StreamOffset offset, std::span<std::byte> to) {
  return file_->read_at(to, HostOffset(offset.value));
}

/// Asks the file system for its holes (lseek(2)). What it cannot tell is taken as data.
void FileSource::find_extent(uint64_t offset) {
  extent_is_hole_ = false;
  extent_start_ = offset;
  extent_end_ = file_bytes_;
  const std::vector<int> descriptors = file_->descriptors();
  if (descriptors.empty() || file_->backend().is_block_device()) {
    return;
  }
  const auto at = static_cast<off_t>(offset);
  const off_t data = ::lseek(descriptors.front(), at, SEEK_DATA);
  if (data < 0) {
    extent_is_hole_ = errno == ENXIO;  // no data up to the end
    return;
  }
  extent_is_hole_ = data > at;
  const off_t end = extent_is_hole_ ? data : ::lseek(descriptors.front(), at, SEEK_HOLE);
  if (end > at) {
    extent_end_ = std::min(file_bytes_, static_cast<uint64_t>(end));
  }
}

Result<StreamRun> FileSource::run_at(StreamOffset offset, uint64_t bytes) {
  if (offset.value < extent_start_ || offset.value >= extent_end_) {
    find_extent(offset.value);
  }
  return StreamRun{extent_is_hole_ ? StreamRun::Kind::zeros : StreamRun::Kind::in_file,
                   std::min(bytes, extent_end_ - offset.value), HostOffset(offset.value)};
}

}  // namespace qvmstate::vmstate
