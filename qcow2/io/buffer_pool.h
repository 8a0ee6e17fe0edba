// The buffers of a save: allocated once, page aligned, each free, filling or in flight.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "qcow2/io/offsets.h"
#include "qcow2/io/result.h"

namespace qvmstate::io {

constexpr size_t buffer_bytes_default = 1 * mib;
constexpr size_t buffer_count_default = 8;
constexpr size_t buffer_count_min = 2;
constexpr size_t buffer_alignment = 4096;  ///< covers the 512 promised and 4Kn disks

enum class BufferState { free, filling, in_flight };

struct Buffer {
  std::byte *data = nullptr;
  size_t capacity = 0;
  size_t used = 0;
  unsigned index = 0;
  unsigned parts_in_flight = 0;  ///< a buffer that spans two host runs is written in two parts
  BufferState state = BufferState::free;
};

/// Threads: one at a time.
class BufferPool {
 public:
  static Result<BufferPool> create(size_t count = buffer_count_default,
                                   size_t bytes = buffer_bytes_default);
  BufferPool(BufferPool &&) noexcept;
  BufferPool &operator=(BufferPool &&) noexcept;
  ~BufferPool();

  /// A free buffer, now filling and empty; nullptr if there is none.
  Buffer *take();
  /// filling -> in flight, in so many transfers.
  void send_off(Buffer &buffer, unsigned parts);
  /// One of them ended; with the last one in_flight -> free.
  void part_landed(Buffer &buffer);
  /// filling or in_flight -> free; nothing may touch its memory any more.
  void give_back(Buffer &buffer);
  Buffer &at(unsigned index) { return buffers_[index]; }
  size_t count() const { return buffers_.size(); }
  std::vector<std::span<std::byte>> memory() const;

 private:
  BufferPool() = default;
  std::byte *base_ = nullptr;
  size_t total_bytes_ = 0;
  std::vector<Buffer> buffers_;
};

}  // namespace qvmstate::io
