#include "tools/sparse_output.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

namespace qvmstate::tools {

namespace {

// A smaller hole costs more, in transfers and in extents of the file system, than it saves.
constexpr uint64_t gap_bytes_max = 32 * kib;

tl::unexpected<Error> exists(const std::string &path) {
  return fail(ErrorCode::exists, path + ": exists already; remove it or choose another name");
}

/// Renames without replacing anything; 0 or the errno.
int rename_new(const char *from, const char *to) {
  if (::renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) == 0) {
    return 0;
  }
  if (errno != EINVAL && errno != ENOSYS) {
    return errno;
  }
  // The file system cannot. A second name cannot replace anything either, where there are any.
  if (::link(from, to) != 0) {
    return errno;
  }
  return ::unlink(from) == 0 ? 0 : errno;
}

}  // namespace

Result<std::unique_ptr<SparseOutput>> SparseOutput::create(const std::string &path,
                                                           uint64_t bytes) {
  struct stat status = {};
  if (::lstat(path.c_str(), &status) == 0) {
    return exists(path);
  }
  std::string temporary = path + ".part-XXXXXX";
  const int descriptor = ::mkostemp(temporary.data(), O_CLOEXEC);
  if (descriptor < 0) {
    return fail_errno(errno, path + ": cannot create a file beside it");
  }
  auto output =
      std::unique_ptr<SparseOutput>(new SparseOutput(path, std::move(temporary), descriptor));
  if (::ftruncate(descriptor, static_cast<off_t>(bytes)) != 0) {
    return fail_errno(errno, path + ": cannot make a file of " + std::to_string(bytes) + " bytes");
  }
  return output;
}

SparseOutput::~SparseOutput() {
  ::close(descriptor_);
  if (!temporary_.empty()) {
    ::unlink(temporary_.c_str());
  }
}

std::string SparseOutput::open_path() const {
  return "/proc/self/fd/" + std::to_string(descriptor_);
}

Result<void> SparseOutput::finish() {
  if (::fdatasync(descriptor_) != 0) {
    return fail_errno(errno, path_ + ": cannot flush to the disk");
  }
  const int error = rename_new(temporary_.c_str(), path_.c_str());
  if (error == EEXIST) {
    return exists(path_);
  }
  if (error != 0) {
    return fail_errno(error, path_ + ": cannot rename " + temporary_ + " to it");
  }
  temporary_.clear();
  return {};
}

Result<std::unique_ptr<SparseWriter>> SparseWriter::create(const SparseOutput &output,
                                                           const io::OpenOptions &options,
                                                           size_t buffers) {
  io::OpenOptions writable = options;
  writable.writable = true;
  QV_ASSIGN(auto file, io::File::open(output.open_path(), writable, output.name()));
  QV_ASSIGN(io::BufferPool pool, io::BufferPool::create(buffers));
  auto writer = std::unique_ptr<SparseWriter>(new SparseWriter(std::move(pool), std::move(file)));
  writer->file_->backend().register_buffers(writer->pool_.memory());
  return writer;
}

SparseWriter::~SparseWriter() {
  (void)file_->drain();  // Nobody wants what was not finished.
}

Result<void> SparseWriter::write(uint64_t offset, std::span<const std::byte> data) {
  if (const uint64_t gap = gap_before(offset); gap > 0) {
    std::memset(current_->data + current_->used, 0, gap);
    current_->used += gap;
  }
  may_fill_gap_ = true;
  while (!data.empty()) {
    if (current_ != nullptr &&
        (current_->used == current_->capacity || current_offset_ + current_->used != offset)) {
      QV_TRY(flush());
    }
    if (current_ == nullptr) {
      if (offset < written_end_) {
        // Two transfers to one place could end in any order.
        while (file_->pending() > 0) {
          QV_TRY(land_one());
        }
      }
      current_ = pool_.take();
      while (current_ == nullptr) {
        QV_TRY(land_one());
        current_ = pool_.take();
      }
      current_offset_ = offset;
    }
    const size_t part = std::min(data.size(), current_->capacity - current_->used);
    std::memcpy(current_->data + current_->used, data.data(), part);
    current_->used += part;
    offset += part;
    data = data.subspan(part);
    written_end_ = std::max(written_end_, offset);
  }
  return {};
}

/// How many zeros bring the current buffer up to `offset`, if that is worth it and nothing else was
/// written there; otherwise 0.
uint64_t SparseWriter::gap_before(uint64_t offset) const {
  if (current_ == nullptr) {
    return 0;
  }
  const uint64_t end = current_offset_ + current_->used;
  const bool fits = may_fill_gap_ && end == written_end_ && offset > end &&
                    offset - end <= gap_bytes_max &&
                    offset - end < current_->capacity - current_->used;
  return fits ? offset - end : 0;
}

Result<void> SparseWriter::read_back(uint64_t offset, std::span<std::byte> to) {
  if (offset >= written_end_) {
    std::ranges::fill(to, std::byte{0});
    return {};
  }
  QV_TRY(finish());
  return file_->read_or_zero_at(to, HostOffset(offset));
}

Result<void> SparseWriter::zero(uint64_t offset, uint64_t bytes) {
  if (offset >= written_end_) {
    return {};
  }
  static constexpr size_t piece_bytes = 4096;
  static const std::vector<std::byte> zeros(piece_bytes);
  const uint64_t end = std::min(offset + bytes, written_end_);
  while (offset < end) {
    const uint64_t part = std::min<uint64_t>(piece_bytes, end - offset);
    QV_TRY(write(offset, std::span(zeros).first(part)));
    offset += part;
  }
  return {};
}

Result<void> SparseWriter::flush() {
  io::Buffer &buffer = *std::exchange(current_, nullptr);
  pool_.send_off(buffer, 1);
  return file_->start_write({buffer.data, buffer.used}, HostOffset(current_offset_), buffer.index,
                            buffer.index);
}

Result<void> SparseWriter::land_one() {
  QV_ASSIGN(const uint64_t cookie, file_->wait_any());
  pool_.part_landed(pool_.at(static_cast<unsigned>(cookie)));
  return {};
}

Result<void> SparseWriter::finish() {
  if (current_ != nullptr) {
    QV_TRY(flush());
  }
  while (file_->pending() > 0) {
    QV_TRY(land_one());
  }
  return {};
}

}  // namespace qvmstate::tools
