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
// A save whose stream is written while QEMU uses the images has two steps, with the images in our
// hands only in each: reserve_set() adds "NAME.saving" to every image, of the disk alone, in one of
// them with clusters reserved for the stream; later SetSave::begin_finish() makes NAME of it as
// above, with renamed instead of added snapshots. A NAME of before lives until then. What a crash
// leaves of it recover() removes.
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

enum class SaveSteps { one, two };

/// Whether `name` can be saved in these images: rules of check_snapshot_name in each, its length,
/// not one of the names of a save in progress, and, without `replace`, not taken in any. To ask
/// before the guest is stopped.
Result<void> check_save_name(const std::vector<Image *> &images, const std::string &name,
                             bool replace, SaveSteps steps = SaveSteps::one);

/// What reserve_set() leaves, for the time until the stream is written.
struct Reservation {
  std::string name;  ///< as it will be
  size_t primary = 0;
  std::vector<Snapshot> snapshots;  ///< of each image, as they are now
  std::vector<AreaRun> runs;        ///< for a ReservedArea, in images[primary]
};

/// The first step: one switch in each image. When it fails, what was added is removed.
Result<Reservation> reserve_set(const std::vector<Image *> &images, size_t primary,
                                const NewSnapshot &snapshot, bool replace, uint64_t stream_bytes);
/// While QEMU uses the images, and before the second step: refuses if images[index] no longer has
/// the snapshot of the first, whose clusters then may be somebody else's. Returns its index.
Result<size_t> find_reserved(const Image &image, const Reservation &reservation, size_t index);
/// Instead of the second step: removes what the first added.
Result<void> drop_reservation(const std::vector<Image *> &images, const std::string &name);

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
  /// The second step. The stream is in the reserved clusters, and flushed; commit() is given the
  /// same `vmstate_bytes`.
  static Result<std::unique_ptr<SetSave>> begin_finish(std::vector<Image *> images,
                                                       const Reservation &reservation, bool replace,
                                                       uint64_t vmstate_bytes);
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
  SetSave(std::vector<Image *> images, size_t primary, const std::string &name,
          const std::string &primary_id);
  Result<void> make_room(size_t image, const std::optional<SetBase> &base);
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
