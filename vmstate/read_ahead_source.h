// Reads a source ahead of whoever reads it in order: several pieces are in flight while one is
// used.
//
// Going back or far ahead works and starts anew. Where the source knows no place in its file (a
// compressed cluster), that part is read at once.
#pragma once

#include <deque>
#include <memory>
#include <span>

#include "qcow2/io/buffer_pool.h"
#include "vmstate/stream_source.h"

namespace qvmstate::vmstate {

class ReadAheadSource : public StreamSource {
 public:
  /// The source's file() belongs to this from now on.
  static Result<std::unique_ptr<ReadAheadSource>> create(std::unique_ptr<StreamSource> source);
  ~ReadAheadSource() override;
  ReadAheadSource(const ReadAheadSource &) = delete;
  ReadAheadSource &operator=(const ReadAheadSource &) = delete;

  Result<void> read(StreamOffset offset, std::span<std::byte> to) override;
  uint64_t bytes_max() const override { return source_->bytes_max(); }
  Result<StreamRun> run_at(StreamOffset offset, uint64_t bytes) override {
    return source_->run_at(offset, bytes);
  }

 private:
  struct Piece {
    io::Buffer *buffer;
    uint64_t offset;  ///< of the stream
    unsigned parts_left;
  };
  ReadAheadSource(std::unique_ptr<StreamSource> source, io::BufferPool pool)
      : pool_(std::move(pool)), source_(std::move(source)) {}
  Result<void> start_at(uint64_t offset);
  Result<void> fill();
  Result<void> start_piece(Piece &piece);
  Result<void> wait_for(const Piece &piece);
  void drop_front();

  io::BufferPool pool_;  // before the source, whose file may have registered the memory
  std::unique_ptr<StreamSource> source_;
  std::deque<Piece> pieces_;  ///< one after the other
  uint64_t next_ = 0;         ///< where the piece after the last one begins
};

}  // namespace qvmstate::vmstate
