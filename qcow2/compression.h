// Compressed clusters: what their bytes are.
//
// Compression type 0 is raw deflate in a window of 4 KiB, by zlib; type 1 is zstd, one or more
// frames that expand to exactly one cluster. What follows them in their last sector is of somebody
// else. Format: QEMU docs/interop/qcow2.txt, "Compressed Clusters Descriptor".
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "qcow2/io/result.h"

namespace qvmstate::qcow2 {

constexpr uint8_t compression_deflate = 0;
constexpr uint8_t compression_zstd = 1;

/// Threads: one at a time.
class ClusterCompressor {
 public:
  static Result<std::unique_ptr<ClusterCompressor>> create(uint8_t compression_type);
  ~ClusterCompressor();
  /// Compresses a cluster to `to`, which has less room than that; the bytes it took, or 0 if it
  /// does not fit, or looks as if it did not.
  size_t compress(std::span<const std::byte> cluster, std::span<std::byte> to);

 private:
  struct State;
  explicit ClusterCompressor(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

/// Expands to the whole of `cluster`; false if the bytes are not those of one.
bool expand_cluster(uint8_t compression_type, std::span<const std::byte> stored,
                    std::span<std::byte> cluster);

}  // namespace qvmstate::qcow2
