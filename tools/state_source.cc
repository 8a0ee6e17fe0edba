#include "tools/state_source.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <utility>

#include "qcow2/io/endian.h"
#include "vmstate/file_source.h"
#include "vmstate/snapshot_source.h"
#include "vmstate/stream_format.h"

namespace qvmstate::tools {

namespace {

Result<std::unique_ptr<io::File>> open_buffered(const std::string &path) {
  io::OpenOptions options;
  options.direct = io::DirectMode::off;
  return io::File::open(path, options);
}

}  // namespace

Result<OpenImage> open_image(const std::string &path, bool writable, bool locked) {
  OpenImage opened;
  if (writable) {
    QV_ASSIGN(opened.file, io::File::open(path, {.writable = true}));
  } else {
    QV_ASSIGN(opened.file, open_buffered(path));
  }
  if (locked) {
    const qcow2::LockRole role =
        writable ? qcow2::LockRole::writer : qcow2::LockRole::stable_reader;
    auto lock = qcow2::ImageLock::take(opened.file->descriptors(), role, path);
    if (!lock) {
      if (lock.error().code == ErrorCode::locked) {
        lock.error().message +=
            writable ? "; on a running VM use --qmp" : "; or read it as it is with --force-share";
      }
      return tl::unexpected(std::move(lock).error());
    }
    opened.lock = std::move(*lock);
  }
  QV_ASSIGN(opened.image, qcow2::Image::open(*opened.file));
  return opened;
}

Result<const qcow2::Snapshot *> named_snapshot(const qcow2::Image &image, const std::string &name) {
  const int index = qcow2::find_snapshot(image.snapshots(), name);
  if (index < 0) {
    return fail(ErrorCode::not_found,
                fmt::format("{}: has no snapshot named '{}'; `qvmstate list` shows what it has",
                            image.name(), name));
  }
  return &image.snapshots()[static_cast<size_t>(index)];
}

Result<bool> is_migration_file(const StateLocation &location) {
  if (location.offset) {
    return true;
  }
  QV_ASSIGN(const auto file, open_buffered(location.path));
  std::array<std::byte, 4> magic;
  QV_TRY(file->read_or_zero_at(magic, HostOffset(0)));
  return load_be<uint32_t>(magic.data()) == vmstate::stream_magic;
}

Result<StateSource> StateSource::open(const StateLocation &location) {
  StateSource source;
  QV_ASSIGN(const bool is_file, is_migration_file(location));
  if (is_file) {
    if (!location.name.empty()) {
      return fail(ErrorCode::bad_argument,
                  fmt::format("{}: is read as a migration file, which has no snapshots: leave out "
                              "'{}'",
                              location.path, location.name));
    }
    QV_ASSIGN(auto file, open_buffered(location.path));
    QV_ASSIGN(source.stream_, vmstate::FileSource::create(std::move(file)));
    source.start_ = StreamOffset(location.offset.value_or(0));
    source.name_ = location.path;
    return source;
  }
  source.image_ = std::make_unique<OpenImage>();
  QV_ASSIGN(*source.image_, open_image(location.path, false, !location.force_share));
  const qcow2::Image &image = source.image_->image;
  if (location.name.empty()) {
    return fail(ErrorCode::bad_argument,
                location.path +
                    ": is no migration file: name one of the snapshots that `qvmstate list` shows, "
                    "or say with --offset where in the file a stream begins");
  }
  QV_ASSIGN(source.snapshot_, named_snapshot(image, location.name));
  source.name_ = fmt::format("{}: VM state of snapshot '{}'", location.path, location.name);
  if (source.snapshot_->vmstate_bytes == 0) {
    return fail(ErrorCode::not_found,
                fmt::format("{}: snapshot '{}' has no VM state, only that of the disk; look for it "
                            "in the VM's other images",
                            location.path, location.name));
  }
  QV_ASSIGN(source.stream_, vmstate::SnapshotSource::create(image, *source.snapshot_));
  return source;
}

Result<std::unique_ptr<vmstate::StreamSource>> StateSource::reopen(
    const io::OpenOptions &options) const {
  if (snapshot_ != nullptr) {
    QV_ASSIGN(auto source, vmstate::SnapshotSource::reopen(image_->image, *snapshot_, options));
    return std::unique_ptr<vmstate::StreamSource>(std::move(source));
  }
  QV_ASSIGN(auto file, vmstate::reopen_file(*stream_->file(), options));
  QV_ASSIGN(auto source, vmstate::FileSource::create(std::move(file)));
  return std::unique_ptr<vmstate::StreamSource>(std::move(source));
}

}  // namespace qvmstate::tools
