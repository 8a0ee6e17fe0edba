// Offsets and sizes that must not be mixed up, as types of their own.
//
// HostOffset    byte in the image file
// GuestOffset   byte in the address space an L1 table maps (virtual disk, then vmstate area)
// StreamOffset  byte in a vmstate, 0 = its first byte
#pragma once

#include <compare>
#include <cstdint>

namespace qvmstate {

template <class Tag>
struct Offset {
  uint64_t value = 0;

  constexpr Offset() = default;
  constexpr explicit Offset(uint64_t bytes) : value(bytes) {}

  friend constexpr auto operator<=>(Offset, Offset) = default;
  friend constexpr Offset operator+(Offset a, uint64_t bytes) { return Offset(a.value + bytes); }
  friend constexpr uint64_t operator-(Offset a, Offset b) { return a.value - b.value; }
  constexpr Offset &operator+=(uint64_t bytes) {
    value += bytes;
    return *this;
  }
};

using HostOffset = Offset<struct HostOffsetTag>;
using GuestOffset = Offset<struct GuestOffsetTag>;
using StreamOffset = Offset<struct StreamOffsetTag>;

constexpr uint64_t kib = 1024;
constexpr uint64_t mib = 1024 * kib;
constexpr uint64_t gib = 1024 * mib;

constexpr uint64_t divide_up(uint64_t a, uint64_t b) {
  return a / b + (a % b != 0);
}
constexpr uint64_t round_up(uint64_t a, uint64_t b) {
  return divide_up(a, b) * b;
}
constexpr uint64_t round_down(uint64_t a, uint64_t b) {
  return a / b * b;
}

}  // namespace qvmstate
