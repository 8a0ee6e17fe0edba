#include "qcow2/image_set.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <optional>

#include "qcow2/limits.h"

namespace qvmstate::qcow2 {
namespace {

constexpr std::string_view new_mark = ".new-";
constexpr std::string_view old_mark = ".old-";
constexpr std::string_view reserved_mark = ".saving";
// Begins the extra data of a NAME.new-ID or NAME.saving; QEMU keeps extra data it does not know.
constexpr std::string_view saving_mark = "qvmstate: saving";

// Interrupted saves that one recovery settles. One goes before the next save begins, so that an
// image has one at most; each costs a whole edit, and more than this are no work of ours.
constexpr size_t recoveries_max = 1024;

struct MarkedName {
  std::string name;  ///< without the mark
  std::string id;    ///< of the snapshot in the image with the vmstate
};

// "NAME.new-12" -> {NAME, 12}
std::optional<MarkedName> marked(std::string_view name, std::string_view mark) {
  const size_t at = name.rfind(mark);
  if (at == std::string_view::npos || at == 0) {
    return std::nullopt;
  }
  const std::string_view id = name.substr(at + mark.size());
  if (id.empty() || id.size() > 20 ||
      !std::all_of(id.begin(), id.end(), [](char c) { return c >= '0' && c <= '9'; })) {
    return std::nullopt;
  }
  return MarkedName{std::string(name.substr(0, at)), std::string(id)};
}

std::string join(const std::string &name, std::string_view mark, const std::string &id) {
  return name + std::string(mark) + id;
}

bool same_moment(const Snapshot &a, const Snapshot &b) {
  return a.date_seconds == b.date_seconds && a.date_nanos == b.date_nanos &&
         a.clock_nanos == b.clock_nanos;
}

bool has_saving_mark(const Snapshot &snapshot) {
  return snapshot.more_extra.size() >= saving_mark.size() &&
         std::memcmp(snapshot.more_extra.data(), saving_mark.data(), saving_mark.size()) == 0;
}

std::vector<std::byte> with_saving_mark(std::vector<std::byte> extra) {
  const auto *mark = reinterpret_cast<const std::byte *>(saving_mark.data());
  extra.insert(extra.begin(), mark, mark + saving_mark.size());
  return extra;
}

bool is_same(const Snapshot &a, const Snapshot &b) {
  return a.id == b.id && a.l1_offset == b.l1_offset && same_moment(a, b) && has_saving_mark(a);
}

Result<void> check_not_taken(const Image &image, const std::string &taken,
                             const std::string &name) {
  if (find_snapshot(image.snapshots(), taken) >= 0) {
    return fail(ErrorCode::exists, image.name() + ": a snapshot named '" + taken +
                                       "' is in the way of saving '" + name +
                                       "'; delete it or save under another name");
  }
  return {};
}

// One switch that gives `from` its final name (and takes its mark off) and removes `remove`, where
// present.
Result<void> rename_and_remove(Image &image, const std::string &from, const std::string &to,
                               const std::string &remove) {
  QV_ASSIGN(auto edit, ImageEdit::begin(image));
  const int from_index = find_snapshot(image.snapshots(), from);
  const int remove_index = find_snapshot(image.snapshots(), remove);
  if (from_index < 0 && remove_index < 0) {
    return {};
  }
  if (from_index >= 0) {
    const auto index = static_cast<size_t>(from_index);
    QV_TRY(edit->rename_snapshot(index, to));
    if (const Snapshot &snapshot = image.snapshots()[index]; has_saving_mark(snapshot)) {
      edit->set_more_extra(
          index, {snapshot.more_extra.begin() + saving_mark.size(), snapshot.more_extra.end()});
    }
  }
  if (remove_index >= 0) {
    QV_TRY(edit->remove_snapshot(static_cast<size_t>(remove_index)));
  }
  return edit->commit(0);
}

std::string reserved_name(const std::string &name) {
  return name + std::string(reserved_mark);
}

/// Removes what reserve_set() added for `name`, where it is there, and gives its space back.
Result<void> remove_reserved(Image &image, const std::string &name) {
  const std::vector<Snapshot> &all = image.snapshots();
  const auto found = std::ranges::find_if(all, [&](const Snapshot &snapshot) {
    return snapshot.name == reserved_name(name) && has_saving_mark(snapshot);
  });
  if (found == all.end()) {
    return {};
  }
  QV_ASSIGN(auto edit, ImageEdit::begin(image));
  QV_TRY(edit->remove_snapshot(static_cast<size_t>(found - all.begin())));
  QV_TRY(edit->commit(0));
  edit->give_back_space();
  return {};
}

// What recover_set finds in one image: an interrupted save.
struct Interrupted {
  Image *image;
  MarkedName mark;  ///< without id: a reservation
  bool finish;      ///< the image with the vmstate holds the new snapshot
};

std::vector<Interrupted> find_interrupted(const std::vector<Image *> &images) {
  std::vector<Interrupted> found;
  for (Image *image : images) {
    for (const Snapshot &snapshot : image->snapshots()) {
      if (!has_saving_mark(snapshot)) {
        continue;
      }
      if (snapshot.name.ends_with(reserved_mark)) {
        const size_t bytes = snapshot.name.size() - reserved_mark.size();
        found.push_back({image, {snapshot.name.substr(0, bytes), {}}, false});
        continue;
      }
      const auto mark = marked(snapshot.name, new_mark);
      if (!mark) {
        continue;
      }
      bool finish = false;
      for (const Image *other : images) {
        const int index = find_snapshot(other->snapshots(), mark->name);
        finish |= other != image && index >= 0 &&
                  other->snapshots()[static_cast<size_t>(index)].id == mark->id &&
                  other->snapshots()[static_cast<size_t>(index)].vmstate_bytes != 0 &&
                  same_moment(other->snapshots()[static_cast<size_t>(index)], snapshot);
      }
      found.push_back({image, *mark, finish});
    }
  }
  return found;
}

Result<void> settle(const Interrupted &save) {
  if (save.mark.id.empty()) {
    return remove_reserved(*save.image, save.mark.name);
  }
  const std::string new_name = join(save.mark.name, new_mark, save.mark.id);
  const std::string old_name = join(save.mark.name, old_mark, save.mark.id);
  return save.finish ? rename_and_remove(*save.image, new_name, save.mark.name, old_name)
                     : rename_and_remove(*save.image, old_name, save.mark.name, new_name);
}

}  // namespace

Result<void> check_save_name(const std::vector<Image *> &images, const std::string &name,
                             bool replace, SaveSteps steps) {
  if ((images.size() > 1 || steps == SaveSteps::two) && name.size() > set_name_bytes_max) {
    return fail(ErrorCode::bad_argument, "snapshot name '" + name + "': is longer than " +
                                             std::to_string(set_name_bytes_max) +
                                             " bytes; choose a shorter one");
  }
  if (marked(name, new_mark) || marked(name, old_mark) || name.ends_with(reserved_mark)) {
    return fail(ErrorCode::bad_argument,
                "snapshot name '" + name +
                    "': names that end in .saving, .new-NUMBER or .old-NUMBER mark a save in "
                    "progress; choose another one");
  }
  for (const Image *image : images) {
    QV_TRY(check_snapshot_name(name, image->snapshots()));
    if (!replace && find_snapshot(image->snapshots(), name) >= 0) {
      return fail(ErrorCode::exists, image->name() + ": a snapshot named '" + name +
                                         "' is there already; choose another name or use "
                                         "--replace");
    }
  }
  return {};
}

Result<Reservation> reserve_set(const std::vector<Image *> &images, size_t primary,
                                const NewSnapshot &snapshot, bool replace, uint64_t stream_bytes) {
  assert(primary < images.size());
  QV_TRY(check_save_name(images, snapshot.name, replace, SaveSteps::two));
  NewSnapshot added = snapshot;
  added.name = reserved_name(snapshot.name);
  added.more_extra = with_saving_mark({});
  std::vector<std::unique_ptr<ImageEdit>> edits;
  for (size_t i = 0; i < images.size(); ++i) {
    QV_TRY(check_not_taken(*images[i], added.name, snapshot.name));
    QV_ASSIGN(auto edit, ImageEdit::begin(*images[i]));
    QV_TRY(edit->add_snapshot(added));
    if (i == primary) {
      QV_TRY(edit->reserve_vmstate(stream_bytes));
    }
    edits.push_back(std::move(edit));
  }
  Reservation reservation = {snapshot.name, primary, {}, edits[primary]->reserved()};
  for (const auto &edit : edits) {
    if (auto done = edit->commit(0); !done) {
      Error first = std::move(done).error();
      edits.clear();
      if (auto dropped = drop_reservation(images, snapshot.name); !dropped) {
        first.message +=
            "; undoing failed as well (" + dropped.error().message + "): run `qvmstate resume`";
      }
      return tl::unexpected(std::move(first));
    }
  }
  for (const Image *image : images) {
    reservation.snapshots.push_back(image->snapshots().back());
  }
  return reservation;
}

Result<size_t> find_reserved(const Image &image, const Reservation &reservation, size_t index) {
  const std::string name = reserved_name(reservation.name);
  const int found = find_snapshot(image.snapshots(), name);
  if (found < 0 ||
      !is_same(image.snapshots()[static_cast<size_t>(found)], reservation.snapshots[index])) {
    return fail(ErrorCode::bad_state, image.name() + ": the snapshot '" + name +
                                          "' that held the place of '" + reservation.name +
                                          "' was deleted or replaced meanwhile; save again");
  }
  return static_cast<size_t>(found);
}

Result<void> drop_reservation(const std::vector<Image *> &images, const std::string &name) {
  std::optional<Error> first;
  for (Image *image : images) {
    image->file().clear_error();
    // A commit that failed may have switched the header or not.
    auto done = image->reload();
    if (done) {
      done = remove_reserved(*image, name);
    }
    if (!done && !first) {
      first = std::move(done).error();
    }
  }
  return first ? Result<void>(tl::unexpected(std::move(*first))) : Result<void>();
}

SetSave::SetSave(std::vector<Image *> images, size_t primary, const std::string &name,
                 const std::string &primary_id)
    : images_(std::move(images)),
      primary_(primary),
      name_(name),
      new_name_(join(name, new_mark, primary_id)),
      old_name_(join(name, old_mark, primary_id)) {}

/// Begins an edit of the image, in which an old snapshot of the name goes, or gets the name that it
/// has until all is done. The base, in the image that gets the vmstate, may be the one that goes.
Result<void> SetSave::make_room(size_t image, const std::optional<SetBase> &base) {
  Image &edited = *images_[image];
  QV_ASSIGN(auto edit, ImageEdit::begin(edited));
  edits_.push_back(std::move(edit));
  const int old = find_snapshot(edited.snapshots(), name_);
  if (image == primary_) {
    if (base) {
      const int index = find_snapshot(edited.snapshots(), base->name);
      assert(index >= 0);
      QV_TRY(edits_.back()->hold_vmstate(static_cast<size_t>(index), base->bytes));
    }
    return old < 0 ? Result<void>() : edits_.back()->remove_snapshot(static_cast<size_t>(old));
  }
  if (old >= 0) {
    QV_TRY(edits_.back()->rename_snapshot(static_cast<size_t>(old), old_name_));
  }
  QV_TRY(check_not_taken(edited, new_name_, name_));
  return check_not_taken(edited, old_name_, name_);
}

Result<std::unique_ptr<SetSave>> SetSave::begin(std::vector<Image *> images, size_t primary,
                                                const NewSnapshot &snapshot, bool replace,
                                                const std::optional<SetBase> &base) {
  assert(primary < images.size());
  QV_TRY(check_save_name(images, snapshot.name, replace));
  const std::string id = next_snapshot_id(images[primary]->snapshots());
  std::unique_ptr<SetSave> save(new SetSave(std::move(images), primary, snapshot.name, id));
  for (size_t i = 0; i < save->images_.size(); ++i) {
    QV_TRY(save->make_room(i, base));
    NewSnapshot added = snapshot;
    if (i != primary) {
      added.name = save->new_name_;
      added.more_extra = with_saving_mark(added.more_extra);
    }
    QV_TRY(save->edits_[i]->add_snapshot(added));
    save->ids_.push_back(save->edits_[i]->added_id());
  }
  return save;
}

Result<std::unique_ptr<SetSave>> SetSave::begin_finish(std::vector<Image *> images,
                                                       const Reservation &reservation, bool replace,
                                                       uint64_t vmstate_bytes) {
  QV_TRY(check_save_name(images, reservation.name, replace, SaveSteps::two));
  std::unique_ptr<SetSave> save(new SetSave(std::move(images), reservation.primary,
                                            reservation.name,
                                            reservation.snapshots[reservation.primary].id));
  for (size_t i = 0; i < save->images_.size(); ++i) {
    QV_ASSIGN(const size_t index, find_reserved(*save->images_[i], reservation, i));
    QV_TRY(save->make_room(i, {}));
    if (i == reservation.primary) {
      QV_TRY(save->edits_[i]->keep_reserved(index, reservation.name, vmstate_bytes));
      save->edits_[i]->set_added_extra({});
    } else {
      QV_TRY(save->edits_[i]->rename_snapshot(index, save->new_name_));
    }
    save->ids_.push_back(reservation.snapshots[i].id);
  }
  return save;
}

SetSave::~SetSave() {
  (void)abort();
}

VmstateArea &SetSave::vmstate() {
  return edits_[primary_]->vmstate();
}

void SetSave::expect_stream_bytes(uint64_t bytes) {
  edits_[primary_]->expect_stream_bytes(bytes);
}

void SetSave::set_more_extra(std::vector<std::byte> more_extra) {
  edits_[primary_]->set_added_extra(std::move(more_extra));
}

const std::string &SetSave::id(size_t image) const {
  return ids_[image];
}

Result<void> SetSave::commit(uint64_t vmstate_bytes) {
  auto step_one_and_two = [&]() -> Result<void> {
    for (size_t i = 0; i < edits_.size(); ++i) {
      if (i != primary_) {
        QV_TRY(edits_[i]->commit(0));
      }
    }
    return edits_[primary_]->commit(vmstate_bytes);
  };
  if (auto done = step_one_and_two(); !done) {
    if (edits_[primary_]->committed()) {
      // The write or its flush failed: which side it fell on is seen when the image is next read.
      return tl::unexpected(with_context(
          done.error(), "the last write of the commit failed, so '" + name_ +
                            "' is there or is not; `qvmstate resume` settles the other disks"));
    }
    Error first = std::move(done).error();
    if (auto undone = abort(); !undone) {
      first.message +=
          "; undoing failed as well (" + undone.error().message + "): run `qvmstate resume`";
    }
    return tl::unexpected(std::move(first));
  }
  return finish_secondaries();
}

Result<void> SetSave::finish_secondaries() {
  std::optional<Error> first;
  for (size_t i = 0; i < images_.size(); ++i) {
    if (i == primary_) {
      continue;
    }
    auto done = rename_and_remove(*images_[i], new_name_, name_, old_name_);
    if (!done && !first) {
      first = with_context(done.error(), "'" + name_ +
                                             "' is saved, but this disk still has it under the "
                                             "name of a save in progress; `qvmstate resume` "
                                             "finishes it");
    }
  }
  edits_.clear();
  if (first) {
    return tl::unexpected(std::move(*first));
  }
  return {};
}

// A commit that failed may have switched the header or not, so what is there is read again.
Result<void> SetSave::take_back(Image &image) const {
  QV_TRY(image.reload());
  return rename_and_remove(image, old_name_, name_, new_name_);
}

Result<void> SetSave::abort() {
  std::optional<Error> first;
  for (size_t i = 0; i < edits_.size(); ++i) {
    if (i == primary_ && edits_[i]->committed()) {
      edits_.clear();
      return {};
    }
  }
  for (size_t i = 0; i < edits_.size(); ++i) {
    images_[i]->file().clear_error();
    auto undone = edits_[i]->committed() ? take_back(*images_[i]) : edits_[i]->abort();
    if (!undone && !first) {
      first = std::move(undone).error();
    }
  }
  edits_.clear();
  if (first) {
    return tl::unexpected(std::move(*first));
  }
  return {};
}

Result<void> delete_from_set(const std::vector<Image *> &images, const std::string &name,
                             bool give_back_space) {
  std::vector<Image *> holders;
  for (const bool with_vmstate : {true, false}) {
    for (Image *image : images) {
      const int index = find_snapshot(image->snapshots(), name);
      if (index >= 0 &&
          (image->snapshots()[static_cast<size_t>(index)].vmstate_bytes != 0) == with_vmstate) {
        holders.push_back(image);
      }
    }
  }
  if (holders.empty()) {
    return fail(ErrorCode::not_found,
                (images.empty() ? std::string() : images.front()->name() + ": ") +
                    "has no snapshot named '" + name + "'");
  }
  for (Image *image : holders) {
    QV_ASSIGN(auto edit, ImageEdit::begin(*image));
    QV_TRY(edit->remove_snapshot(static_cast<size_t>(find_snapshot(image->snapshots(), name))));
    QV_TRY(edit->commit(0));
    if (give_back_space) {
      edit->give_back_space();
    }
  }
  return {};
}

bool needs_recovery(const std::vector<Image *> &images) {
  return !find_interrupted(images).empty();
}

Result<std::vector<std::string>> recover_set(const std::vector<Image *> &images) {
  std::vector<std::string> actions;
  // One at a time: settling changes the image's list.
  for (size_t rounds = 0; rounds < recoveries_max; ++rounds) {
    const std::vector<Interrupted> found = find_interrupted(images);
    if (found.empty()) {
      break;
    }
    const Interrupted &save = found.front();
    QV_TRY(settle(save));
    actions.push_back(save.image->name() + ": " +
                      (save.finish ? "finished the interrupted save of '"
                                   : "took back the interrupted save of '") +
                      save.mark.name + "'");
  }
  return actions;
}

}  // namespace qvmstate::qcow2
