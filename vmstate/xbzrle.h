// XBZRLE: a page as its difference to what the page held before.
//
// Runs in turn: bytes that stay as they are, and bytes that are replaced, whose new values follow.
// Each length is a ULEB128 of one or two bytes. Only the first run may be empty; what follows the
// last run stays. Source of the facts: QEMU docs/xbzrle.txt.
#pragma once

#include <cstddef>
#include <span>

namespace qvmstate::vmstate {

/// Applies `encoded` to `page`; false, and the page in between, if it is not valid.
bool apply_xbzrle(std::span<const std::byte> encoded, std::span<std::byte> page);

}  // namespace qvmstate::vmstate
