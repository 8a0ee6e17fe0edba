#include "vmstate/state_checksum.h"

#include <gtest/gtest.h>

#include <random>

#include "stream_fixture.h"

namespace qvmstate::vmstate {
namespace {

using test::Blob;

Blob noise(size_t bytes, uint32_t seed) {
  std::mt19937 random(seed);
  Blob blob(bytes);
  for (std::byte &byte : blob) {
    byte = static_cast<std::byte>(random());
  }
  return blob;
}

std::string hex(const Digest &digest) {
  std::string text;
  for (const std::byte byte : digest) {
    text += "0123456789abcdef"[static_cast<int>(byte) >> 4];
    text += "0123456789abcdef"[static_cast<int>(byte) & 15];
  }
  return text;
}

TEST(StateChecksum, IsXxh3) {
  // The published value for no input, and what `xxhsum -H2` 0.8.1 prints for "a".
  EXPECT_EQ(hex(PieceDigest::of({})), "99aa06d3014798d86001c324468d497f");
  EXPECT_EQ(hex(PieceDigest::of(Blob{std::byte{'a'}})), "a96faf705af16834e6c632b61e964e1f");
}

TEST(StateChecksum, DoesNotDependOnHowTheBytesCome) {
  Blob stream = noise(3 * mib + 12345, 1);
  std::fill_n(stream.begin() + mib + 5, mib + 100, std::byte{0});
  StreamDigest whole;
  whole.add(stream);
  const StateChecksum expected = whole.finish();
  EXPECT_EQ(expected.stream_bytes, stream.size());

  StreamDigest in_parts;
  const std::span bytes(stream);
  in_parts.add(bytes.first(mib + 5));
  in_parts.add_zeros(mib + 100);
  for (size_t at = 2 * mib + 105; at < bytes.size(); at += 70001) {
    in_parts.add(bytes.subspan(at, std::min<size_t>(70001, bytes.size() - at)));
  }
  EXPECT_EQ(in_parts.finish(), expected);

  PieceDigests by_piece(stream.size());
  for (const size_t piece : {3U, 0U, 2U, 1U}) {
    const size_t at = piece * mib;
    by_piece.set(piece, PieceDigest::of(bytes.subspan(at, std::min(mib, bytes.size() - at))));
  }
  EXPECT_EQ(by_piece.checksum(), expected);

  stream[2 * mib] ^= std::byte{1};
  StreamDigest other;
  other.add(stream);
  EXPECT_NE(other.finish(), expected);
}

TEST(StateChecksum, PiecesThatAreNeverSetAreZeros) {
  for (const uint64_t bytes : {uint64_t{0}, uint64_t{1}, mib, 2 * mib + 7}) {
    StreamDigest zeros;
    zeros.add(Blob(bytes));
    StreamDigest told;
    told.add_zeros(bytes);
    const StateChecksum expected = zeros.finish();
    EXPECT_EQ(told.finish(), expected);
    EXPECT_EQ(PieceDigests(bytes).checksum(), expected);
  }
}

TEST(StateChecksum, Field) {
  StateChecksum checksum;
  checksum.stream_bytes = 0x0102030405;
  for (size_t i = 0; i < checksum.digest.size(); ++i) {
    checksum.digest[i] = static_cast<std::byte>(0xa0 + i);
  }
  test::Bytes golden;
  golden
      .text("qvm-xxh3")         // magic
      .u16(1)                   // version
      .u16(40)                  // bytes of the field
      .u32(0x100000)            // bytes of a piece
      .u64(0x0102030405)        // bytes of the stream
      .u64(0xa0a1a2a3a4a5a6a7)  // the checksum
      .u64(0xa8a9aaabacadaeaf);
  EXPECT_EQ(format_checksum(checksum), golden.done());
  EXPECT_EQ(parse_checksum(golden.done()), checksum);
  Blob longer = golden.done();
  longer[11] = std::byte{48};  // of a later version that added something
  longer.resize(48);
  EXPECT_EQ(parse_checksum(longer), checksum);
}

TEST(StateChecksum, FieldWithKeptDigests) {
  StateChecksum checksum;
  checksum.stream_bytes = 0x60001;
  checksum.piece_bytes = 64 * kib;
  checksum.kept_offset = 0x61000;
  EXPECT_EQ(checksum.pieces(), 7U);
  test::Bytes golden;
  golden
      .text("qvm-xxh3")  // magic
      .u16(1)            // version
      .u16(48)           // bytes of the field
      .u32(0x10000)      // bytes of a piece
      .u64(0x60001)      // bytes of the stream
      .fill(16, 0)       // the checksum
      .u64(0x61000);     // offset of the digests
  EXPECT_EQ(format_checksum(checksum), golden.done());
  EXPECT_EQ(parse_checksum(golden.done()), checksum);
  // Cut off, it is the field without them.
  checksum.kept_offset = 0;
  EXPECT_EQ(parse_checksum(std::span(golden.done()).first(47)), checksum);
}

TEST(StateChecksum, OtherPieces) {
  const auto parsed = [](uint64_t piece_bytes, uint64_t stream_bytes) {
    StateChecksum checksum;
    checksum.piece_bytes = piece_bytes;
    checksum.stream_bytes = stream_bytes;
    return parse_checksum(format_checksum(checksum)).has_value();
  };
  for (const uint64_t good : {64 * kib, 128 * kib, 1 * mib, 2 * mib}) {
    EXPECT_TRUE(parsed(good, 12345)) << good;
    EXPECT_TRUE(parsed(good, good << 26)) << good;
    EXPECT_FALSE(parsed(good, (good << 26) + 1)) << good;
    EXPECT_FALSE(parsed(good, UINT64_MAX)) << good;
  }
  for (const uint64_t bad : {uint64_t{0}, uint64_t{1}, 32 * kib, 96 * kib, 4 * mib}) {
    EXPECT_FALSE(parsed(bad, 12345)) << bad;
  }
}

TEST(StateChecksum, DigestsOfSmallerPieces) {
  const Blob stream = noise(5 * 64 * kib + 100, 2);
  const std::span bytes(stream);
  StreamDigest whole(64 * kib);
  whole.add(stream);
  const StateChecksum expected = whole.finish();
  ASSERT_EQ(whole.digests().size(), 6U);
  EXPECT_EQ(whole.digests()[1], PieceDigest::of(bytes.subspan(64 * kib, 64 * kib)));
  EXPECT_EQ(whole.digests()[5], PieceDigest::of(bytes.last(100)));
  EXPECT_EQ(expected.digest, PieceDigest::of(std::as_bytes(whole.digests())));
  StreamDigest told(64 * kib);
  told.add(bytes.first(2 * 64 * kib));
  for (size_t piece = 2; piece < 5; ++piece) {
    told.add_piece(PieceDigest::of(bytes.subspan(piece * 64 * kib, 64 * kib)));
  }
  EXPECT_EQ(told.bytes(), 5 * 64 * kib);
  told.add(bytes.last(100));
  EXPECT_EQ(told.finish(), expected);
  StreamDigest zeros(64 * kib);
  zeros.add_zeros(200 * kib);
  StreamDigest zero_bytes(64 * kib);
  zero_bytes.add(Blob(200 * kib));
  EXPECT_EQ(zeros.finish(), zero_bytes.finish());
}

TEST(StateChecksum, OtherExtraDataIsNone) {
  const Blob good = format_checksum({});
  EXPECT_FALSE(parse_checksum({}));
  EXPECT_FALSE(parse_checksum(std::span(good).first(39)));
  for (const size_t at : {0U, 9U, 13U}) {  // magic, version, size of a piece
    Blob other = good;
    other[at] ^= std::byte{0x40};
    EXPECT_FALSE(parse_checksum(other)) << at;
  }
  Blob short_field = good;
  short_field[11] = std::byte{39};
  EXPECT_FALSE(parse_checksum(short_field));
}

}  // namespace
}  // namespace qvmstate::vmstate
