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
// Begins the extra data of a NAME.new-ID; QEMU keeps extra data it does not know.
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

// What recover_set finds in one image: an interrupted save.
struct Interrupted {
  Image *image;
  MarkedName mark;
  bool finish;  ///< the image with the vmstate holds the new snapshot
};

std::vector<Interrupted> find_interrupted(const std::vector<Image *> &images) {
  std::vector<Interrupted> found;
  for (Image *image : images) {
    for (const Snapshot &snapshot : image->snapshots()) {
      const auto mark = marked(snapshot.name, new_mark);
      if (!mark || !has_saving_mark(snapshot)) {
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
  const std::string new_name = join(save.mark.name, new_mark, save.mark.id);
  const std::string old_name = join(save.mark.name, old_mark, save.mark.id);
  return save.finish ? rename_and_remove(*save.image, new_name, save.mark.name, old_name)
                     : rename_and_remove(*save.image, old_name, save.mark.name, new_name);
}

}  // namespace

Result<void> check_save_name(const std::vector<Image *> &images, const std::string &name,
                             bool replace) {
  if (images.size() > 1 && name.size() > set_name_bytes_max) {
    return fail(ErrorCode::bad_argument, "snapshot name '" + name + "': is longer than " +
                                             std::to_string(set_name_bytes_max) +
                                             " bytes; choose a shorter one");
  }
  if (marked(name, new_mark) || marked(name, old_mark)) {
    return fail(ErrorCode::bad_argument,
                "snapshot name '" + name +
                    "': names that end in .new-NUMBER or .old-NUMBER mark a save in progress; "
                    "choose another one");
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

Result<std::unique_ptr<SetSave>> SetSave::begin(std::vector<Image *> images, size_t primary,
                                                const NewSnapshot &snapshot, bool replace,
                                                const std::optional<SetBase> &base) {
  assert(primary < images.size());
  QV_TRY(check_save_name(images, snapshot.name, replace));
  std::unique_ptr<SetSave> save(new SetSave);
  save->images_ = std::move(images);
  save->primary_ = primary;
  save->name_ = snapshot.name;
  const std::string id = next_snapshot_id(save->images_[primary]->snapshots());
  save->new_name_ = join(snapshot.name, new_mark, id);
  save->old_name_ = join(snapshot.name, old_mark, id);
  for (size_t i = 0; i < save->images_.size(); ++i) {
    Image &image = *save->images_[i];
    QV_ASSIGN(auto edit, ImageEdit::begin(image));
    save->edits_.push_back(std::move(edit));
    ImageEdit &begun = *save->edits_.back();
    const int old = find_snapshot(image.snapshots(), snapshot.name);
    NewSnapshot added = snapshot;
    if (i == primary) {
      if (base) {  // which may be the one that is replaced
        const int index = find_snapshot(image.snapshots(), base->name);
        assert(index >= 0);
        QV_TRY(begun.hold_vmstate(static_cast<size_t>(index), base->bytes));
      }
      if (old >= 0) {
        QV_TRY(begun.remove_snapshot(static_cast<size_t>(old)));
      }
    } else {
      if (old >= 0) {
        QV_TRY(begun.rename_snapshot(static_cast<size_t>(old), save->old_name_));
      }
      for (const std::string &taken : {save->new_name_, save->old_name_}) {
        if (find_snapshot(image.snapshots(), taken) >= 0) {
          return fail(ErrorCode::exists, image.name() + ": a snapshot named '" + taken +
                                             "' is in the way of saving '" + snapshot.name +
                                             "'; delete it or save under another name");
        }
      }
      added.name = save->new_name_;
      added.more_extra = with_saving_mark(added.more_extra);
    }
    QV_TRY(begun.add_snapshot(added));
    save->ids_.push_back(begun.added_id());
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
