#include "vmstate/page_scan.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace qvmstate::vmstate {
namespace {

uint64_t load_word(const std::byte *data) {
  uint64_t word;
  std::memcpy(&word, data, sizeof word);
  return word;
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) __m256i load_vector(const std::byte *data) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(data));
}

__attribute__((target("avx2"))) bool is_zero_avx2(const std::byte *data, size_t bytes) {
  constexpr size_t step = 4 * sizeof(__m256i);
  while (bytes >= step) {
    const __m256i low = _mm256_or_si256(load_vector(data), load_vector(data + 32));
    const __m256i high = _mm256_or_si256(load_vector(data + 64), load_vector(data + 96));
    const __m256i all = _mm256_or_si256(low, high);
    if (!_mm256_testz_si256(all, all)) {
      return false;
    }
    data += step;
    bytes -= step;
  }
  return is_zero_portable(data, bytes);
}

#endif

}  // namespace

bool is_zero_portable(const std::byte *data, size_t bytes) {
  constexpr size_t step = 4 * sizeof(uint64_t);
  while (bytes >= step) {
    if ((load_word(data) | load_word(data + 8) | load_word(data + 16) | load_word(data + 24)) !=
        0) {
      return false;
    }
    data += step;
    bytes -= step;
  }
  for (size_t i = 0; i < bytes; ++i) {
    if (data[i] != std::byte{0}) {
      return false;
    }
  }
  return true;
}

bool is_zero(const std::byte *data, size_t bytes) {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") != 0;
  if (has_avx2) {
    return is_zero_avx2(data, bytes);
  }
#endif
  return is_zero_portable(data, bytes);
}

}  // namespace qvmstate::vmstate
