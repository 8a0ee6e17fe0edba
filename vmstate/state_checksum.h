// A checksum of a whole VM state, kept in the snapshot's extra data, so that it is committed by the
// same write as the snapshot and QEMU carries it along.
//
// What is hashed: the stream's bytes as a loader reads them, in pieces from its first byte (the
// last one ends where the stream does), each by XXH3-128; the checksum is the XXH3-128 of the
// pieces' digests one after the other. So pieces can be hashed in any order by any thread, and what
// is a hole or a zero cluster counts as the zeros that it reads as. Pieces have 1 MiB, or, in the
// layout stream-aligned, the size of a group (aligned_group.h).
//
// In the extra data, after the 24 bytes that QEMU knows, all integers big-endian:
//   0  8  magic "qvm-xxh3"
//   8  2  version, 1
//  10  2  bytes of this field, 40 or 48; a later version may add to its end
//  12  4  bytes of a piece
//  16  8  bytes of the stream
//  24 16  the checksum, in XXH's canonical (big-endian) form
//  40  8  offset in the vmstate area of the kept digests, if there are any
//
// The digests are kept behind the end of the stream, where no loader looks: 16 bytes a piece and
// nothing else. That they are those of this state is seen by their own XXH3-128, which is the
// checksum.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "qcow2/io/offsets.h"

namespace qvmstate::vmstate {

constexpr uint64_t checksum_piece_bytes = 1 * mib;
constexpr uint64_t checksum_piece_bytes_min = 64 * kib;  // what is not one of these, powers of two,
constexpr uint64_t checksum_piece_bytes_max = 2 * mib;   // is no checksum that is known
constexpr uint64_t checksum_pieces_max = uint64_t{1} << 26;  // 4 TiB and more; nor is one of others

using Digest = std::array<std::byte, 16>;

struct StateChecksum {
  uint64_t stream_bytes = 0;
  Digest digest = {};
  uint64_t piece_bytes = checksum_piece_bytes;
  uint64_t kept_offset = 0;  ///< of the pieces' digests; 0: they are not kept

  uint64_t pieces() const { return divide_up(stream_bytes, piece_bytes); }
  bool operator==(const StateChecksum &) const = default;
};

std::vector<std::byte> format_checksum(const StateChecksum &checksum);
/// From the extra data after the 24 bytes QEMU knows; nothing if there is none, or of a version
/// that is not known.
std::optional<StateChecksum> parse_checksum(std::span<const std::byte> more_extra);

/// Hashes bytes that come one after the other. Threads: one at a time.
class PieceDigest {
 public:
  PieceDigest();
  PieceDigest(PieceDigest &&) noexcept;
  PieceDigest &operator=(PieceDigest &&) noexcept;
  ~PieceDigest();

  void add(std::span<const std::byte> bytes);
  void add_zeros(uint64_t bytes);
  uint64_t bytes() const { return bytes_; }
  /// Of what was added since the last call.
  Digest finish();
  static Digest of(std::span<const std::byte> bytes);

 private:
  struct State;
  std::unique_ptr<State> state_;
  uint64_t bytes_ = 0;
};

/// The digests of a stream's pieces. Threads: different pieces may be set at the same time.
class PieceDigests {
 public:
  /// Those that are never set are zeros.
  explicit PieceDigests(uint64_t stream_bytes);
  void set(uint64_t piece, const Digest &digest);
  /// The stream ends here, and not where it was expected to. The last piece, and the one that was
  /// the last before, are to be set anew.
  void set_end(uint64_t stream_bytes);
  StateChecksum checksum() const;

 private:
  uint64_t stream_bytes_ = 0;
  std::vector<Digest> digests_;
};

/// The checksum of a stream that comes in order. Threads: one at a time.
class StreamDigest {
 public:
  explicit StreamDigest(uint64_t piece_bytes = checksum_piece_bytes) : piece_bytes_(piece_bytes) {}
  void add(std::span<const std::byte> bytes);
  void add_zeros(uint64_t bytes);
  /// A whole piece whose digest is known. All before it are whole pieces.
  void add_piece(const Digest &digest);
  uint64_t bytes() const { return bytes_; }
  StateChecksum finish();
  /// Of the pieces that are complete: after finish(), of all.
  std::span<const Digest> digests() const { return digests_; }

 private:
  void end_piece();

  uint64_t piece_bytes_;
  std::optional<Digest> zero_piece_;  // once it was needed
  PieceDigest piece_;
  std::vector<Digest> digests_;
  uint64_t bytes_ = 0;
};

}  // namespace qvmstate::vmstate
