#include "vmstate/xbzrle.h"

#include <algorithm>
#include <cstdint>
#include <optional>

namespace qvmstate::vmstate {
namespace {

std::optional<size_t> take_length(std::span<const std::byte> &encoded) {
  size_t length = 0;
  for (unsigned shift = 0; shift <= 7 && !encoded.empty(); shift += 7) {
    const auto byte = static_cast<uint8_t>(encoded[0]);
    encoded = encoded.subspan(1);
    length |= static_cast<size_t>(byte & 0x7f) << shift;
    if ((byte & 0x80) == 0) {
      return length;
    }
  }
  return std::nullopt;
}

}  // namespace

bool apply_xbzrle(std::span<const std::byte> encoded, std::span<std::byte> page) {
  for (bool is_first = true; !encoded.empty(); is_first = false) {
    const auto kept = take_length(encoded);
    if (!kept || *kept > page.size() || (*kept == 0 && !is_first)) {
      return false;
    }
    page = page.subspan(*kept);
    const auto replaced = take_length(encoded);
    if (!replaced || *replaced == 0 || *replaced > page.size() || *replaced > encoded.size()) {
      return false;
    }
    std::ranges::copy(encoded.first(*replaced), page.begin());
    encoded = encoded.subspan(*replaced);
    page = page.subspan(*replaced);
  }
  return true;
}

}  // namespace qvmstate::vmstate
