#include "plugin/qemu/save_context.h"

#include <time.h>

#include "qcow2/image_set.h"

namespace qvmstate::qemu {

qcow2::Bitmaps bitmaps_of(const SaveOptions &options) {
  return options.allow_bitmaps ? qcow2::Bitmaps::allow : qcow2::Bitmaps::refuse;
}

Result<OwnedImages> own_images(SaveContext &context, const io::OpenOptions &options,
                               const ImageChannels &channels) {
  QV_ASSIGN(OwnedImages owned, OwnedImages::open(context.vm.disks, options, channels));
  const std::vector<qcow2::Image *> &images = owned.images();
  if (qcow2::needs_recovery(images)) {
    QV_ASSIGN(const std::vector<std::string> done, qcow2::recover_set(images));
    context.report.warnings.insert(context.report.warnings.end(), done.begin(), done.end());
  }
  QV_TRY(qcow2::check_save_name(images, context.options.name, context.options.replace));
  for (size_t i = 0; i < images.size(); ++i) {
    const auto role =
        i == context.vmstate_disk ? qcow2::ImageRole::vmstate : qcow2::ImageRole::disk_only;
    QV_TRY(qcow2::check_image_suits(*images[i], role, bitmaps_of(context.options)));
  }
  return owned;
}

qcow2::NewSnapshot new_snapshot(const SaveOptions &options, uint64_t clock_nanos) {
  qcow2::NewSnapshot snapshot;
  snapshot.name = options.name;
  timespec now = {};
  ::clock_gettime(CLOCK_REALTIME, &now);
  snapshot.date_seconds = static_cast<uint32_t>(now.tv_sec);
  snapshot.date_nanos = static_cast<uint32_t>(now.tv_nsec);
  snapshot.clock_nanos = clock_nanos;
  return snapshot;
}

}  // namespace qvmstate::qemu
