// The ways in which records of a legacy stream hold a page.
//
// As it is; as one byte that fills it (of others than 0 before QEMU 8); compressed by zlib (QEMU
// before 9.1); as its difference to what it held before (XBZRLE).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace qvmstate::vmstate {

enum class PageCoding : uint8_t { plain, filled, compressed, difference };

/// Makes of `page`, which holds what was there before, what `encoded` says; false, and the page in
/// between, if that is not valid.
bool decode_page(PageCoding coding, std::span<const std::byte> encoded, std::span<std::byte> page);

}  // namespace qvmstate::vmstate
