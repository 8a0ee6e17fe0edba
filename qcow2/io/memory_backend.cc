// A file in memory, with a journal and seeded faults.
#include "qcow2/io/memory_backend.h"

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <utility>

#include "qcow2/io/file.h"

namespace qvmstate::io {

namespace {

/// Larger files than this are a mistake of the test.
constexpr uint64_t contents_bytes_max = 4 * gib;
constexpr size_t any_operation = 6;  ///< index behind the last FileOperation

}  // namespace

MemoryBackend::MemoryBackend(std::vector<std::byte> contents, MemoryOptions options)
    : initial_(contents), contents_(std::move(contents)) {
  set_options(std::move(options));
}

void MemoryBackend::set_options(MemoryOptions options) {
  options_ = std::move(options);
  operations_.assign(any_operation + 1, 0);
  random_.seed(options_.seed);
}

uint32_t MemoryBackend::direct_alignment() const {
  return options_.direct_alignment == 0 ? 1 : options_.direct_alignment;
}

std::vector<std::byte> MemoryBackend::contents_after(size_t changes) const {
  assert(changes <= journal_.size());
  std::vector<std::byte> contents = initial_;
  for (size_t i = 0; i < changes; ++i) {
    apply(journal_[i], contents);
  }
  return contents;
}

void MemoryBackend::apply(const JournalEntry &entry, std::vector<std::byte> &contents) {
  const uint64_t end = entry.offset + entry.bytes;
  switch (entry.operation) {
    case FileOperation::read:
      assert(false);
      break;
    case FileOperation::sync:
      break;
    case FileOperation::write:
      contents.resize(std::max<uint64_t>(contents.size(), end));
      std::ranges::copy(entry.data, contents.begin() + static_cast<ptrdiff_t>(entry.offset));
      break;
    case FileOperation::resize:
      contents.resize(entry.bytes);
      break;
    case FileOperation::preallocate:
      contents.resize(std::max<uint64_t>(contents.size(), end));
      break;
    case FileOperation::punch_hole:
      for (uint64_t i = entry.offset; i < std::min<uint64_t>(end, contents.size()); ++i) {
        contents[i] = std::byte{0};
      }
      break;
  }
}

bool MemoryBackend::chance(unsigned percent) {
  return percent > 0 && random_() % 100 < percent;
}

/// Counts the operation; the result it must have instead of being carried out, if any.
std::optional<int> MemoryBackend::fault(FileOperation operation) {
  const uint64_t nth_of_kind = operations_[static_cast<size_t>(operation)]++;
  const uint64_t nth_of_any = operations_[any_operation]++;
  if (is_dead()) {
    return -EIO;
  }
  for (const Fault &fault : options_.faults) {
    if (fault.operation ? *fault.operation == operation && fault.nth == nth_of_kind
                        : fault.nth == nth_of_any) {
      return fault.result;
    }
  }
  if (chance(options_.interrupted_percent)) {
    return -EINTR;
  }
  const bool is_transfer = operation == FileOperation::read || operation == FileOperation::write;
  if (is_transfer && chance(options_.again_percent)) {
    return -EAGAIN;
  }
  return std::nullopt;
}

/// How many of the bytes of a transfer go through: a whole number of units, the last one aside.
size_t MemoryBackend::cut(size_t bytes, size_t unit) {
  const size_t units = divide_up(bytes, unit);
  if (units > 1 && chance(options_.short_percent)) {
    return (1 + random_() % (units - 1)) * unit;
  }
  return bytes;
}

int MemoryBackend::change(JournalEntry entry) {
  if (entry.offset > contents_bytes_max || entry.bytes > contents_bytes_max - entry.offset) {
    return -EFBIG;
  }
  apply(entry, contents_);
  journal_.push_back(std::move(entry));
  return 0;
}

int64_t MemoryBackend::read_some(void *data, size_t bytes, uint64_t offset) {
  return read(data, bytes, offset, 1);
}

int64_t MemoryBackend::write_some(const void *data, size_t bytes, uint64_t offset) {
  return write(data, bytes, offset, 1);
}

int64_t MemoryBackend::read(void *data, size_t bytes, uint64_t offset, size_t unit) {
  const std::optional<int> forced = fault(FileOperation::read);
  if (forced && *forced <= 0) {
    return *forced;
  }
  if (offset >= contents_.size()) {
    return 0;
  }
  const size_t there = std::min<uint64_t>(bytes, contents_.size() - offset);
  const size_t count = forced ? std::min<size_t>(*forced, there) : cut(there, unit);
  std::memcpy(data, contents_.data() + offset, count);
  return static_cast<int64_t>(count);
}

int64_t MemoryBackend::write(const void *data, size_t bytes, uint64_t offset, size_t unit) {
  const std::optional<int> forced = fault(FileOperation::write);
  if (forced && *forced <= 0) {
    return *forced;
  }
  const size_t count = forced ? std::min<size_t>(*forced, bytes) : cut(bytes, unit);
  const auto *from = static_cast<const std::byte *>(data);
  const int result = change({FileOperation::write, offset, count, {from, from + count}});
  return result < 0 ? result : static_cast<int64_t>(count);
}

int MemoryBackend::sync() {
  if (const std::optional<int> result = fault(FileOperation::sync)) {
    return *result;
  }
  return change({FileOperation::sync, 0, 0, {}});
}

int64_t MemoryBackend::size() {
  return is_dead() ? -EIO : static_cast<int64_t>(contents_.size());
}

int MemoryBackend::resize(uint64_t bytes) {
  if (const std::optional<int> result = fault(FileOperation::resize)) {
    return *result;
  }
  return change({FileOperation::resize, 0, bytes, {}});
}

int MemoryBackend::preallocate(uint64_t offset, uint64_t bytes) {
  if (const std::optional<int> result = fault(FileOperation::preallocate)) {
    return *result;
  }
  return change({FileOperation::preallocate, offset, bytes, {}});
}

int MemoryBackend::punch_hole(uint64_t offset, uint64_t bytes) {
  if (const std::optional<int> result = fault(FileOperation::punch_hole)) {
    return *result;
  }
  return change({FileOperation::punch_hole, offset, bytes, {}});
}

int MemoryBackend::start(const BackendOp &op) {
  assert(op.bytes > 0);
  if (chance(options_.again_percent)) {
    return -EAGAIN;
  }
  in_flight_.push_back(op);
  return 0;
}

BackendCompletion MemoryBackend::reap() {
  assert(!in_flight_.empty());
  const size_t which = options_.out_of_order ? random_() % in_flight_.size() : 0;
  const BackendOp op = in_flight_[which];
  in_flight_.erase(in_flight_.begin() + static_cast<ptrdiff_t>(which));
  const uint32_t unit = is_aligned(op, direct_alignment()) ? direct_alignment() : 1;
  return {op.cookie, op.kind == OpKind::read ? read(op.data, op.bytes, op.offset, unit)
                                             : write(op.data, op.bytes, op.offset, unit)};
}

Result<std::vector<std::byte>> load_contents(const std::string &path) {
  QV_ASSIGN(const std::unique_ptr<File> file, File::open(path, {}));
  QV_ASSIGN(const uint64_t bytes, file->size());
  std::vector<std::byte> contents(bytes);
  QV_TRY(file->read_at(contents, HostOffset(0)));
  return contents;
}

Result<void> save_contents(const std::string &path, std::span<const std::byte> contents) {
  std::ofstream stream(path, std::ios::binary | std::ios::trunc);
  stream.write(reinterpret_cast<const char *>(contents.data()),
               static_cast<std::streamsize>(contents.size()));
  stream.close();
  if (!stream) {
    return fail_errno(errno, path + ": cannot write " + std::to_string(contents.size()) + " bytes");
  }
  return {};
}

}  // namespace qvmstate::io
