#include "vmstate/read_ahead_source.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

namespace qvmstate::vmstate {

Result<std::unique_ptr<ReadAheadSource>> ReadAheadSource::create(
    std::unique_ptr<StreamSource> source) {
  QV_ASSIGN(io::BufferPool pool, io::BufferPool::create());
  auto ahead =
      std::unique_ptr<ReadAheadSource>(new ReadAheadSource(std::move(source), std::move(pool)));
  if (io::File *const file = ahead->source_->file()) {
    file->backend().register_buffers(ahead->pool_.memory());
  }
  return ahead;
}

ReadAheadSource::~ReadAheadSource() {
  if (io::File *const file = source_->file()) {
    (void)file->drain();  // Nobody wants what is still read.
  }
}

Result<void> ReadAheadSource::read(StreamOffset offset, std::span<std::byte> to) {
  if (offset.value > bytes_max() || to.size() > bytes_max() - offset.value) {
    return source_->read(offset, to);  // says what is wrong
  }
  while (!to.empty()) {
    if (pieces_.empty() || offset.value < pieces_.front().offset ||
        offset.value >= next_ + pool_.count() * io::buffer_bytes_default) {
      QV_TRY(start_at(offset.value));
    }
    QV_TRY(fill());
    const Piece &front = pieces_.front();
    const uint64_t front_end = front.offset + front.buffer->used;
    if (offset.value >= front_end) {
      QV_TRY(wait_for(front));
      drop_front();
      continue;
    }
    QV_TRY(wait_for(front));
    const size_t part = std::min<uint64_t>(to.size(), front_end - offset.value);
    std::memcpy(to.data(), front.buffer->data + (offset.value - front.offset), part);
    to = to.subspan(part);
    offset += part;
  }
  return {};
}

/// Forgets what is there and goes on at the piece that holds `offset`.
Result<void> ReadAheadSource::start_at(uint64_t offset) {
  while (!pieces_.empty()) {
    QV_TRY(wait_for(pieces_.front()));
    drop_front();
  }
  next_ = round_down(offset, io::buffer_bytes_default);
  return {};
}

Result<void> ReadAheadSource::fill() {
  while (next_ < bytes_max()) {
    io::Buffer *const buffer = pool_.take();
    if (buffer == nullptr) {
      return {};
    }
    buffer->used = std::min<uint64_t>(buffer->capacity, bytes_max() - next_);
    pool_.send_off(*buffer, 1);
    pieces_.push_back({buffer, next_, 0});
    next_ += buffer->used;
    QV_TRY(start_piece(pieces_.back()));
  }
  return {};
}

Result<void> ReadAheadSource::start_piece(Piece &piece) {
  io::Buffer &buffer = *piece.buffer;
  for (uint64_t at = 0; at < buffer.used;) {
    const StreamOffset offset(piece.offset + at);
    QV_ASSIGN(const StreamRun run, source_->run_at(offset, buffer.used - at));
    const std::span<std::byte> part(buffer.data + at, run.bytes);
    switch (run.kind) {
      case StreamRun::Kind::zeros:
        std::memset(part.data(), 0, part.size());
        break;
      case StreamRun::Kind::in_file:
        piece.parts_left += 1;
        QV_TRY(source_->file()->start_read(part, run.host, buffer.index, buffer.index));
        break;
      case StreamRun::Kind::other:
        QV_TRY(source_->read(offset, part));
        break;
    }
    at += run.bytes;
  }
  return {};
}

Result<void> ReadAheadSource::wait_for(const Piece &piece) {
  while (piece.parts_left > 0) {
    QV_ASSIGN(const uint64_t cookie, source_->file()->wait_any());
    std::ranges::find(pieces_, &pool_.at(static_cast<unsigned>(cookie)), &Piece::buffer)
        ->parts_left -= 1;
  }
  return {};
}

void ReadAheadSource::drop_front() {
  pool_.part_landed(*pieces_.front().buffer);
  pieces_.pop_front();
}

}  // namespace qvmstate::vmstate
