// A window that moves over a stream as it is parsed.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "qcow2/io/endian.h"
#include "qcow2/io/offsets.h"
#include "qcow2/io/result.h"
#include "vmstate/stream_source.h"

namespace qvmstate::vmstate {

/// What is taken stands in memory in one piece.
///
/// Threads: one at a time.
class StreamCursor {
 public:
  static constexpr size_t window_bytes = 1 * mib;  // holds any record with its page

  /// Precondition: start <= source.bytes_max().
  StreamCursor(StreamSource &source, StreamOffset start)
      : source_(source),
        memory_(std::min<uint64_t>(window_bytes, source.bytes_max() - start.value)),
        position_(start.value) {}

  uint64_t tell() const { return position_; }
  uint64_t left() const { return source_.bytes_max() - position_; }

  /// The next `bytes` (at most a window) without moving on; valid until the next call.
  Result<std::span<const std::byte>> peek(size_t bytes) {
    if (bytes > left()) {
      return fail(ErrorCode::bad_stream, "vmstate stream: ends in the middle of a record at byte " +
                                             std::to_string(source_.bytes_max()) +
                                             "; it is cut short");
    }
    if (position_ < start_ || position_ + bytes > start_ + filled_) {
      QV_TRY(refill());
    }
    return std::span<const std::byte>(memory_).subspan(position_ - start_, bytes);
  }

  Result<std::span<const std::byte>> take(size_t bytes) {
    QV_ASSIGN(const auto taken, peek(bytes));
    position_ += bytes;
    return taken;
  }

  template <std::unsigned_integral T>
  Result<T> take_integer() {
    QV_ASSIGN(const auto bytes, take(sizeof(T)));
    return load_be<T>(bytes.data());
  }

  Result<std::string> take_text(size_t bytes) {
    QV_ASSIGN(const auto text, take(bytes));
    return std::string(reinterpret_cast<const char *>(text.data()), text.size());
  }

  Result<std::string> take_short_text() {
    QV_ASSIGN(const uint8_t bytes, take_integer<uint8_t>());
    return take_text(bytes);
  }

  /// Any number of bytes, copied.
  Result<std::vector<std::byte>> copy_ahead(uint64_t bytes) {
    std::vector<std::byte> copy(std::min(bytes, left()));
    QV_TRY(source_.read(StreamOffset(position_), copy));
    return copy;
  }

  void skip(uint64_t bytes) { position_ += bytes; }

  // Errors that say how far the stream was read.
  tl::unexpected<Error> bad(const std::string &what) const {
    return fail(ErrorCode::bad_stream, "vmstate stream: " + what + " before byte " +
                                           std::to_string(position_) +
                                           "; it is damaged or not of QEMU");
  }
  tl::unexpected<Error> not_decoded(const std::string &what) const {
    return fail(ErrorCode::not_supported,
                "vmstate stream: " + what + " before byte " + std::to_string(position_) +
                    " is not supported by this program; let QEMU load it");
  }

 private:
  /// Fills the window from the position on, keeping what it already has of that.
  Result<void> refill() {
    const size_t wanted = std::min<uint64_t>(window_bytes, left());
    size_t kept = 0;
    if (position_ >= start_ && position_ < start_ + filled_) {
      kept = start_ + filled_ - position_;
      std::memmove(memory_.data(), memory_.data() + (position_ - start_), kept);
    }
    start_ = position_;
    filled_ = kept;
    QV_TRY(
        source_.read(StreamOffset(start_ + kept), std::span(memory_).subspan(kept, wanted - kept)));
    filled_ = wanted;
    return {};
  }

  StreamSource &source_;
  std::vector<std::byte> memory_;
  uint64_t start_ = 0;  // stream offset of the window
  size_t filled_ = 0;   // bytes of it that are valid
  uint64_t position_;
};

}  // namespace qvmstate::vmstate
