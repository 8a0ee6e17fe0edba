// Big-endian integers, as qcow2 and the vmstate stream store them.
//
// Be16, Be32 and Be64 are for on-disk structs: they have no alignment and no padding, so a struct
// of them is laid out byte for byte as declared. load_be/store_be work on raw bytes.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace qvmstate {

template <std::unsigned_integral T>
constexpr T byte_swap(T value) {
  if constexpr (sizeof(T) == 1) {
    return value;
  } else if constexpr (sizeof(T) == 2) {
    return __builtin_bswap16(value);
  } else if constexpr (sizeof(T) == 4) {
    return __builtin_bswap32(value);
  } else {
    return __builtin_bswap64(value);
  }
}

template <std::unsigned_integral T>
constexpr T native_to_be(T value) {
  return std::endian::native == std::endian::little ? byte_swap(value) : value;
}

template <std::unsigned_integral T>
T load_be(const void *bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return native_to_be(value);
}

template <std::unsigned_integral T>
void store_be(void *bytes, T value) {
  value = native_to_be(value);
  std::memcpy(bytes, &value, sizeof value);
}

template <std::unsigned_integral T>
void store_le(void *bytes, T value) {
  value = std::endian::native == std::endian::little ? value : byte_swap(value);
  std::memcpy(bytes, &value, sizeof value);
}

template <std::unsigned_integral T>
class BigEndian {
 public:
  BigEndian() = default;
  BigEndian(T value) { store_be<T>(bytes_, value); }  // NOLINT: meant to convert
  operator T() const { return load_be<T>(bytes_); }   // NOLINT: meant to convert

 private:
  std::byte bytes_[sizeof(T)] = {};
};

using Be16 = BigEndian<uint16_t>;
using Be32 = BigEndian<uint32_t>;
using Be64 = BigEndian<uint64_t>;

}  // namespace qvmstate
