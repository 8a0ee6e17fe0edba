#include "vmstate/snapshot_source.h"

#include <string>
#include <utility>

#include "vmstate/file_source.h"

namespace qvmstate::vmstate {

Result<std::unique_ptr<SnapshotSource>> SnapshotSource::create(const qcow2::Image &image,
                                                               const qcow2::Snapshot &snapshot) {
  QV_ASSIGN(const uint64_t file_bytes, image.file().size());
  return std::unique_ptr<SnapshotSource>(new SnapshotSource(nullptr, image, snapshot, file_bytes));
}

Result<std::unique_ptr<SnapshotSource>> SnapshotSource::reopen(const qcow2::Image &image,
                                                               const qcow2::Snapshot &snapshot,
                                                               const io::OpenOptions &options) {
  QV_ASSIGN(auto file, reopen_file(image.file(), options));
  return over(std::move(file), snapshot);
}

Result<std::unique_ptr<SnapshotSource>> SnapshotSource::over(std::unique_ptr<io::File> file,
                                                             const qcow2::Snapshot &snapshot) {
  auto owned = std::make_unique<Owned>();
  owned->file = std::move(file);
  QV_ASSIGN(owned->image, qcow2::Image::open(*owned->file));
  for (const qcow2::Snapshot &found : owned->image.snapshots()) {
    if (found.id == snapshot.id && found.name == snapshot.name &&
        found.l1_offset == snapshot.l1_offset && found.l1_entries == snapshot.l1_entries) {
      QV_ASSIGN(const uint64_t file_bytes, owned->file->size());
      const qcow2::Image &own = owned->image;
      return std::unique_ptr<SnapshotSource>(
          new SnapshotSource(std::move(owned), own, found, file_bytes));
    }
  }
  return fail(ErrorCode::not_found, owned->image.name() + ": snapshot '" + snapshot.name +
                                        "' was deleted or replaced while it was read");
}

Result<void> SnapshotSource::read(StreamOffset offset, std::span<std::byte> to) {
  return reader_.read(offset, to);
}

Result<StreamRun> SnapshotSource::run_at(StreamOffset offset, uint64_t bytes) {
  QV_ASSIGN(const qcow2::ClusterReader::Run run, reader_.run_at(offset, bytes));
  StreamRun result{StreamRun::Kind::other, run.bytes, HostOffset(0)};
  switch (run.kind) {
    case qcow2::ClusterKind::unallocated:
    case qcow2::ClusterKind::zero:
    case qcow2::ClusterKind::zero_allocated:
      result.kind = StreamRun::Kind::zeros;
      break;
    case qcow2::ClusterKind::data:
      if (run.host.value >= file_bytes_) {
        result.kind = StreamRun::Kind::zeros;
      } else if (run.bytes <= file_bytes_ - run.host.value) {
        result.kind = StreamRun::Kind::in_file;
        result.host = run.host;
      }
      break;
    case qcow2::ClusterKind::compressed:
      break;
  }
  return result;
}

}  // namespace qvmstate::vmstate
