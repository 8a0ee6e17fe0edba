// Two images: whatever moment a crash takes, a name in both images means one state of the VM, and
// recovery goes on or goes back, never half.
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>

#include "prepared_image.h"
#include "qcow2/image_set.h"
#include "recorder.h"

namespace qvmstate::qcow2::test {
namespace {

enum class Action {
  save,
  replace,
  replace_from_other_image,
  remove,
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
    case Action::replace_from_other_image:
      return "replace_from_other_image";
    case Action::remove:
      return "delete";
    case Action::two_step_save:
      return "two_step_save";
    case Action::two_step_replace:
      return "two_step_replace";
  }
  return "?";
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const PreparedKind &kind : {PreparedKind{2, 64 * kib, false}, PreparedKind{3, 4 * kib, true},
                                   PreparedKind{3, 512, false}}) {
    for (const Action action : {Action::save, Action::replace, Action::replace_from_other_image,
                                Action::remove, Action::two_step_save, Action::two_step_replace}) {
      all.push_back({kind, action});
    }
  }
  return all;
}

constexpr size_t image_count = 2;
constexpr size_t primary = 0;
const std::string name = "state";

using PairView = std::vector<ImageView>;

const Bytes &stream_of(int generation) {
  static const Bytes streams[] = {seeded_bytes(100 * kib + 1, 21), seeded_bytes(150 * kib + 9, 22)};
  return streams[generation];
}
uint32_t date_of(int generation) {
  return 1700000000 + static_cast<uint32_t>(generation);
}

NewSnapshot snapshot_of(int generation) {
  NewSnapshot snapshot;
  snapshot.name = name;
  snapshot.date_seconds = date_of(generation);
  snapshot.clock_nanos = 1000;
  return snapshot;
}

Result<void> save_set(const std::vector<Image *> &images, size_t with_vmstate, int generation,
                      bool replace) {
  const NewSnapshot snapshot = snapshot_of(generation);
  QV_ASSIGN(auto set, SetSave::begin(images, with_vmstate, snapshot, replace));
  const Bytes &stream = stream_of(generation);
  set->expect_stream_bytes(stream.size());
  QV_TRY(write_stream(images[with_vmstate]->file(), set->vmstate(), stream, 64 * kib));
  return set->commit(stream.size());
}

/// Whether a state of that name is there before.
bool replaces(Action action) {
  return action != Action::save && action != Action::two_step_save;
}

// Both images in memory, with one clock.
struct RecordedPair {
  RecordedPair(Clock &clock, const std::vector<std::string> &paths) {
    for (size_t i = 0; i < paths.size(); ++i) {
      images.push_back(std::make_unique<RecordedImage>(clock, i, paths[i]));
    }
  }
  std::vector<Image *> pointers() {
    std::vector<Image *> all;
    for (const auto &image : images) {
      all.push_back(&**image);
    }
    return all;
  }
  std::vector<std::unique_ptr<RecordedImage>> images;
};

// Both images as files, opened for a command.
struct OpenedPair {
  explicit OpenedPair(const std::vector<std::string> &paths) {
    for (const std::string &path : paths) {
      files.push_back(open_writable(path));
      auto image = Image::open(*files.back());
      if (!image) {
        throw std::runtime_error(image.error().message);
      }
      images.push_back(std::make_unique<Image>(std::move(*image)));
    }
  }
  std::vector<Image *> pointers() {
    std::vector<Image *> all;
    for (const auto &image : images) {
      all.push_back(image.get());
    }
    return all;
  }
  std::vector<std::unique_ptr<io::File>> files;
  std::vector<std::unique_ptr<Image>> images;
};

class ImagePair : public testing::TestWithParam<Case> {
 protected:
  // What loading `name` would bring, image by image; nothing if QEMU refuses to.
  using Loaded = std::optional<std::vector<SnapshotView>>;

  void SetUp() override {
    if (!have_qemu_img()) {
      GTEST_SKIP() << "qemu-img, which makes the images, is not installed";
    }
    const PreparedKind &kind = GetParam().kind;
    for (const char *file : {"first.qcow2", "second.qcow2"}) {
      paths_.push_back(scratch_.path(file));
      create_image(paths_.back(), kind);
    }
    // Different disks, and different snapshot ids.
    must(qemu_io(paths_[1], {"write -P 77 100k 20k"}));
    must(qemu_img({"snapshot", "-c", "only here", paths_[1]}));
    if (replaces(GetParam().action)) {
      OpenedPair pair(paths_);
      const size_t with_vmstate =
          GetParam().action == Action::replace_from_other_image ? 1 - primary : primary;
      const auto saved = save_set(pair.pointers(), with_vmstate, 0, false);
      ASSERT_TRUE(saved) << saved.error().message;
      for (const std::string &path : paths_) {
        write_generation(path, kind, 1);
      }
    }
    for (const std::string &path : paths_) {
      ASSERT_EQ(checked(path), "");
      contents_.push_back(read_file(path));
    }
    before_ = views(paths_);
    after_ = before_;
    for (size_t i = 0; i < image_count; ++i) {
      if (GetParam().action == Action::remove) {
        after_[i].snapshots.erase(name);
        continue;
      }
      int last_id = 0;
      for (const auto &[unused, snapshot] : before_[i].snapshots) {
        last_id = std::max(last_id, std::stoi(snapshot.id));
      }
      after_[i].snapshots[name] = {before_[i].active, i == primary ? stream_of(1) : Bytes(),
                                   std::to_string(last_id + 1), date_of(1)};
    }
  }

  static PairView views(const std::vector<std::string> &paths) {
    PairView all;
    for (const std::string &path : paths) {
      all.push_back(view_of(path));
    }
    return all;
  }

  static Loaded loaded(const PairView &pair) {
    std::vector<SnapshotView> all;
    bool any_vmstate = false;
    for (const ImageView &image : pair) {
      const auto found = image.snapshots.find(name);
      if (found == image.snapshots.end()) {
        return std::nullopt;
      }
      any_vmstate |= !found->second.vmstate.empty();
      all.push_back(found->second);
    }
    return any_vmstate ? Loaded(all) : std::nullopt;
  }

  Result<void> perform(const std::vector<Image *> &images) {
    if (GetParam().action == Action::remove) {
      return delete_from_set(images, name, true);
    }
    const bool replace = replaces(GetParam().action);
    if (GetParam().action == Action::two_step_save ||
        GetParam().action == Action::two_step_replace) {
      return save_in_two_steps(images, primary, snapshot_of(1), replace, stream_of(1));
    }
    return save_set(images, primary, 1, replace);
  }

  // Brings the pair to an end, as the next command does, and returns which: 0 the old state, 1 the
  // new, -1 neither.
  int settle(const std::vector<std::string> &paths) {
    ++tally().recoveries;
    {
      OpenedPair pair(paths);
      const auto actions = recover_set(pair.pointers());
      EXPECT_TRUE(actions) << actions.error().message;
      EXPECT_FALSE(needs_recovery(pair.pointers()));
    }
    PairView now = views(paths);
    if (GetParam().action == Action::remove && !(now == before_) && !(now == after_)) {
      // Gone from the image with the vmstate: refused already, and deleting again ends it.
      EXPECT_FALSE(loaded(now));
      OpenedPair pair(paths);
      const auto deleted = delete_from_set(pair.pointers(), name, false);
      EXPECT_TRUE(deleted) << deleted.error().message;
      now = views(paths);
    }
    for (const std::string &path : paths) {
      EXPECT_EQ(checked(path), "");
    }
    return now == before_ ? 0 : now == after_ ? 1 : -1;
  }

  std::vector<std::string> copies(const std::vector<std::string> &from, const std::string &prefix) {
    std::vector<std::string> to;
    for (size_t i = 0; i < from.size(); ++i) {
      to.push_back(scratch_.path(prefix + std::to_string(i) + ".qcow2"));
      write_file(to.back(), read_file(from[i]));
    }
    return to;
  }

  ScratchFolder scratch_;
  std::vector<std::string> paths_;
  std::vector<Bytes> contents_;
  PairView before_;
  PairView after_;
};

TEST_P(ImagePair, CutAfterEveryChangeThenRecovered) {
  Clock clock;
  {
    RecordedPair pair(clock, paths_);
    const auto done = perform(pair.pointers());
    ASSERT_TRUE(done) << done.error().message;
  }
  CutFile first(scratch_.path("cut0.qcow2"), contents_[0]);
  CutFile second(scratch_.path("cut1.qcow2"), contents_[1]);
  CutFile *const cut[] = {&first, &second};
  const std::vector<std::string> cut_paths{first.path(), second.path()};
  const Loaded old_state = loaded(before_);
  const Loaded new_state = loaded(after_);
  ASSERT_EQ(old_state.has_value(), replaces(GetParam().action));
  int reached = 0;
  PairView last_recovered;
  for (size_t changes = 0; changes <= clock.changes.size(); ++changes) {
    SCOPED_TRACE("after change " + std::to_string(changes) + " of " +
                 std::to_string(clock.changes.size()));
    if (changes > 0) {
      const Clock::Change &change = clock.changes[changes - 1];
      cut[change.file]->apply(change.entry);
    }
    ++tally().cuts;
    if (changes > 0 && changes < clock.changes.size() && is_sync(clock.changes[changes - 1])) {
      continue;  // the files are as they were at the cut before
    }
    // The file that did not change was looked at before.
    const size_t changed = changes > 0 ? clock.changes[changes - 1].file : 0;
    ASSERT_EQ(checked(cut_paths[changed]), "");
    const PairView seen = views(cut_paths);
    for (size_t i = 0; i < image_count; ++i) {
      ASSERT_TRUE(seen[i].active == before_[i].active);
    }
    const Loaded now = loaded(seen);
    ASSERT_TRUE(!now || now == old_state || now == new_state) << "a mixture can be loaded";

    // Recovery is tried wherever the pair reads differently from the cut before.
    if (changes == 0 || !(seen == last_recovered) || changes == clock.changes.size()) {
      last_recovered = seen;
      const int state = settle(copies(cut_paths, "recovered"));
      ASSERT_GE(state, reached) << (state < 0 ? "neither old nor new" : "went back");
      reached = state;
    }
  }
  EXPECT_EQ(reached, 1);
}

// Disks with a cache each: of what either file got since its own last sync some is lost, reordered
// or torn.
TEST_P(ImagePair, UnsyncedWritesLostReorderedOrTorn) {
  Clock clock;
  {
    RecordedPair pair(clock, paths_);
    ASSERT_TRUE(perform(pair.pointers()));
  }
  std::mt19937_64 random(static_cast<uint64_t>(GetParam().action) * 1000 +
                         GetParam().kind.cluster_bytes + GetParam().kind.version);
  for (unsigned round = 0; round < 6 * rounds(); ++round) {
    const size_t changes = random() % (clock.changes.size() + 1);
    const CacheLoss loss(clock, changes);
    SCOPED_TRACE("round " + std::to_string(round) + ", " + std::to_string(changes) +
                 " changes, the last " + std::to_string(loss.unsynced()) + " not synced");
    CutFile first(scratch_.path("torn0.qcow2"), contents_[0]);
    CutFile second(scratch_.path("torn1.qcow2"), contents_[1]);
    CutFile *const files[] = {&first, &second};
    const std::vector<std::string> torn_paths{first.path(), second.path()};
    loss.apply_synced(files);
    const int durable = settle(copies(torn_paths, "durable"));
    ASSERT_GE(durable, 0);
    loss.apply_some(files, random);
    ++tally().torn;
    for (const std::string &path : torn_paths) {
      ASSERT_EQ(checked(path), "");
    }
    const Loaded now = loaded(views(torn_paths));
    ASSERT_TRUE(!now || now == loaded(before_) || now == loaded(after_))
        << "a mixture can be loaded";
    ASSERT_GE(settle(torn_paths), durable);
  }
}

// A crash in the recovery itself, and another recovery.
TEST_P(ImagePair, RecoveryCutAfterEveryChange) {
  Clock clock;
  {
    RecordedPair pair(clock, paths_);
    ASSERT_TRUE(perform(pair.pointers()));
  }
  CutFile first(scratch_.path("cut0.qcow2"), contents_[0]);
  CutFile second(scratch_.path("cut1.qcow2"), contents_[1]);
  CutFile *const cut[] = {&first, &second};
  const std::vector<std::string> cut_paths{first.path(), second.path()};
  PairView last = before_;
  for (const Clock::Change &change : clock.changes) {
    cut[change.file]->apply(change.entry);
    const PairView seen = views(cut_paths);
    if (seen == last) {
      continue;
    }
    last = seen;
    const std::vector<std::string> start = copies(cut_paths, "start");
    Clock recovery;
    std::vector<Bytes> start_contents;
    {
      RecordedPair pair(recovery, start);
      if (!needs_recovery(pair.pointers())) {
        continue;
      }
      ASSERT_TRUE(recover_set(pair.pointers()));
      for (const std::string &path : start) {
        start_contents.push_back(read_file(path));
      }
    }
    CutFile first_again(scratch_.path("again0.qcow2"), start_contents[0]);
    CutFile second_again(scratch_.path("again1.qcow2"), start_contents[1]);
    CutFile *const again[] = {&first_again, &second_again};
    const std::vector<std::string> again_paths{first_again.path(), second_again.path()};
    std::optional<int> expected;
    const size_t step = rounds() > 1 ? 1 : 7;
    for (size_t changes = 0; changes <= recovery.changes.size(); ++changes) {
      if (changes > 0) {
        const Clock::Change &made = recovery.changes[changes - 1];
        again[made.file]->apply(made.entry);
      }
      const bool switched =
          changes > 0 && recovery.changes[changes - 1].entry.offset == switch_offset;
      if (changes % step != 0 && !switched) {
        continue;
      }
      ++tally().cuts;
      const int state = settle(copies(again_paths, "recovered"));
      ASSERT_GE(state, 0) << "after change " << changes << " of the recovery";
      ASSERT_EQ(state, expected.value_or(state)) << "recovery changed its mind";
      expected = state;
    }
  }
}

// Every operation on either image fails once: the call undoes what it did or says what is left, and
// recovery ends it.
TEST_P(ImagePair, EveryOperationFailsOnce) {
  Clock clean;
  uint64_t opening = 0;
  {
    RecordedPair pair(clean, paths_);
    opening = clean.operations;
    ASSERT_TRUE(perform(pair.pointers()));
  }
  const uint64_t operations = clean.operations - opening;
  const uint64_t step = rounds() > 1 ? 1 : std::max<uint64_t>(1, operations / 25);
  for (uint64_t nth = 0; nth < operations; nth += step) {
    const int error = fault_errno(nth / step);
    SCOPED_TRACE("operation " + std::to_string(nth) + " of " + std::to_string(operations) +
                 " fails with errno " + std::to_string(error));
    Clock clock;
    clock.fail_at = opening + nth;
    clock.fail_errno = error;
    RecordedPair pair(clock, paths_);
    const auto done = perform(pair.pointers());
    ASSERT_TRUE(clock.failed);
    ++tally().faults;
    std::vector<std::string> left;
    for (size_t i = 0; i < image_count; ++i) {
      left.push_back(scratch_.path("left" + std::to_string(i) + ".qcow2"));
      write_sparse(left.back(), pair.images[i]->contents());
      if (!(pair.images[i]->contents() == contents_[i])) {
        ASSERT_EQ(checked(left.back()), "");
      }
    }
    const PairView seen = views(left);
    if (done) {
      EXPECT_TRUE(seen == after_);
      continue;
    }
    const Loaded now = loaded(seen);
    ASSERT_TRUE(!now || now == loaded(before_) || now == loaded(after_));
    const bool primary_switched = seen[primary].snapshots != before_[primary].snapshots;
    const bool switch_failed = clock.failed_file == primary && clock.failed_offset == switch_offset;
    // A failure before the switch of the image with the vmstate is undone at once; a delete starts
    // with that switch.
    if (!primary_switched && !switch_failed) {
      EXPECT_TRUE(seen == before_) << "not undone: " << done.error().message;
    }
    if (!(seen == before_)) {
      EXPECT_EQ(settle(left), primary_switched ? 1 : 0) << done.error().message;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Crash, ImagePair, testing::ValuesIn(cases()), [](const auto &info) {
  return kind_name(info.param.kind) + "_" + name_of(info.param.action);
});

}  // namespace
}  // namespace qvmstate::qcow2::test
