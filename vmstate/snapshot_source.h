// The stream of a snapshot: what the vmstate area of a qcow2 image maps.
#pragma once

#include <memory>
#include <span>

#include "qcow2/cluster_reader.h"
#include "qcow2/image.h"
#include "qcow2/io/file.h"
#include "vmstate/stream_source.h"

namespace qvmstate::vmstate {

class SnapshotSource : public StreamSource {
 public:
  /// Of an image that somebody else keeps open, longer than this lives.
  static Result<std::unique_ptr<SnapshotSource>> create(const qcow2::Image &image,
                                                        const qcow2::Snapshot &snapshot);
  /// Of the image in `file`, for a channel of its own. `snapshot` must still be in it as it is
  /// here.
  static Result<std::unique_ptr<SnapshotSource>> over(std::unique_ptr<io::File> file,
                                                      const qcow2::Snapshot &snapshot);
  /// The same, opening the file behind `image` once more, whatever its name leads to by now.
  static Result<std::unique_ptr<SnapshotSource>> reopen(const qcow2::Image &image,
                                                        const qcow2::Snapshot &snapshot,
                                                        const io::OpenOptions &options);

  Result<void> read(StreamOffset offset, std::span<std::byte> to) override;
  uint64_t bytes_max() const override { return reader_.mapped_bytes(); }
  Result<StreamRun> run_at(StreamOffset offset, uint64_t bytes) override;
  io::File *file() override { return &image_->file(); }

 private:
  struct Owned {
    std::unique_ptr<io::File> file;
    qcow2::Image image;
  };
  SnapshotSource(std::unique_ptr<Owned> owned, const qcow2::Image &image,
                 const qcow2::Snapshot &snapshot, uint64_t file_bytes)
      : owned_(std::move(owned)),
        image_(&image),
        reader_(image, snapshot),
        file_bytes_(file_bytes) {}

  std::unique_ptr<Owned> owned_;  ///< null: the image is somebody else's
  const qcow2::Image *image_;
  qcow2::VmstateReader reader_;
  uint64_t file_bytes_;  ///< clusters that reach past it read as zeros there
};

}  // namespace qvmstate::vmstate
