// The disk of a snapshot as bytes: what its own image does not hold comes from the backing files
// below, as QEMU reads it.
//
// Backing files are opened by the names that the images give, relative to the image's folder, with
// the format that the image tells (or, where it tells none, by what they begin with), read only and
// under a reader's lock. Compressed clusters are inflated; encrypted images, external data files
// and other formats are refused by name.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "qcow2/cluster_reader.h"
#include "tools/state_source.h"
#include "vmstate/file_source.h"
#include "vmstate/stream_source.h"

namespace qvmstate::tools {

/// Offsets are those of the disk.
class DiskSource : public vmstate::StreamSource {
 public:
  static Result<std::unique_ptr<DiskSource>> open(const StateLocation &location);

  Result<void> read(StreamOffset offset, std::span<std::byte> to) override;
  uint64_t bytes_max() const override { return layers_.front().bytes; }
  Result<vmstate::StreamRun> run_at(StreamOffset offset, uint64_t bytes) override;

 private:
  /// One image of the chain; either of the two.
  struct Layer {
    std::unique_ptr<OpenImage> image;
    std::unique_ptr<qcow2::ClusterReader> reader;
    std::unique_ptr<vmstate::FileSource> raw;
    qcow2::ImageLock raw_lock;
    uint64_t bytes = 0;  ///< of the disk; past it zeros
  };
  /// What a range is, and which layer has it.
  struct Found {
    bool is_zero;
    uint64_t bytes;
    size_t layer;
  };
  Result<void> add_backing(const std::string &path, bool locked);
  Result<Found> find(uint64_t offset, uint64_t bytes);

  std::vector<Layer> layers_;  ///< the snapshot's image first
};

}  // namespace qvmstate::tools
