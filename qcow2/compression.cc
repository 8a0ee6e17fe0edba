#include "qcow2/compression.h"

#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <array>
#include <cerrno>

namespace qvmstate::qcow2 {
namespace {

constexpr int deflate_window_bits = -12;  // raw deflate, 4 KiB window
constexpr int deflate_memory_level = 8;
// The fastest: RAM is written once and read seldom, and the CPU is what limits.
constexpr int deflate_level = 1;
constexpr int zstd_level = 1;

/// Whether the bytes look like noise (or are compressed or encrypted already): all values about
/// equally often in a sample. Trying to compress that takes long and gains nothing.
bool looks_random(std::span<const std::byte> cluster) {
  constexpr size_t samples_max = 4096;
  const size_t step = cluster.size() / samples_max | 1;  // odd: not always the same byte of a word
  std::array<uint32_t, 256> counts = {};
  uint64_t samples = 0;
  for (size_t at = 0; at < cluster.size(); at += step, ++samples) {
    ++counts[static_cast<uint8_t>(cluster[at])];
  }
  uint64_t squares = 0;
  for (const uint64_t count : counts) {
    squares += count * count;
  }
  const uint64_t expected = samples + samples * (samples - 1) / counts.size();
  return squares < expected + expected / 8;
}

bool inflate_cluster(std::span<const std::byte> stored, std::span<std::byte> cluster) {
  z_stream stream = {};
  stream.next_in = reinterpret_cast<Bytef *>(const_cast<std::byte *>(stored.data()));
  stream.avail_in = static_cast<uInt>(stored.size());
  stream.next_out = reinterpret_cast<Bytef *>(cluster.data());
  stream.avail_out = static_cast<uInt>(cluster.size());
  if (inflateInit2(&stream, deflate_window_bits) != Z_OK) {
    return false;
  }
  const int status = inflate(&stream, Z_FINISH);
  inflateEnd(&stream);
  return status == Z_STREAM_END && stream.avail_out == 0;
}

bool expand_zstd(std::span<const std::byte> stored, std::span<std::byte> cluster) {
  const std::unique_ptr<ZSTD_DCtx, size_t (*)(ZSTD_DCtx *)> context(ZSTD_createDCtx(),
                                                                    ZSTD_freeDCtx);
  if (!context) {
    return false;
  }
  ZSTD_inBuffer in = {stored.data(), stored.size(), 0};
  ZSTD_outBuffer out = {cluster.data(), cluster.size(), 0};
  while (out.pos < out.size) {
    const size_t in_before = in.pos;
    const size_t out_before = out.pos;
    const size_t status = ZSTD_decompressStream(context.get(), &out, &in);
    if (ZSTD_isError(status) != 0 || (in.pos == in_before && out.pos == out_before)) {
      return false;
    }
  }
  return true;
}

}  // namespace

struct ClusterCompressor::State {
  uint8_t type = 0;
  z_stream deflate = {};
  ZSTD_CCtx *zstd = nullptr;

  ~State() {
    if (type == compression_deflate) {
      deflateEnd(&deflate);
    } else {
      ZSTD_freeCCtx(zstd);
    }
  }
};

ClusterCompressor::ClusterCompressor(std::unique_ptr<State> state) : state_(std::move(state)) {}
ClusterCompressor::~ClusterCompressor() = default;

Result<std::unique_ptr<ClusterCompressor>> ClusterCompressor::create(uint8_t compression_type) {
  auto state = std::make_unique<State>();
  state->type = compression_type;
  bool begun = false;
  if (compression_type == compression_deflate) {
    begun = deflateInit2(&state->deflate, deflate_level, Z_DEFLATED, deflate_window_bits,
                         deflate_memory_level, Z_DEFAULT_STRATEGY) == Z_OK;
  } else {
    state->zstd = ZSTD_createCCtx();
    begun = state->zstd != nullptr;
  }
  if (!begun) {
    return fail_errno(ENOMEM, "compressing clusters");
  }
  return std::unique_ptr<ClusterCompressor>(new ClusterCompressor(std::move(state)));
}

size_t ClusterCompressor::compress(std::span<const std::byte> cluster, std::span<std::byte> to) {
  if (looks_random(cluster)) {
    return 0;
  }
  if (state_->type == compression_zstd) {
    const size_t bytes = ZSTD_compressCCtx(state_->zstd, to.data(), to.size(), cluster.data(),
                                           cluster.size(), zstd_level);
    return ZSTD_isError(bytes) != 0 ? 0 : bytes;
  }
  z_stream &stream = state_->deflate;
  deflateReset(&stream);
  stream.next_in = reinterpret_cast<Bytef *>(const_cast<std::byte *>(cluster.data()));
  stream.avail_in = static_cast<uInt>(cluster.size());
  stream.next_out = reinterpret_cast<Bytef *>(to.data());
  stream.avail_out = static_cast<uInt>(to.size());
  return deflate(&stream, Z_FINISH) == Z_STREAM_END ? to.size() - stream.avail_out : 0;
}

bool expand_cluster(uint8_t compression_type, std::span<const std::byte> stored,
                    std::span<std::byte> cluster) {
  return compression_type == compression_zstd ? expand_zstd(stored, cluster)
                                              : inflate_cluster(stored, cluster);
}

}  // namespace qvmstate::qcow2
