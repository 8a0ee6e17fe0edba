// A source that is read from its beginning to its end, at the speed of the disk: several pieces are
// on their way while one is looked at.
//
// Other reads are passed on as they are. Nothing is read ahead that was not expected to be there,
// so what lies behind the stream does no harm.
//
// Threads: one at a time.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "qcow2/io/buffer_pool.h"
#include "qcow2/io/offsets.h"
#include "qcow2/io/result.h"
#include "vmstate/stream_source.h"

namespace qvmstate::vmstate {

class ReadAhead : public StreamSource {
 public:
  /// `source` must have a file() and outlive this; `expected_bytes` is about where the stream ends.
  static Result<std::unique_ptr<ReadAhead>> create(StreamSource &source, uint64_t expected_bytes);
  ~ReadAhead() override;  ///< waits for transfers in flight
  ReadAhead(const ReadAhead &) = delete;
  ReadAhead &operator=(const ReadAhead &) = delete;

  Result<void> read(StreamOffset offset, std::span<std::byte> to) override;
  uint64_t bytes_max() const override { return source_.bytes_max(); }
  Result<StreamRun> run_at(StreamOffset offset, uint64_t bytes) override {
    return source_.run_at(offset, bytes);
  }

 private:
  struct Piece {
    uint64_t start;  ///< in the stream: a multiple of a buffer's size
    uint64_t bytes;
    io::Buffer *buffer;
  };

  ReadAhead(StreamSource &source, io::BufferPool pool, uint64_t end)
      : source_(source), pool_(std::move(pool)), end_(end), parts_left_(pool_.count()) {}
  Result<void> start_more();
  Result<void> start(const Piece &piece);
  Result<void> wait_for(const Piece &piece);
  Result<void> restart(uint64_t offset);

  StreamSource &source_;
  io::BufferPool pool_;
  const uint64_t end_;
  uint64_t next_ = 0;               // where the next piece to start begins
  std::deque<Piece> pieces_;        // adjacent, in order
  std::vector<size_t> parts_left_;  // of each buffer, transfers in flight
};

}  // namespace qvmstate::vmstate
