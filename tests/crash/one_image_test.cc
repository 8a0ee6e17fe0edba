// One image: a crash at any moment of a save, replacement, deletion, renaming or cancelled save
// leaves the state before or the state after, which qemu-img check finds clean.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "prepared_image.h"
#include "recorder.h"
#include "unit/vmstate/stream_fixture.h"
#include "vmstate/compressed_copy.h"
#include "vmstate/state_checksum.h"

namespace qvmstate::qcow2::test {
namespace {

enum class Action {
  save,
  replace,
  remove,
  rename,
  cancelled_save,
  remove_then_save,
  fixed_save,              // as mapped-ram is written: at fixed offsets, in another order
  remove_then_fixed_save,  // into clusters that were used before
  convert,                 // another state in the place of a snapshot's
  convert_compressed,
  import_state,  // as a set of one image, the checksum in the table
  import_replacing,
  share,            // a state of which a part is that of another snapshot
  share_replacing,  // which is the one that is replaced
  share_then_remove_base,
  two_step_save,  // the stream written between two switches
  two_step_replace,
};

struct Case {
  PreparedKind kind;
  Action action;
};

const char *name_of(Action action) {
  switch (action) {
    case Action::save:
      return "save";
    case Action::replace:
      return "replace";
    case Action::remove:
      return "delete";
    case Action::rename:
      return "rename";
    case Action::cancelled_save:
      return "cancelled_save";
    case Action::remove_then_save:
      return "delete_then_save";
    case Action::fixed_save:
      return "fixed_save";
    case Action::remove_then_fixed_save:
      return "delete_then_fixed_save";
    case Action::convert:
      return "convert";
    case Action::convert_compressed:
      return "convert_compressed";
    case Action::import_state:
      return "import";
    case Action::import_replacing:
      return "import_replacing";
    case Action::share:
      return "share";
    case Action::share_replacing:
      return "share_replacing";
    case Action::share_then_remove_base:
      return "share_then_delete_base";
    case Action::two_step_save:
      return "two_step_save";
    case Action::two_step_replace:
      return "two_step_replace";
  }
  return "?";
}

std::vector<Case> cases() {
  std::vector<PreparedKind> kinds{
      {2, 4 * kib, false},
      {2, 64 * kib, true},
      {3, 512, false},
      {3, 4 * kib, true},
      {3, 64 * kib, false},
      {3, 2 * mib, true},
      {3, 64 * kib, false, false, true},
      {3, 16 * kib, true, true, true},
  };
  if (rounds() > 1) {
    kinds.insert(kinds.end(), {{2, 512, true},
                               {2, 2 * mib, false},
                               {3, 512, true},
                               {3, 4 * kib, false},
                               {3, 64 * kib, true},
                               {3, 2 * mib, false},
                               {3, 64 * kib, false, true},
                               {3, 4 * kib, true, false, true},
                               {3, 2 * mib, false, false, true}});
  }
  std::vector<Case> all;
  constexpr Action actions[] = {
      Action::save,
      Action::replace,
      Action::remove,
      Action::rename,
      Action::cancelled_save,
      Action::remove_then_save,
      Action::fixed_save,
      Action::remove_then_fixed_save,
      Action::convert,
      Action::convert_compressed,
      Action::import_state,
      Action::import_replacing,
      Action::share,
      Action::share_replacing,
      Action::share_then_remove_base,
      Action::two_step_save,
      Action::two_step_replace,
  };
  for (size_t i = 0; i < kinds.size(); ++i) {
    for (size_t j = 0; j < std::size(actions); ++j) {
      // In the normal run half of the pairs, as on a chessboard: each kind, and each action, with
      // every second one of the other.
      if (rounds() > 1 || (i + j) % 2 == 0) {
        all.push_back({kinds[i], actions[j]});
      }
    }
  }
  return all;
}

const Bytes &old_stream() {
  static const Bytes bytes = seeded_bytes(200 * kib + 3, 11);
  return bytes;
}
const Bytes &new_stream() {
  static const Bytes bytes = seeded_bytes(300 * kib + 5, 12);
  return bytes;
}
/// With zeros that are worth a cluster of their own.
const Bytes &fixed_stream() {
  static const Bytes bytes = [] {
    Bytes all = seeded_bytes(300 * kib + 5, 13);
    std::fill(all.begin() + 70 * kib, all.begin() + 200 * kib, std::byte{0});
    return all;
  }();
  return bytes;
}
/// All whole groups of the old stream between other bytes, as an incremental save leaves them; of
/// clusters that are larger than it, its only one.
SharedStream shared_stream(uint64_t cluster_bytes) {
  const uint64_t group_bytes = std::max(64 * kib, cluster_bytes);
  return {"victim", seeded_bytes(group_bytes, 14), 0,
          std::max(round_down(old_stream().size(), group_bytes), group_bytes),
          seeded_bytes(5 * kib + 7, 15)};
}
Bytes shared_bytes(uint64_t cluster_bytes) {
  const SharedStream stream = shared_stream(cluster_bytes);
  Bytes bytes = stream.head;
  Bytes base = old_stream();
  base.resize(stream.bytes);
  bytes.insert(bytes.end(), base.begin(), base.end());
  bytes.insert(bytes.end(), stream.tail.begin(), stream.tail.end());
  return bytes;
}
constexpr uint32_t new_date = 1700001111;
const Bytes &new_checksum() {
  static const Bytes bytes = [] {
    vmstate::StreamDigest digest;
    digest.add(new_stream());
    return vmstate::format_checksum(digest.finish());
  }();
  return bytes;
}

// A snapshot of QEMU's (id 1), one of ours with a vmstate (id 2), and a disk changed after each.
void prepare(const std::string &path, const PreparedKind &kind) {
  create_image(path, kind);
  must(qemu_img({"snapshot", "-c", "old", path}));
  write_generation(path, kind, 1);
  {
    const auto file = open_writable(path);
    auto image = Image::open(*file);
    if (!image || !save(*image, "victim", old_stream())) {
      throw std::runtime_error("cannot prepare " + path);
    }
  }
  write_generation(path, kind, 2);
}

SnapshotView fresh_snapshot(const ImageView &before, const std::string &id,
                            const Bytes &stream = new_stream()) {
  return {before.active, stream, id, new_date};
}

/// Bytes of text, as extra data of a snapshot.
Bytes text_bytes(std::string_view text) {
  const auto *bytes = reinterpret_cast<const std::byte *>(text.data());
  return {bytes, bytes + text.size()};
}

// The states the action goes through, each from what the action is meant to do.
std::vector<ImageView> states(Action action, const ImageView &before, uint64_t cluster_bytes) {
  std::vector<ImageView> all{before};
  ImageView after = before;
  switch (action) {
    case Action::save:
      after.snapshots["fresh"] = fresh_snapshot(before, "3");
      break;
    case Action::replace:
      after.snapshots["victim"] = fresh_snapshot(before, "3");
      break;
    case Action::remove:
      after.snapshots.erase("victim");
      break;
    case Action::rename:
      after.snapshots["kept"] = after.snapshots["victim"];
      after.snapshots.erase("victim");
      break;
    case Action::cancelled_save:
      return all;
    case Action::remove_then_save:
      after.snapshots.erase("victim");
      all.push_back(after);
      after.snapshots["fresh"] = fresh_snapshot(before, "2");
      break;
    case Action::fixed_save:
      after.snapshots["fresh"] = fresh_snapshot(before, "3", fixed_stream());
      break;
    case Action::remove_then_fixed_save:
      after.snapshots.erase("victim");
      all.push_back(after);
      after.snapshots["fresh"] = fresh_snapshot(before, "2", fixed_stream());
      break;
    case Action::convert:
    case Action::convert_compressed:
      after.snapshots["victim"].vmstate = new_stream();
      after.snapshots["victim"].more_extra = new_checksum();
      break;
    case Action::import_state:
      after.snapshots["fresh"] = fresh_snapshot(before, "3");
      after.snapshots["fresh"].more_extra = new_checksum();
      break;
    case Action::import_replacing:
      after.snapshots["victim"] = fresh_snapshot(before, "3");
      after.snapshots["victim"].more_extra = new_checksum();
      break;
    case Action::share:
      after.snapshots["fresh"] = fresh_snapshot(before, "3", shared_bytes(cluster_bytes));
      break;
    case Action::share_replacing:
      after.snapshots["victim"] = fresh_snapshot(before, "3", shared_bytes(cluster_bytes));
      break;
    case Action::share_then_remove_base:
      after.snapshots["fresh"] = fresh_snapshot(before, "3", shared_bytes(cluster_bytes));
      all.push_back(after);
      after.snapshots.erase("victim");
      break;
    case Action::two_step_save:
    case Action::two_step_replace: {
      const std::string name = action == Action::two_step_save ? "fresh" : "victim";
      SnapshotView &reserved = after.snapshots[name + ".saving"];
      reserved = fresh_snapshot(before, "3", {});
      reserved.more_extra = text_bytes("qvmstate: saving");
      all.push_back(after);
      after = before;
      after.snapshots[name] = fresh_snapshot(before, "3");
      break;
    }
  }
  all.push_back(after);
  return all;
}

// As `qvmstate convert` does it, in one edit.
Result<void> convert(Image &image, const std::string &name, bool compress) {
  QV_ASSIGN(const auto edit, ImageEdit::begin(image));
  QV_TRY(edit->replace_vmstate(static_cast<size_t>(find_snapshot(image.snapshots(), name))));
  if (compress) {
    vmstate::test::BlobSource source(new_stream());
    QV_TRY(vmstate::copy_compressed(source, new_stream().size(), image.header(),
                                    edit->compressed_vmstate(), 2, [] { return Result<void>(); }));
  } else {
    QV_TRY(write_stream(image.file(), edit->vmstate(), new_stream(), 64 * kib));
  }
  edit->set_added_extra(new_checksum());
  QV_TRY(image.file().sync());
  QV_TRY(edit->commit(new_stream().size()));
  edit->give_back_space();
  return {};
}

// As `qvmstate import` does it.
Result<void> import_into(Image &image, const std::string &name, bool replace) {
  NewSnapshot snapshot;
  snapshot.name = name;
  snapshot.date_seconds = new_date;
  QV_ASSIGN(const auto set, SetSave::begin({&image}, 0, snapshot, replace));
  set->expect_stream_bytes(new_stream().size());
  QV_TRY(write_stream(image.file(), set->vmstate(), new_stream(), 64 * kib));
  set->set_more_extra(new_checksum());
  QV_TRY(image.file().sync());
  return set->commit(new_stream().size());
}

Result<void> save_in_two_steps(Image &image, const std::string &name, bool replace) {
  NewSnapshot snapshot;
  snapshot.name = name;
  snapshot.date_seconds = new_date;
  return test::save_in_two_steps({&image}, 0, snapshot, replace, new_stream());
}

Result<void> perform(Action action, Image &image) {
  SaveOptions options;
  options.date_seconds = new_date;
  options.buffer_bytes = 64 * kib;
  switch (action) {
    case Action::save:
      return save(image, "fresh", new_stream(), options);
    case Action::replace:
      options.replace = true;
      return save(image, "victim", new_stream(), options);
    case Action::remove:
      return remove(image, "victim", true);
    case Action::rename:
      return rename(image, "victim", "kept");
    case Action::cancelled_save: {
      QV_ASSIGN(auto edit, ImageEdit::begin(image));
      NewSnapshot snapshot;
      snapshot.name = "fresh";
      QV_TRY(edit->add_snapshot(snapshot));
      QV_TRY(write_stream(image.file(), edit->vmstate(), new_stream(), options.buffer_bytes));
      return edit->abort();
    }
    case Action::remove_then_save:
      QV_TRY(remove(image, "victim", true));
      return save(image, "fresh", new_stream(), options);
    case Action::fixed_save:
      options.fixed = true;
      return save(image, "fresh", fixed_stream(), options);
    case Action::remove_then_fixed_save:
      options.fixed = true;
      // Without giving its space back: the clusters hold the old bytes when they are taken.
      QV_TRY(remove(image, "victim", false));
      return save(image, "fresh", fixed_stream(), options);
    case Action::convert:
    case Action::convert_compressed:
      return convert(image, "victim", action == Action::convert_compressed);
    case Action::import_state:
      return import_into(image, "fresh", false);
    case Action::import_replacing:
      return import_into(image, "victim", true);
    case Action::share:
      return save_sharing(image, "fresh", shared_stream(image.geometry().cluster_bytes()), false,
                          new_date);
    case Action::share_replacing:
      return save_sharing(image, "victim", shared_stream(image.geometry().cluster_bytes()), true,
                          new_date);
    case Action::share_then_remove_base:
      QV_TRY(save_sharing(image, "fresh", shared_stream(image.geometry().cluster_bytes()), false,
                          new_date));
      return remove(image, "victim", true);
    case Action::two_step_save:
      return save_in_two_steps(image, "fresh", false);
    case Action::two_step_replace:
      return save_in_two_steps(image, "victim", true);
  }
  return {};
}

int state_index(const std::vector<ImageView> &states, const ImageView &seen) {
  const auto found = std::find(states.begin(), states.end(), seen);
  return found == states.end() ? -1 : static_cast<int>(found - states.begin());
}

class OneImage : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (!have_qemu_img()) {
      GTEST_SKIP() << "qemu-img, which makes the images, is not installed";
    }
    path_ = scratch_.path("disk.qcow2");
    prepare(path_, GetParam().kind);
    before_ = view_of(path_);
    ASSERT_EQ(before_.snapshots.size(), 2U);
    ASSERT_TRUE(before_.snapshots["victim"].vmstate == old_stream());
    ASSERT_FALSE(before_.snapshots["victim"].disk == before_.active);
    ASSERT_FALSE(before_.snapshots["old"].disk == before_.active);
    states_ = states(GetParam().action, before_, GetParam().kind.cluster_bytes);
    contents_ = read_file(path_);
  }

  void record(Clock &clock) {
    RecordedImage image(clock, 0, path_);
    const auto done = perform(GetParam().action, *image);
    ASSERT_TRUE(done) << done.error().message;
  }

  // As QEMU's tool reads them, backing file included.
  std::map<std::string, Bytes> disks(const std::string &path) {
    std::map<std::string, Bytes> all;
    for (const char *name : {"", "old"}) {
      all[name] = converted_counted(path, name);
    }
    return all;
  }

  ScratchFolder scratch_;
  std::string path_;
  ImageView before_;
  std::vector<ImageView> states_;
  Bytes contents_;
};

TEST_P(OneImage, CutAfterEveryChange) {
  Clock clock;
  record(clock);
  const auto disks_before = disks(path_);
  CutFile cut(scratch_.path("cut.qcow2"), contents_);
  int reached = 0;
  const size_t convert_every = std::max<size_t>(1, clock.changes.size() / 3);
  for (size_t changes = 0; changes <= clock.changes.size(); ++changes) {
    SCOPED_TRACE("after change " + std::to_string(changes) + " of " +
                 std::to_string(clock.changes.size()));
    if (changes > 0) {
      cut.apply(clock.changes[changes - 1].entry);
    }
    // Tables of 2 MiB are written in many pieces: in the normal run every fourth of these is a cut.
    const bool is_piece = changes > 0 && GetParam().kind.cluster_bytes == 2 * mib &&
                          clock.changes[changes - 1].entry.operation == io::FileOperation::write &&
                          clock.changes[changes - 1].entry.offset != switch_offset;
    if (is_piece && rounds() == 1 && changes % 4 != 0) {
      continue;
    }
    ++tally().cuts;
    if (changes > 0 && is_sync(clock.changes[changes - 1])) {
      continue;  // the file is as it was at the cut before
    }
    ASSERT_EQ(checked(cut.path()), "");
    const int state = state_index(states_, view_of(cut.path()));
    ASSERT_GE(state, reached) << (state < 0 ? "neither old nor new" : "went back");
    reached = state;
    if (changes % convert_every == 0) {
      ASSERT_TRUE(disks(cut.path()) == disks_before);
    }
  }
  EXPECT_EQ(reached, static_cast<int>(states_.size()) - 1);
  EXPECT_TRUE(!GetParam().kind.bitmap || has_good_bitmap(cut.path()));
}

// A disk with a cache: what was written since the last sync may be there or not, in any order,
// whole or in part.
TEST_P(OneImage, UnsyncedWritesLostReorderedOrTorn) {
  Clock clock;
  record(clock);
  std::mt19937_64 random(static_cast<uint64_t>(GetParam().action) * 1000 +
                         GetParam().kind.cluster_bytes + GetParam().kind.version);
  for (unsigned round = 0; round < (GetParam().kind.cluster_bytes == 2 * mib ? 3 : 8) * rounds();
       ++round) {
    const size_t changes = random() % (clock.changes.size() + 1);
    const CacheLoss loss(clock, changes);
    CutFile cut(scratch_.path("torn.qcow2"), contents_);
    CutFile *const files[] = {&cut};
    loss.apply_synced(files);
    const int durable = state_index(states_, view_of(cut.path()));
    ASSERT_GE(durable, 0);
    loss.apply_some(files, random);
    ++tally().torn;
    SCOPED_TRACE("round " + std::to_string(round) + ", " + std::to_string(changes) +
                 " changes, the last " + std::to_string(loss.unsynced()) + " not synced");
    ASSERT_EQ(checked(cut.path()), "");
    const int state = state_index(states_, view_of(cut.path()));
    ASSERT_GE(state, durable);
  }
}

// Transfers cut short, interrupted (EINTR) and refused for now (EAGAIN, as by a full ring) change
// nothing of what comes out.
TEST_P(OneImage, CutInterruptedAndRefusedTransfersEndWhole) {
  for (unsigned seed = 0; seed < 2 * rounds(); ++seed) {
    Clock clock;
    RecordedImage opened(clock, 0, path_);
    clock.options.seed = seed;
    clock.options.short_percent = 20;
    clock.options.interrupted_percent = 10;
    clock.options.again_percent = 10;
    opened.set_options(clock.options);
    const auto done = perform(GetParam().action, *opened);
    ASSERT_TRUE(done) << "seed " << seed << ": " << done.error().message;
    ++tally().noisy;
    const std::string path = scratch_.path("noisy.qcow2");
    write_sparse(path, opened.contents());
    ASSERT_EQ(checked(path), "");
    ASSERT_TRUE(view_of(path) == states_.back()) << "seed " << seed;
  }
}

// Every operation fails once. What cannot be done is undone and leaves no trace.
TEST_P(OneImage, EveryOperationFailsOnce) {
  Clock clean;
  uint64_t opening = 0;
  {
    RecordedImage image(clean, 0, path_);
    opening = clean.operations;
    ASSERT_TRUE(perform(GetParam().action, *image));
  }
  // Large clusters come in many equal pieces: a part of them in the normal run.
  const uint64_t operations = clean.operations - opening;
  const uint64_t step =
      rounds() > 1 ? 1
                   : std::max<uint64_t>(
                         1, operations / (GetParam().kind.cluster_bytes == 2 * mib ? 15 : 40));
  for (uint64_t nth = 0; nth < operations; nth += step) {
    const int error = fault_errno(nth / step);
    SCOPED_TRACE("operation " + std::to_string(nth) + " of " + std::to_string(operations) +
                 " fails with errno " + std::to_string(error));
    Clock clock;
    clock.fail_at = opening + nth;
    clock.fail_errno = error;
    RecordedImage image(clock, 0, path_);
    const auto done = perform(GetParam().action, *image);
    ASSERT_TRUE(clock.failed);
    ++tally().faults;
    // The write or flush that is the commit: which side it fell on cannot be known.
    const bool header_written =
        clock.failed_offset == switch_offset ||
        std::any_of(clock.changes.begin(), clock.changes.end(), [](const Clock::Change &change) {
          return change.entry.operation == io::FileOperation::write &&
                 change.entry.offset == switch_offset;
        });
    const std::string path = scratch_.path("failed.qcow2");
    write_sparse(path, image.contents());
    if (!(image.contents() == contents_)) {
      ASSERT_EQ(checked(path), "");
    }
    const int state = state_index(states_, view_of(path));
    ASSERT_GE(state, 0) << (done ? "it succeeded" : done.error().message);
    if (done) {
      // Reserving room ahead, or giving space back after the commit, may fail.
      EXPECT_EQ(state, static_cast<int>(states_.size()) - 1);
      continue;
    }
    EXPECT_NE(done.error().message.find("disk.qcow2"), std::string::npos) << done.error().message;
    if (!header_written && GetParam().action != Action::cancelled_save) {
      // Undone: the file is as long as it was, and what differs is free clusters made holes.
      EXPECT_EQ(state, 0);
      const Bytes &now = image.contents();
      ASSERT_EQ(now.size(), contents_.size());
      EXPECT_TRUE(std::equal(now.begin(), now.end(), contents_.begin(),
                             [](std::byte a, std::byte b) { return a == b || a == std::byte{0}; }));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Crash, OneImage, testing::ValuesIn(cases()), [](const auto &info) {
  return kind_name(info.param.kind) + "_" + name_of(info.param.action);
});

}  // namespace
}  // namespace qvmstate::qcow2::test
