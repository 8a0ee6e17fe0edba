// Where the bytes of a stream lie in a file: asked by those who write streams, answered by what
// holds them (the vmstate area of a qcow2 image, a plain migration file).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "qcow2/io/offsets.h"
#include "qcow2/io/result.h"

namespace qvmstate::io {

struct HostRun {
  HostOffset offset;
  uint64_t bytes = 0;
};

struct StreamRange {
  StreamOffset from;
  uint64_t bytes = 0;
};

/// For a stream written from its first byte to its last.
class Placement {
 public:
  virtual ~Placement() = default;
  /// The place of stream bytes [from, from + bytes); runs in order, their sizes add up to `bytes`.
  /// Called with ascending, adjacent ranges.
  virtual Result<void> place(StreamOffset from, uint64_t bytes, std::vector<HostRun> &runs) = 0;
  /// The last buffer is padded with zeros to a multiple of this (a divisor of the buffer size, at
  /// least the O_DIRECT alignment), and place() is asked for the padded length.
  virtual uint64_t unit_bytes() const = 0;
};

/// For a stream whose parts are written in any order, and some more than once. What is never placed
/// reads as zeros, and so does what is never written of it.
class FixedPlacement {
 public:
  virtual ~FixedPlacement() = default;
  /// The places of ranges that will be written now, ascending and disjoint; appends runs in that
  /// order, at least one a range, their sizes adding up to the ranges'. The same bytes are given
  /// the same place each time.
  virtual Result<void> place_at(std::span<const StreamRange> ranges,
                                std::vector<HostRun> &runs) = 0;
  /// Ranges of one call that cover one such unit of the stream wholly let it be laid out for speed.
  virtual uint64_t place_unit_bytes() const = 0;
};

}  // namespace qvmstate::io
