// Where the bytes of a stream come from: a vmstate area, a migration file, memory.
//
// Threads: one at a time uses a source; who reads in parallel opens several.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "qcow2/io/file.h"
#include "qcow2/io/offsets.h"
#include "qcow2/io/result.h"

namespace qvmstate::vmstate {

/// How some bytes of a stream can be had.
struct StreamRun {
  enum class Kind : uint8_t {
    zeros,    ///< nothing is stored: they need not be read
    in_file,  ///< at `host` of the source's file(), in one piece
    other,    ///< through read() only
  };
  Kind kind = Kind::other;
  uint64_t bytes = 0;
  HostOffset host;  ///< in_file only
};

/// Bytes of a stream by offset; `to` may reach past the stream's end, where bytes are arbitrary
/// (a vmstate area has no exact end), but not past what can be read at all: then an error.
class StreamSource {
 public:
  virtual ~StreamSource() = default;
  virtual Result<void> read(StreamOffset offset, std::span<std::byte> to) = 0;
  /// The stream certainly ends at or before this; every byte before it can be read.
  virtual uint64_t bytes_max() const = 0;
  /// What lies at `offset`, for at least 1 and at most `bytes` bytes. Preconditions: bytes > 0,
  /// offset + bytes <= bytes_max().
  virtual Result<StreamRun> run_at(StreamOffset offset, uint64_t bytes);
  /// The file of runs `in_file`, for asynchronous reads; it belongs to the source. Null: there are
  /// no such runs.
  virtual io::File *file() { return nullptr; }
};

}  // namespace qvmstate::vmstate
