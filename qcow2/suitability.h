// Whether an image can take part in a save, and if not, why and what helps. Asked before the guest
// is stopped and again when the image is ours.
#pragma once

#include <string_view>

#include "qcow2/image.h"
#include "qcow2/io/result.h"

namespace qvmstate::qcow2 {

/// What the image is to hold: the vmstate and its disk snapshot, or the disk snapshot alone.
enum class ImageRole { vmstate, disk_only };

/// Whose the image is at the time of asking. While QEMU holds one with lazy refcounts, its dirty
/// bit says nothing.
enum class ImageUse { held_by_qemu, ours };

/// Whether persistent bitmaps are a reason to refuse, because QEMU's loadvm refuses an image that
/// has any. They stay valid whatever an edit does: they tell about the active disk, and neither it
/// nor the clusters of the bitmaps change.
enum class Bitmaps { refuse, allow };

/// Refuses by name and with the remedy: dirty and corrupt bits, external data file, raw data file,
/// AES encryption, LUKS for ImageRole::vmstate, persistent bitmaps, unknown autoclear bits,
/// refcounts of one bit, a full snapshot table.
Result<void> check_image_suits(const Image &image, ImageRole role,
                               Bitmaps bitmaps = Bitmaps::refuse, ImageUse use = ImageUse::ours);

}  // namespace qvmstate::qcow2
