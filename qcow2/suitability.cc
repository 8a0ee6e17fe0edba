#include "qcow2/suitability.h"

#include <string>

#include "qcow2/limits.h"

namespace qvmstate::qcow2 {

Result<void> check_image_suits(const Image &image, ImageRole role, Bitmaps bitmaps, ImageUse use) {
  const Header &header = image.header();
  const std::string &name = image.name();
  const auto refuse = [&name](const std::string &why) {
    return fail(ErrorCode::not_supported, name + ": " + why);
  };
  const auto has = [&header](uint64_t bit) { return (header.incompatible_features & bit) != 0; };

  if (has(incompatible::corrupt)) {
    return refuse("is marked corrupt: repair it with `qemu-img check -r all " + name + "`");
  }
  // With lazy refcounts QEMU sets the dirty bit while it writes, and clears it when it lets go.
  const bool dirty_is_normal = use == ImageUse::held_by_qemu &&
                               (header.compatible_features & compatible::lazy_refcounts) != 0;
  if (has(incompatible::dirty) && !dirty_is_normal) {
    return refuse(
        "is marked dirty, so its refcounts may be stale: repair it with `qemu-img check "
        "-r all " +
        name + "`");
  }
  if (has(incompatible::data_file) || (header.autoclear_features & autoclear::raw_data_file)) {
    return refuse(
        "keeps its data in an external file, and QEMU has no internal snapshots of such images: "
        "convert it with `qemu-img convert -O qcow2`");
  }
  constexpr uint32_t crypt_aes = 1, crypt_luks = 2;
  if (header.crypt_method == crypt_aes) {
    return refuse(
        "has the old AES encryption, which QEMU does not run any more: convert it with `qemu-img "
        "convert -O qcow2`");
  }
  if (header.crypt_method == crypt_luks && role == ImageRole::vmstate) {
    return refuse(
        "is encrypted with LUKS, and QEMU aborts on a VM state in such an image: choose another "
        "disk with --vmstate-node");
  }
  if (const uint32_t count = header.persistent_bitmaps(); count > 0 && bitmaps == Bitmaps::refuse) {
    return refuse("has " + std::to_string(count) + " persistent dirty bitmap" +
                  (count == 1 ? "" : "s") +
                  ", and QEMU's loadvm refuses an image that has any: remove them with `qemu-img "
                  "bitmap --remove " +
                  name +
                  " NAME` (in a running QEMU with block-dirty-bitmap-remove), or go on with "
                  "--allow-bitmaps and remove them before the load");
  }
  constexpr uint64_t known_autoclear = autoclear::bitmaps | autoclear::raw_data_file;
  if (const uint64_t unknown = header.autoclear_features & ~known_autoclear) {
    std::string bits;
    for (unsigned bit = 0; bit < 64; ++bit) {
      if (unknown >> bit & 1) {
        bits += (bits.empty() ? "" : ", ") + std::to_string(bit);
      }
    }
    return refuse("has autoclear features that this program does not know (bits " + bits +
                  "): let QEMU clear them with `qemu-img check -r leaks " + name + "`");
  }
  if (header.geometry.refcount_order == 0) {
    return refuse(
        "has refcounts of one bit, which leave no room for snapshots: widen them with `qemu-img "
        "amend -o refcount_bits=16 " +
        name + "`");
  }
  if (image.snapshots().size() >= snapshots_max) {
    return refuse("has " + std::to_string(image.snapshots().size()) +
                  " snapshots, the most that an image can hold: delete some first");
  }
  return {};
}

}  // namespace qvmstate::qcow2
