#include "vmstate/page_coding.h"

#include <zlib.h>

#include <algorithm>

#include "vmstate/xbzrle.h"

namespace qvmstate::vmstate {
namespace {

bool inflate_page(std::span<const std::byte> encoded, std::span<std::byte> page) {
  uLongf inflated_bytes = page.size();
  const int status = uncompress(reinterpret_cast<Bytef *>(page.data()), &inflated_bytes,
                                reinterpret_cast<const Bytef *>(encoded.data()), encoded.size());
  return status == Z_OK && inflated_bytes == page.size();
}

}  // namespace

bool decode_page(PageCoding coding, std::span<const std::byte> encoded, std::span<std::byte> page) {
  switch (coding) {
    case PageCoding::filled:
      std::ranges::fill(page, encoded[0]);
      return true;
    case PageCoding::compressed:
      return inflate_page(encoded, page);
    case PageCoding::difference:
      return apply_xbzrle(encoded, page);
    case PageCoding::plain:
      break;
  }
  std::ranges::copy(encoded, page.begin());
  return true;
}

}  // namespace qvmstate::vmstate
