#include "vmstate/read_ahead.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace qvmstate::vmstate {

Result<std::unique_ptr<ReadAhead>> ReadAhead::create(StreamSource &source,
                                                     uint64_t expected_bytes) {
  QV_ASSIGN(io::BufferPool pool, io::BufferPool::create());
  const uint64_t end = std::min(expected_bytes, source.bytes_max());
  return std::unique_ptr<ReadAhead>(new ReadAhead(source, std::move(pool), end));
}

ReadAhead::~ReadAhead() {
  // What was read ahead and not asked for may have failed; nobody cares.
  (void)source_.file()->drain();
}

Result<void> ReadAhead::read(StreamOffset offset, std::span<std::byte> to) {
  while (!to.empty()) {
    if (offset.value >= end_) {
      return source_.read(offset, to);
    }
    if (pieces_.empty() || offset.value < pieces_.front().start ||
        offset.value >= pieces_.front().start + pieces_.front().bytes) {
      QV_TRY(restart(offset.value));
    }
    const Piece &piece = pieces_.front();
    QV_TRY(wait_for(piece));
    const uint64_t at = offset.value - piece.start;
    const size_t part = std::min<uint64_t>(to.size(), piece.bytes - at);
    std::memcpy(to.data(), piece.buffer->data + at, part);
    offset += part;
    to = to.subspan(part);
    if (at + part == piece.bytes) {
      pool_.give_back(*piece.buffer);
      pieces_.pop_front();
      QV_TRY(start_more());
    }
  }
  return {};
}

/// Begins anew where somebody reads.
Result<void> ReadAhead::restart(uint64_t offset) {
  QV_TRY(source_.file()->drain());
  for (const Piece &piece : pieces_) {
    pool_.give_back(*piece.buffer);
  }
  pieces_.clear();
  next_ = round_down(offset, io::buffer_bytes_default);
  return start_more();
}

Result<void> ReadAhead::start_more() {
  while (next_ < end_) {
    io::Buffer *const buffer = pool_.take();
    if (buffer == nullptr) {
      break;
    }
    pieces_.push_back({next_, std::min(io::buffer_bytes_default, end_ - next_), buffer});
    next_ += pieces_.back().bytes;
    QV_TRY(start(pieces_.back()));
  }
  return {};
}

Result<void> ReadAhead::start(const Piece &piece) {
  size_t &parts_left = parts_left_[piece.buffer->index];
  parts_left = 0;
  for (uint64_t at = 0; at < piece.bytes;) {
    QV_ASSIGN(const StreamRun run,
              source_.run_at(StreamOffset(piece.start + at), piece.bytes - at));
    const std::span<std::byte> part(piece.buffer->data + at, run.bytes);
    switch (run.kind) {
      case StreamRun::Kind::zeros:
        std::memset(part.data(), 0, part.size());
        break;
      case StreamRun::Kind::in_file:
        parts_left += 1;
        QV_TRY(source_.file()->start_read(part, run.host, io::no_buffer, piece.buffer->index));
        break;
      case StreamRun::Kind::other:
        QV_TRY(source_.read(StreamOffset(piece.start + at), part));
        break;
    }
    at += run.bytes;
  }
  return {};
}

Result<void> ReadAhead::wait_for(const Piece &piece) {
  while (parts_left_[piece.buffer->index] > 0) {
    QV_ASSIGN(const uint64_t cookie, source_.file()->wait_any());
    parts_left_[cookie] -= 1;
  }
  return {};
}

}  // namespace qvmstate::vmstate
