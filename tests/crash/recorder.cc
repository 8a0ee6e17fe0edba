#include "recorder.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <type_traits>

namespace qvmstate::qcow2::test {
namespace {

constexpr size_t sector_bytes = 512;

class ClockedBackend : public io::MemoryBackend {
 public:
  ClockedBackend(Clock &clock, size_t file_index, Bytes contents)
      : MemoryBackend(std::move(contents), clock.options), clock_(clock), file_index_(file_index) {}

  io::BackendCompletion reap() override {
    return counted([&] { return MemoryBackend::reap(); });
  }
  int64_t read_some(void *data, size_t bytes, uint64_t offset) override {
    return counted([&] { return MemoryBackend::read_some(data, bytes, offset); });
  }
  int64_t write_some(const void *data, size_t bytes, uint64_t offset) override {
    return counted([&] { return MemoryBackend::write_some(data, bytes, offset); }, offset);
  }
  int sync() override {
    return counted([&] { return MemoryBackend::sync(); });
  }
  int resize(uint64_t bytes) override {
    return counted([&] { return MemoryBackend::resize(bytes); });
  }
  int preallocate(uint64_t offset, uint64_t bytes) override {
    return counted([&] { return MemoryBackend::preallocate(offset, bytes); });
  }
  int punch_hole(uint64_t offset, uint64_t bytes) override {
    return counted([&] { return MemoryBackend::punch_hole(offset, bytes); });
  }

 private:
  template <class Operation>
  std::invoke_result_t<Operation> counted(Operation operation,
                                          std::optional<uint64_t> written_at = std::nullopt) {
    const bool fails = clock_.operations++ == clock_.fail_at;
    if (fails) {
      clock_.failed = true;
      clock_.failed_offset = written_at;
      clock_.failed_file = file_index_;
      io::MemoryOptions failing = clock_.options;
      failing.faults = {{std::nullopt, 0, -clock_.fail_errno}};
      set_options(failing);
    }
    auto result = operation();
    if (fails) {
      set_options(clock_.options);
    }
    for (; seen_ < journal().size(); ++seen_) {
      clock_.changes.push_back({file_index_, journal()[seen_]});
    }
    return result;
  }

  Clock &clock_;
  size_t file_index_;
  size_t seen_ = 0;
};

Tally totals;

class TallyPrinter : public testing::Environment {
 public:
  void TearDown() override {
    std::printf(
        "crash: %llu cuts, %llu with unsynced writes lost, reordered or torn, %llu failed "
        "operations, %llu runs with transfers cut short, interrupted and refused, %llu recoveries "
        "of pairs; %llu times qemu-img check, %llu times qemu-img convert\n",
        static_cast<unsigned long long>(totals.cuts), static_cast<unsigned long long>(totals.torn),
        static_cast<unsigned long long>(totals.faults),
        static_cast<unsigned long long>(totals.noisy),
        static_cast<unsigned long long>(totals.recoveries),
        static_cast<unsigned long long>(totals.checks),
        static_cast<unsigned long long>(totals.converts));
  }
};
[[maybe_unused]] auto *const printer = testing::AddGlobalTestEnvironment(new TallyPrinter);

}  // namespace

RecordedImage::RecordedImage(Clock &clock, size_t file_index, const std::string &path) {
  auto backend = std::make_unique<ClockedBackend>(clock, file_index, read_file(path));
  backend_ = backend.get();
  file_ = std::make_unique<io::File>(std::move(backend), path, 4);
  auto image = Image::open(*file_);
  if (!image) {
    throw std::runtime_error(image.error().message);
  }
  image_ = std::make_unique<Image>(std::move(*image));
}

void write_sparse(const std::string &path, const Bytes &contents) {
  constexpr size_t piece_bytes = 64 * kib;
  static const Bytes zeros(piece_bytes);
  const int descriptor = open(path.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
  bool done = descriptor >= 0 && ftruncate(descriptor, static_cast<off_t>(contents.size())) == 0;
  for (size_t at = 0; done && at < contents.size(); at += piece_bytes) {
    const size_t bytes = std::min(piece_bytes, contents.size() - at);
    if (std::memcmp(contents.data() + at, zeros.data(), bytes) != 0) {
      done = pwrite(descriptor, contents.data() + at, bytes, static_cast<off_t>(at)) ==
             static_cast<ssize_t>(bytes);
    }
  }
  close(descriptor);
  if (!done) {
    throw std::runtime_error("cannot write " + path);
  }
}

CutFile::CutFile(const std::string &path, const Bytes &contents) : path_(path) {
  write_sparse(path, contents);
  descriptor_ = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (descriptor_ < 0) {
    throw std::runtime_error("cannot open " + path);
  }
}

CutFile::~CutFile() {
  close(descriptor_);
}

void CutFile::write(const std::byte *data, size_t bytes, uint64_t offset) {
  if (pwrite(descriptor_, data, bytes, static_cast<off_t>(offset)) != static_cast<ssize_t>(bytes)) {
    throw std::runtime_error("cannot write " + path_);
  }
}

void CutFile::apply(const io::JournalEntry &entry) {
  const auto size = static_cast<uint64_t>(lseek(descriptor_, 0, SEEK_END));
  const uint64_t end = entry.offset + entry.bytes;
  bool done = true;
  switch (entry.operation) {
    case io::FileOperation::write:
      write(entry.data.data(), entry.data.size(), entry.offset);
      break;
    case io::FileOperation::resize:
      done = ftruncate(descriptor_, static_cast<off_t>(entry.bytes)) == 0;
      break;
    case io::FileOperation::preallocate:
      done = size >= end || ftruncate(descriptor_, static_cast<off_t>(end)) == 0;
      break;
    case io::FileOperation::punch_hole:
      if (entry.offset < size) {
        const Bytes zeros(std::min(end, size) - entry.offset);
        write(zeros.data(), zeros.size(), entry.offset);
      }
      break;
    case io::FileOperation::sync:
    case io::FileOperation::read:
      break;
  }
  if (!done) {
    throw std::runtime_error("cannot change the size of " + path_);
  }
}

void CutFile::apply_torn(const io::JournalEntry &entry, std::mt19937_64 &random) {
  if (entry.operation != io::FileOperation::write) {
    apply(entry);
    return;
  }
  // Sectors lie at multiples of 512 bytes of the file.
  for (uint64_t at = entry.offset; at < entry.offset + entry.bytes;) {
    const uint64_t end =
        std::min(entry.offset + entry.bytes, round_down(at, sector_bytes) + sector_bytes);
    if (random() % 2 == 0) {
      write(entry.data.data() + (at - entry.offset), end - at, at);
    }
    at = end;
  }
}

CacheLoss::CacheLoss(const Clock &clock, size_t changes) : clock_(clock) {
  std::vector<bool> has_sync_behind;
  for (size_t i = changes; i-- > 0;) {
    const Clock::Change &change = clock.changes[i];
    has_sync_behind.resize(std::max(has_sync_behind.size(), change.file + 1));
    if (is_sync(change)) {
      has_sync_behind[change.file] = true;
    }
    (has_sync_behind[change.file] ? synced_ : unsynced_).push_back(i);
  }
  std::reverse(synced_.begin(), synced_.end());
}

void CacheLoss::apply_synced(std::span<CutFile *const> files) const {
  for (const size_t i : synced_) {
    files[clock_.changes[i].file]->apply(clock_.changes[i].entry);
  }
}

void CacheLoss::apply_some(std::span<CutFile *const> files, std::mt19937_64 &random) const {
  std::vector<size_t> order = unsynced_;
  std::shuffle(order.begin(), order.end(), random);
  for (const size_t i : order) {
    CutFile &file = *files[clock_.changes[i].file];
    switch (random() % 3) {
      case 0:
        break;
      case 1:
        file.apply(clock_.changes[i].entry);
        break;
      case 2:
        file.apply_torn(clock_.changes[i].entry, random);
        break;
    }
  }
}

ImageView view_of(const std::string &path) {
  io::OpenOptions options;
  options.direct = io::DirectMode::off;
  options.engine = io::Engine::threads;
  options.depth = 1;
  auto file = io::File::open(path, options);
  if (!file) {
    throw std::runtime_error(file.error().message);
  }
  const auto image = Image::open(**file);
  if (!image) {
    throw std::runtime_error(image.error().message);
  }
  auto seen = view(*image);
  if (!seen) {
    throw std::runtime_error(seen.error().message);
  }
  return std::move(*seen);
}

int fault_errno(uint64_t turn) {
  constexpr int errors[] = {EIO, ENOSPC, EDQUOT};
  return errors[turn % std::size(errors)];
}

unsigned rounds() {
  const char *wanted = std::getenv("QVMSTATE_CRASH_ROUNDS");
  return wanted ? std::max(1U, static_cast<unsigned>(std::strtoul(wanted, nullptr, 10))) : 1;
}

Tally &tally() {
  return totals;
}

std::string checked(const std::string &path) {
  static const bool have = have_qemu_img();
  if (!have) {
    return {};
  }
  ++totals.checks;
  return check_complaint(path);
}

Bytes converted_counted(const std::string &path, const std::string &snapshot) {
  ++totals.converts;
  return converted(path, snapshot);
}

}  // namespace qvmstate::qcow2::test
