#include "vmstate/state_checksum.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cstring>
#include <string_view>

// All of it in this file: the plugin is loaded into systems that may not have the library.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "qcow2/io/endian.h"
#include "vmstate/xxh3_avx2.h"

namespace qvmstate::vmstate {
namespace {

constexpr std::string_view magic = "qvm-xxh3";
constexpr uint16_t field_version = 1;
constexpr uint16_t field_bytes_min = 40;
constexpr uint16_t field_bytes_with_kept = 48;
constexpr uint64_t zeros_bytes = 64 * kib;

Digest canonical(XXH128_hash_t hash) {
  XXH128_canonical_t bytes;
  XXH128_canonicalFromHash(&bytes, hash);
  Digest digest;
  static_assert(sizeof bytes == sizeof digest);
  std::memcpy(digest.data(), &bytes, sizeof bytes);
  return digest;
}

StateChecksum combined(uint64_t stream_bytes, uint64_t piece_bytes,
                       std::span<const Digest> digests) {
  return {stream_bytes, PieceDigest::of(std::as_bytes(digests)), piece_bytes};
}

Digest digest_of_zeros(uint64_t bytes) {
  PieceDigest piece;
  piece.add_zeros(bytes);
  return piece.finish();
}

const Digest &digest_of_zero_piece() {
  static const Digest digest = digest_of_zeros(checksum_piece_bytes);
  return digest;
}

}  // namespace

std::vector<std::byte> format_checksum(const StateChecksum &checksum) {
  const bool has_kept = checksum.kept_offset != 0;
  const uint16_t field_bytes = has_kept ? field_bytes_with_kept : field_bytes_min;
  std::vector<std::byte> field(field_bytes);
  std::memcpy(field.data(), magic.data(), magic.size());
  store_be(field.data() + 8, field_version);
  store_be(field.data() + 10, field_bytes);
  store_be(field.data() + 12, static_cast<uint32_t>(checksum.piece_bytes));
  store_be(field.data() + 16, checksum.stream_bytes);
  std::ranges::copy(checksum.digest, field.begin() + 24);
  if (has_kept) {
    store_be(field.data() + 40, checksum.kept_offset);
  }
  return field;
}

std::optional<StateChecksum> parse_checksum(std::span<const std::byte> more_extra) {
  if (more_extra.size() < field_bytes_min ||
      std::memcmp(more_extra.data(), magic.data(), magic.size()) != 0 ||
      load_be<uint16_t>(more_extra.data() + 8) != field_version) {
    return std::nullopt;
  }
  const auto field_bytes = load_be<uint16_t>(more_extra.data() + 10);
  StateChecksum checksum;
  checksum.piece_bytes = load_be<uint32_t>(more_extra.data() + 12);
  if (field_bytes < field_bytes_min || !std::has_single_bit(checksum.piece_bytes) ||
      checksum.piece_bytes < checksum_piece_bytes_min ||
      checksum.piece_bytes > checksum_piece_bytes_max) {
    return std::nullopt;
  }
  checksum.stream_bytes = load_be<uint64_t>(more_extra.data() + 16);
  if (checksum.pieces() > checksum_pieces_max) {
    return std::nullopt;
  }
  std::ranges::copy(more_extra.subspan(24, checksum.digest.size()), checksum.digest.begin());
  if (std::min<size_t>(field_bytes, more_extra.size()) >= field_bytes_with_kept) {
    checksum.kept_offset = load_be<uint64_t>(more_extra.data() + 40);
  }
  return checksum;
}

struct PieceDigest::State {
  XXH3_state_t hash;
};

PieceDigest::PieceDigest() : state_(std::make_unique<State>()) {
  XXH3_128bits_reset(&state_->hash);
}
PieceDigest::PieceDigest(PieceDigest &&) noexcept = default;
PieceDigest &PieceDigest::operator=(PieceDigest &&) noexcept = default;
PieceDigest::~PieceDigest() = default;

Digest PieceDigest::of(std::span<const std::byte> bytes) {
  PieceDigest piece;
  piece.add(bytes);
  return piece.finish();
}

void PieceDigest::add(std::span<const std::byte> bytes) {
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  if (has_avx2) {
    xxh3_update_avx2(&state_->hash, bytes.data(), bytes.size());
  } else {
    XXH3_128bits_update(&state_->hash, bytes.data(), bytes.size());
  }
  bytes_ += bytes.size();
}

void PieceDigest::add_zeros(uint64_t bytes) {
  static const std::vector<std::byte> zeros(zeros_bytes);
  while (bytes > 0) {
    const uint64_t part = std::min(bytes, zeros_bytes);
    add(std::span(zeros).first(part));
    bytes -= part;
  }
}

Digest PieceDigest::finish() {
  const Digest digest = canonical(XXH3_128bits_digest(&state_->hash));
  XXH3_128bits_reset(&state_->hash);
  bytes_ = 0;
  return digest;
}

PieceDigests::PieceDigests(uint64_t stream_bytes) {
  set_end(stream_bytes);
}

void PieceDigests::set_end(uint64_t stream_bytes) {
  stream_bytes_ = stream_bytes;
  digests_.resize(divide_up(stream_bytes, checksum_piece_bytes), digest_of_zero_piece());
  if (const uint64_t rest = stream_bytes % checksum_piece_bytes; rest != 0) {
    digests_.back() = digest_of_zeros(rest);
  }
}

void PieceDigests::set(uint64_t piece, const Digest &digest) {
  digests_.at(piece) = digest;
}

StateChecksum PieceDigests::checksum() const {
  return combined(stream_bytes_, checksum_piece_bytes, digests_);
}

void StreamDigest::end_piece() {
  digests_.push_back(piece_.finish());
}

void StreamDigest::add(std::span<const std::byte> bytes) {
  bytes_ += bytes.size();
  while (!bytes.empty()) {
    const size_t part = std::min<uint64_t>(bytes.size(), piece_bytes_ - piece_.bytes());
    piece_.add(bytes.first(part));
    if (piece_.bytes() == piece_bytes_) {
      end_piece();
    }
    bytes = bytes.subspan(part);
  }
}

void StreamDigest::add_zeros(uint64_t bytes) {
  bytes_ += bytes;
  while (bytes > 0) {
    if (piece_.bytes() == 0 && bytes >= piece_bytes_) {
      if (!zero_piece_) {
        zero_piece_ = digest_of_zeros(piece_bytes_);
      }
      digests_.push_back(*zero_piece_);
      bytes -= piece_bytes_;
      continue;
    }
    const uint64_t part = std::min(bytes, piece_bytes_ - piece_.bytes());
    piece_.add_zeros(part);
    if (piece_.bytes() == piece_bytes_) {
      end_piece();
    }
    bytes -= part;
  }
}

void StreamDigest::add_piece(const Digest &digest) {
  assert(piece_.bytes() == 0 && bytes_ == digests_.size() * piece_bytes_);
  digests_.push_back(digest);
  bytes_ += piece_bytes_;
}

StateChecksum StreamDigest::finish() {
  if (piece_.bytes() > 0) {
    end_piece();
  }
  return combined(bytes_, piece_bytes_, digests_);
}

}  // namespace qvmstate::vmstate
