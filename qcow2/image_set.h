// A snapshot over several images, of which one holds the vmstate.
//
// QEMU matches snapshots across images by name alone, so no two images may ever carry a name
// together unless they belong together. A save therefore goes: (1) in each secondary image one
// switch renames an old NAME to "NAME.old-ID" and adds the new one as "NAME.new-ID" (loadvm NAME
// now refuses); (2) the image with the vmstate is switched; (3) the secondaries get the final name
// and lose the old. ID is the new snapshot's id in the image with the vmstate; id, date and clock
// tell whether a NAME.new-ID belongs to a NAME. After a crash, recover() finishes forward if (2)
// happened, and goes back otherwise.
//
// A delete starts with the image that holds the vmstate; what is left then cannot be loaded.
//
// The images must be ours (locked). Threads: one at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "qcow2/image.h"
#include "qcow2/image_edit.h"
#include "qcow2/io/result.h"
#include "qcow2/limits.h"

namespace qvmstate::qcow2 {

/// Bytes a name may have so that the names of a save in progress fit as well.
constexpr uint64_t set_name_bytes_max = snapshot_name_bytes_max - 32;

/// Whether `name` can be saved in these images: rules of check_snapshot_name in each, its length,
/// not one of the names of a save in progress, and, without `replace`, not taken in any. To ask
/// before the guest is stopped.
Result<void> check_save_name(const std::vector<Image *> &images, const std::string &name,
                             bool replace);

/// A VM state in the image that gets the vmstate, whose clusters the new one may share.
struct SetBase {
  std::string name;    ///< of its snapshot, which is there
  uint64_t bytes = 0;  ///< of its stream
};

class SetSave {
 public:
  /// Begins edits in all images and does their disk parts. `images[primary]` gets the vmstate.
  static Result<std::unique_ptr<SetSave>> begin(std::vector<Image *> images, size_t primary,
                                                const NewSnapshot &snapshot, bool replace,
                                                const std::optional<SetBase> &base = {});
  ~SetSave();

  /// Where the stream goes; expect_stream_bytes first.
  VmstateArea &vmstate();
  void expect_stream_bytes(uint64_t bytes);
  /// Of the snapshot with the vmstate, in place of NewSnapshot::more_extra: what is known only when
  /// the stream is written.
  void set_more_extra(std::vector<std::byte> more_extra);
  /// Steps (1) to (3). When it fails before (2), everything is undone. When it fails in (3), the
  /// snapshot is saved, and the error says that `recover` has to finish it.
  Result<void> commit(uint64_t vmstate_bytes);
  /// Undoes everything, if commit() was not called.
  Result<void> abort();
  /// The id of the new snapshot in image i.
  const std::string &id(size_t image) const;

 private:
  SetSave() = default;
  Result<void> finish_secondaries();
  Result<void> take_back(Image &image) const;

  std::vector<Image *> images_;
  size_t primary_ = 0;
  std::string name_;
  std::string new_name_;
  std::string old_name_;
  std::vector<std::unique_ptr<ImageEdit>> edits_;
  std::vector<std::string> ids_;
};

/// Deletes `name` from every image that has it, those with a vmstate first. not_found if none has.
/// `give_back_space`: punch holes afterwards.
Result<void> delete_from_set(const std::vector<Image *> &images, const std::string &name,
                             bool give_back_space);

/// Finishes or undoes interrupted saves over these images; one line for each thing done. Give all
/// images of the VM: one without its partner would be taken back.
Result<std::vector<std::string>> recover_set(const std::vector<Image *> &images);

/// Whether recover_set would do something.
bool needs_recovery(const std::vector<Image *> &images);

}  // namespace qvmstate::qcow2
