// Saves over several images, and what their names may be. Crashes are tried in tests/crash.
#include "qcow2/image_set.h"

#include <gtest/gtest.h>

#include "edit_helpers.h"
#include "qcow2/header.h"

namespace qvmstate::qcow2::test {
namespace {

struct Pair {
  Pair()
      : first(fixture("qemu-72-v3-4k-preallocated.qcow2")),
        second(fixture("qemu-72-v2-4k-snapshots.qcow2")) {}
  std::vector<Image *> images() { return {first.image.get(), second.image.get()}; }
  std::vector<std::vector<std::string>> names() {
    std::vector<std::vector<std::string>> all;
    for (const Image *image : images()) {
      all.emplace_back();
      for (const Snapshot &snapshot : image->snapshots()) {
        all.back().push_back(snapshot.name);
      }
    }
    return all;
  }
  // The vmstate in the first.
  Result<void> save(uint64_t seed, bool replace) {
    NewSnapshot snapshot;
    snapshot.name = "state";
    snapshot.date_seconds = 1700000000 + static_cast<uint32_t>(seed);
    QV_ASSIGN(auto set, SetSave::begin(images(), 0, snapshot, replace));
    const Bytes stream = seeded_bytes(50 * kib, seed);
    QV_TRY(write_stream(*first.file, set->vmstate(), stream, 64 * kib));
    id_of_first = set->id(0);
    id_of_second = set->id(1);
    return set->commit(stream.size());
  }

  MemoryImage first;
  MemoryImage second;
  std::string id_of_first;
  std::string id_of_second;
};

using Names = std::vector<std::vector<std::string>>;

TEST(ImageSet, SaveReplaceAndDelete) {
  Pair pair;
  ASSERT_TRUE(pair.save(1, false));
  EXPECT_EQ(pair.names(), (Names{{"state"}, {"old1", "old3", "state"}}));
  EXPECT_EQ(pair.id_of_first, "1");
  EXPECT_EQ(pair.id_of_second, "4");
  EXPECT_FALSE(needs_recovery(pair.images()));
  const auto taken = pair.save(2, false);
  ASSERT_FALSE(taken);
  EXPECT_EQ(taken.error().code, ErrorCode::exists);
  ASSERT_TRUE(pair.save(2, true));
  EXPECT_EQ(pair.names(), (Names{{"state"}, {"old1", "old3", "state"}}));
  EXPECT_TRUE(*vmstate_of(*pair.first.image, "state") == seeded_bytes(50 * kib, 2));
  EXPECT_EQ(pair.second.image->snapshots()[2].vmstate_bytes, 0U);
  EXPECT_EQ(pair.second.image->snapshots()[2].date_seconds, 1700000002U);
  ASSERT_TRUE(delete_from_set(pair.images(), "state", true));
  EXPECT_EQ(pair.names(), (Names{{}, {"old1", "old3"}}));
  const auto missing = delete_from_set(pair.images(), "state", true);
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code, ErrorCode::not_found);
}

TEST(ImageSet, NamesOfASaveInProgressAreRefused) {
  Pair pair;
  for (const std::string name : {"a.new-1", "a.saving", "a.old-22", "old1", "4x.new-0", "12", ""}) {
    EXPECT_FALSE(check_save_name(pair.images(), name, false)) << name;
  }
  for (const std::string name : {"a.new-", "a.new-x", ".new-1", "new-1"}) {
    EXPECT_TRUE(check_save_name(pair.images(), name, false)) << name;
  }
  EXPECT_TRUE(check_save_name(pair.images(), "old1", true));
  // Room for ".new-" and the longest id.
  EXPECT_TRUE(check_save_name(pair.images(), std::string(223, 'x'), false));
  EXPECT_FALSE(check_save_name(pair.images(), std::string(224, 'x'), false));
  EXPECT_TRUE(check_save_name({pair.first.image.get()}, std::string(255, 'x'), false));
}

// The second image was switched and its flush failed: the list in memory is older than the file.
TEST(ImageSet, AFailedFlushInTheSecondImageIsTakenBack) {
  Pair pair;
  ASSERT_TRUE(pair.save(1, false));
  io::MemoryOptions options;
  options.faults = {{io::FileOperation::sync, 1, -EIO}};  // the first is before the header write
  pair.second.backend->set_options(options);
  const auto failed = pair.save(2, true);
  ASSERT_FALSE(failed);
  EXPECT_EQ(failed.error().code, ErrorCode::io);
  EXPECT_EQ(MemoryImage(pair.second.contents()).image->snapshots()[2].name, "state");
  EXPECT_EQ(pair.names(), (Names{{"state"}, {"old1", "old3", "state"}}));
  EXPECT_EQ(pair.second.image->snapshots()[2].date_seconds, 1700000001U);
  EXPECT_TRUE(*vmstate_of(*pair.first.image, "state") == seeded_bytes(50 * kib, 1));
}

// One switch of the second image is all that reached the disk.
TEST(ImageSet, RecoveryGoesBackWhereTheVmstateIsMissing) {
  Pair pair;
  ASSERT_TRUE(pair.save(1, false));
  const Bytes first_before = pair.first.contents();
  const size_t changes_before = pair.second.backend->journal().size();
  ASSERT_TRUE(pair.save(2, true));
  const auto &journal = pair.second.backend->journal();
  size_t changes = changes_before;
  while (journal[changes].offset != switch_offset) {
    ++changes;
  }
  MemoryImage first(first_before);
  MemoryImage second(pair.second.backend->contents_after(changes + 1));
  EXPECT_EQ(find_snapshot(second.image->snapshots(), "state"), -1);
  EXPECT_GE(find_snapshot(second.image->snapshots(), "state.old-2"), 0);
  EXPECT_GE(find_snapshot(second.image->snapshots(), "state.new-2"), 0);
  const std::vector<Image *> images{first.image.get(), second.image.get()};
  EXPECT_TRUE(needs_recovery(images));
  const auto actions = recover_set(images);
  ASSERT_TRUE(actions);
  ASSERT_EQ(actions->size(), 1U);
  EXPECT_NE(actions->front().find("took back"), std::string::npos);
  EXPECT_FALSE(needs_recovery(images));
  ASSERT_EQ(second.image->snapshots().size(), 3U);
  EXPECT_EQ(second.image->snapshots()[2].name, "state");
  EXPECT_EQ(second.image->snapshots()[2].date_seconds, 1700000001U);
}

// A user's own snapshot that happens to be called so is nobody's save in progress.
TEST(ImageSet, ANameAloneIsNoSaveInProgress) {
  Pair pair;
  ASSERT_TRUE(rename(*pair.second.image, "old1", "mine.new-1"));
  EXPECT_FALSE(needs_recovery(pair.images()));
  const auto actions = recover_set(pair.images());
  ASSERT_TRUE(actions);
  EXPECT_TRUE(actions->empty());
  EXPECT_GE(find_snapshot(pair.second.image->snapshots(), "mine.new-1"), 0);
}

NewSnapshot named(const std::string &name, uint32_t date) {
  NewSnapshot snapshot;
  snapshot.name = name;
  snapshot.date_seconds = date;
  return snapshot;
}

Result<Reservation> reserve(Pair &pair, const std::string &name, bool replace = false) {
  return reserve_set(pair.images(), 0, named(name, 1700000009), replace, 100 * kib);
}

TEST(ImageSet, AReservationIsOfTheDiskAlone) {
  Pair pair;
  const auto reservation = reserve(pair, "state");
  ASSERT_TRUE(reservation) << reservation.error().message;
  EXPECT_EQ(pair.names(), (Names{{"state.saving"}, {"old1", "old3", "state.saving"}}));
  EXPECT_EQ(pair.first.image->snapshots()[0].vmstate_bytes, 0U);
  EXPECT_TRUE(needs_recovery(pair.images()));
  // The runs: whole pages of any host, from 64 KiB to 64 KiB of the file, and enough of them.
  uint64_t bytes = 0;
  for (const AreaRun &run : reservation->runs) {
    EXPECT_EQ(run.host_first * 4096 % (64 * kib), 0U);
    EXPECT_EQ(run.count * 4096 % (64 * kib), 0U);
    EXPECT_EQ(run.stream_first * 4096, bytes);
    bytes += run.count * 4096;
  }
  EXPECT_EQ(bytes, 128 * kib);
  EXPECT_EQ(reserve(pair, "state").error().code, ErrorCode::exists);
  const auto actions = recover_set(pair.images());
  ASSERT_TRUE(actions);
  EXPECT_EQ(actions->size(), 2U);
  EXPECT_EQ(pair.names(), (Names{{}, {"old1", "old3"}}));
}

TEST(ImageSet, WhatWasReservedIsAllThatCanBeWritten) {
  Pair pair;
  const auto reservation = reserve(pair, "state");
  ASSERT_TRUE(reservation);
  ReservedArea area(reservation->runs, pair.first.image->geometry(), "first");
  EXPECT_TRUE(write_stream(*pair.first.file, area, seeded_bytes(128 * kib, 1), 64 * kib));
  ReservedArea again(reservation->runs, pair.first.image->geometry(), "first");
  const auto full = write_stream(*pair.first.file, again, seeded_bytes(128 * kib + 1, 1), 64 * kib);
  ASSERT_FALSE(full);
  EXPECT_EQ(full.error().code, ErrorCode::no_space);
}

TEST(ImageSet, WhatTheGuardForbidsIsNotWritten) {
  Pair pair;
  const auto reservation = reserve(pair, "state");
  ASSERT_TRUE(reservation);
  int asked = 0;
  ReservedArea area(
      reservation->runs, pair.first.image->geometry(), "first", [&]() -> Result<void> {
        return ++asked < 2 ? Result<void>() : fail(ErrorCode::bad_state, "no longer ours");
      });
  const auto refused =
      write_stream(*pair.first.file, area, Bytes(128 * kib, std::byte{1}), 64 * kib);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().message, "no longer ours");
  std::byte written[2] = {};
  const HostOffset begin = HostOffset(reservation->runs.front().host_first * 4096);
  for (const unsigned half : {0U, 1U}) {
    ASSERT_TRUE(
        pair.first.file->read_at(std::span(written).subspan(half, 1), begin + half * 64 * kib));
  }
  EXPECT_EQ(written[0], std::byte{1});
  EXPECT_EQ(written[1], std::byte{0});
}

// Deleted by QEMU's delvm, or made anew, in between.
TEST(ImageSet, AReservationThatIsGoneIsNotFinished) {
  for (const bool anew : {false, true}) {
    Pair pair;
    const auto reservation = reserve(pair, "state");
    ASSERT_TRUE(reservation);
    ASSERT_TRUE(remove(*pair.first.image, "state.saving"));
    if (anew) {
      Image *first = pair.images().front();
      ASSERT_TRUE(reserve_set({first}, 0, named("state", 1700000010), false, 100 * kib));
    }
    EXPECT_FALSE(find_reserved(*pair.first.image, *reservation, 0));
    EXPECT_TRUE(find_reserved(*pair.second.image, *reservation, 1));
    const auto finished = SetSave::begin_finish(pair.images(), *reservation, false, 1000);
    ASSERT_FALSE(finished);
    EXPECT_EQ(finished.error().code, ErrorCode::bad_state);
  }
}

// As with a real save: QEMU's tools write to the disk and make snapshots between the two steps.
TEST(ImageSet, QemuUsesTheImageBetweenTheSteps) {
  if (!have_qemu_img()) {
    GTEST_SKIP() << "qemu-img is not installed";
  }
  for (const std::string options : {"cluster_size=512", "cluster_size=65536", "compat=0.10",
                                    "cluster_size=2M", "extended_l2=on"}) {
    SCOPED_TRACE(options);
    const ScratchFolder scratch;
    const std::string path = scratch.path("disk.qcow2");
    ASSERT_EQ(qemu_img({"create", "-q", "-f", "qcow2", "-o", options, path, "3M"}).status, 0);
    ASSERT_EQ(qemu_io(path, {"write -P 1 0 1M"}).status, 0);
    const Bytes stream = seeded_bytes(300 * kib + 5, 3);
    Reservation reservation;
    {
      const auto file = open_writable(path);
      auto image = Image::open(*file);
      ASSERT_TRUE(image);
      auto reserved = reserve_set({&*image}, 0, named("state", 1700000009), false, 3 * mib);
      ASSERT_TRUE(reserved) << reserved.error().message;
      reservation = *reserved;
    }
    EXPECT_EQ(check_complaint(path), "");
    ASSERT_EQ(qemu_io(path, {"write -P 2 512k 2M"}).status, 0);
    ASSERT_EQ(qemu_img({"snapshot", "-c", "between", path}).status, 0);
    ASSERT_EQ(qemu_io(path, {"write -P 3 0 3M"}).status, 0);
    {
      const auto file = open_writable(path);
      auto image = Image::open(*file);
      ASSERT_TRUE(image);
      ReservedArea area(reservation.runs, image->geometry(), path);
      ASSERT_TRUE(write_stream(*file, area, stream, 64 * kib));
      auto finish = SetSave::begin_finish({&*image}, reservation, false, stream.size());
      ASSERT_TRUE(finish) << finish.error().message;
      ASSERT_TRUE((*finish)->commit(stream.size()));
      EXPECT_TRUE(*vmstate_of(*image, "state") == stream);
      EXPECT_TRUE(qemu_vmstate(path, *image, "state", 0, stream.size()) == stream);
      EXPECT_FALSE(needs_recovery({&*image}));
    }
    EXPECT_EQ(check_complaint(path), "");
    const Bytes disk = converted(path, "state");
    EXPECT_EQ(disk[512 * kib], std::byte{1});
    EXPECT_EQ(disk[2 * mib], std::byte{0});
    EXPECT_EQ(converted(path)[2 * mib], std::byte{3});
    // QEMU's own delete, of both, leaves nothing.
    ASSERT_EQ(qemu_img({"snapshot", "-d", "state", path}).status, 0);
    ASSERT_EQ(qemu_img({"snapshot", "-d", "between", path}).status, 0);
    EXPECT_EQ(check_complaint(path), "");
  }
}

TEST(ImageSet, QemuDeletesAReservation) {
  if (!have_qemu_img()) {
    GTEST_SKIP() << "qemu-img is not installed";
  }
  const ScratchFolder scratch;
  const std::string path = scratch.path("disk.qcow2");
  ASSERT_EQ(qemu_img({"create", "-q", "-f", "qcow2", path, "3M"}).status, 0);
  {
    const auto file = open_writable(path);
    auto image = Image::open(*file);
    ASSERT_TRUE(image);
    ASSERT_TRUE(reserve_set({&*image}, 0, named("state", 1), false, 3 * mib));
  }
  EXPECT_EQ(check_complaint(path), "");
  ASSERT_EQ(qemu_img({"snapshot", "-d", "state.saving", path}).status, 0);
  EXPECT_EQ(check_complaint(path), "");
}

}  // namespace
}  // namespace qvmstate::qcow2::test
