#include "qcow2/refcount_block.h"

#include <cassert>

#include "qcow2/io/endian.h"

namespace qvmstate::qcow2 {
namespace {

template <class Word>
uint64_t get_word(std::span<const std::byte> block, uint64_t index) {
  return load_be<Word>(block.subspan(index * sizeof(Word), sizeof(Word)).data());
}

template <class Word>
void set_word(std::span<std::byte> block, uint64_t index, uint64_t count) {
  store_be<Word>(block.subspan(index * sizeof(Word), sizeof(Word)).data(),
                 static_cast<Word>(count));
}

}  // namespace

uint64_t refcount_get(std::span<const std::byte> block, uint32_t refcount_order, uint64_t index) {
  assert(refcount_order <= 6);
  assert(index < block.size() * 8 >> refcount_order);
  switch (refcount_order) {
    case 3:
      return get_word<uint8_t>(block, index);
    case 4:
      return get_word<uint16_t>(block, index);
    case 5:
      return get_word<uint32_t>(block, index);
    case 6:
      return get_word<uint64_t>(block, index);
    default: {
      const uint64_t bit = index << refcount_order;
      const uint32_t mask = (1U << (1U << refcount_order)) - 1;
      return (std::to_integer<uint32_t>(block[bit / 8]) >> (bit % 8)) & mask;
    }
  }
}

void refcount_set(std::span<std::byte> block, uint32_t refcount_order, uint64_t index,
                  uint64_t count) {
  assert(refcount_order <= 6);
  assert(index < block.size() * 8 >> refcount_order);
  assert(refcount_order == 6 || count >> (1U << refcount_order) == 0);
  switch (refcount_order) {
    case 3:
      return set_word<uint8_t>(block, index, count);
    case 4:
      return set_word<uint16_t>(block, index, count);
    case 5:
      return set_word<uint32_t>(block, index, count);
    case 6:
      return set_word<uint64_t>(block, index, count);
    default: {
      const uint64_t bit = index << refcount_order;
      const uint32_t mask = ((1U << (1U << refcount_order)) - 1) << (bit % 8);
      const uint32_t others = std::to_integer<uint32_t>(block[bit / 8]) & ~mask;
      block[bit / 8] = static_cast<std::byte>(others | static_cast<uint32_t>(count) << (bit % 8));
    }
  }
}

}  // namespace qvmstate::qcow2
