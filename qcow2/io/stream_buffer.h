// A sequential stream gathered in 1 MiB buffers that are written asynchronously.
//
// The writer asks for space(), fills it, and says advance(). A full buffer is flushed at once: its
// place in the file is asked of a Placement, its transfers start, and filling goes on in the next
// free buffer; only when none is free the stream waits. Only the last buffer, and the one before a
// skip(), may be partial: finish() pads it with zeros to the placement's unit, writes it and waits
// for all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "qcow2/io/buffer_pool.h"
#include "qcow2/io/file.h"
#include "qcow2/io/offsets.h"
#include "qcow2/io/placement.h"
#include "qcow2/io/result.h"

namespace qvmstate::io {

/// Called after each flushed buffer with the bytes flushed so far; an error (cancelled) stops the
/// stream. May sleep to keep to a rate.
using FlushHook = std::function<Result<void>(uint64_t bytes_flushed)>;

/// Called before each buffer is written, with the stream's bytes in it (without the padding).
using DataHook = std::function<void(std::span<const std::byte> data)>;

/// The first error, of the file, the placement or the hook, stops the stream: every later call
/// returns it. The file's asynchronous side and the pool belong to the stream while it lives; file,
/// pool and placement must outlive it. Transfers name the pool's buffers by index: register
/// pool.memory() with the file's backend first to make use of that.
///
/// Threads: one at a time.
class StreamBuffer {
 public:
  StreamBuffer(File &file, BufferPool &pool, Placement &placement, FlushHook hook = {},
               DataHook data_hook = {});
  ~StreamBuffer();  ///< waits for transfers in flight; their result is lost unless finish() ran
  StreamBuffer(const StreamBuffer &) = delete;
  StreamBuffer &operator=(const StreamBuffer &) = delete;

  /// Free room in the current buffer, never empty. Valid until the next call other than advance().
  [[nodiscard]] Result<std::span<std::byte>> space();
  /// `bytes` of the last space() are filled now. Flushes a buffer that became full.
  [[nodiscard]] Result<void> advance(size_t bytes);
  /// Copies bytes in, over buffer borders.
  [[nodiscard]] Result<void> put(std::span<const std::byte> bytes);
  /// Leaves out bytes of the stream that are placed already, or will be before the next are put;
  /// what is in the buffer must fill units of the placement, and is flushed.
  [[nodiscard]] Result<void> skip(uint64_t bytes);
  /// Stream position: all bytes so far, those still in the buffer included.
  uint64_t tell() const { return position_; }
  /// All bytes before this position were written by the file.
  uint64_t landed() const;
  /// Pads, writes and waits for everything. Nothing may follow.
  [[nodiscard]] Result<void> finish();

 private:
  Result<void> flush_current();
  Result<void> write_current();
  Result<Buffer *> free_buffer();
  Result<void> reap_one();
  Result<void> stopped() const;
  tl::unexpected<Error> stop(Error error);
  void give_back_all();

  File &file_;
  BufferPool &pool_;
  Placement &placement_;
  FlushHook hook_;
  DataHook data_hook_;
  Buffer *current_ = nullptr;
  uint64_t position_ = 0;
  uint64_t flushed_ = 0;
  std::vector<uint64_t> starts_;  // of each buffer in flight, its position
  bool finished_ = false;
  std::optional<Error> error_;
  std::vector<HostRun> runs_;
};

}  // namespace qvmstate::io
