// One edit: what it may write to, and that it leaves no trace when it is not committed.
#include "qcow2/image_edit.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "edit_helpers.h"
#include "qcow2/header.h"

namespace qvmstate::qcow2::test {
namespace {

constexpr const char *with_snapshots = "qemu-72-v2-4k-snapshots.qcow2";

// Ends inside its last cluster, as QEMU leaves it; the file is then made longer and cut again.
TEST(ImageEdit, AbortLeavesTheFileAsItWas) {
  const Bytes before = fixture(with_snapshots);
  MemoryImage disk(before);
  auto edit = ImageEdit::begin(*disk.image);
  ASSERT_TRUE(edit) << edit.error().message;
  NewSnapshot snapshot;
  snapshot.name = "fresh";
  ASSERT_TRUE((*edit)->add_snapshot(snapshot));
  ASSERT_TRUE(write_stream(*disk.file, (*edit)->vmstate(), seeded_bytes(100 * kib, 1), 64 * kib));
  ASSERT_FALSE(disk.contents() == before);
  ASSERT_TRUE((*edit)->abort());
  EXPECT_FALSE((*edit)->committed());
  ASSERT_EQ(disk.contents().size(), before.size());
  EXPECT_TRUE(
      std::equal(before.begin(), before.end(), disk.contents().begin(),
                 [](std::byte was, std::byte is) { return is == was || is == std::byte{}; }));
  EXPECT_TRUE(view(*disk.image).value() == view(*MemoryImage(before).image).value());
}

TEST(ImageEdit, TheDestructorUndoesToo) {
  const Bytes before = fixture("qemu-72-v3-4k-refcount2.qcow2");
  MemoryImage disk(before);
  {
    auto edit = ImageEdit::begin(*disk.image);
    ASSERT_TRUE(edit);
    NewSnapshot snapshot;
    snapshot.name = "fresh";
    ASSERT_TRUE((*edit)->add_snapshot(snapshot));
    ASSERT_FALSE(disk.contents() == before);
  }
  EXPECT_TRUE(disk.contents() == before);
}

// Every write but the last goes past the old end or to clusters whose old count is 0, and the last
// one is bytes 36 to 71, after a sync and before another.
TEST(ImageEdit, OverwritesNothingButTheSwitch) {
  const Bytes before = fixture(with_snapshots);
  MemoryImage disk(before);
  ASSERT_TRUE(save(*disk.image, "fresh", seeded_bytes(100 * kib, 1)));
  const auto table = load_be<uint64_t>(before.data() + 48);
  const auto block = load_be<uint64_t>(before.data() + table);
  const auto in_use = [&](uint64_t cluster) {
    return load_be<uint16_t>(before.data() + block + cluster * 2) != 0;
  };
  const auto &journal = disk.backend->journal();
  std::vector<size_t> switches;
  for (size_t i = 0; i < journal.size(); ++i) {
    const io::JournalEntry &entry = journal[i];
    if (entry.operation == io::FileOperation::resize) {
      EXPECT_GE(entry.bytes, before.size());
    }
    if (entry.operation == io::FileOperation::write && entry.offset == 36) {
      EXPECT_EQ(entry.bytes, 36U);
      switches.push_back(i);
      continue;
    }
    if (entry.operation == io::FileOperation::write ||
        entry.operation == io::FileOperation::punch_hole) {
      for (uint64_t at = entry.offset; at < entry.offset + entry.bytes; ++at) {
        ASSERT_FALSE(at < before.size() && in_use(at / 4096)) << "byte " << at;
      }
    }
  }
  ASSERT_EQ(switches.size(), 1U);
  ASSERT_EQ(journal.size(), switches[0] + 2);
  EXPECT_EQ(journal[switches[0] - 1].operation, io::FileOperation::sync);
  EXPECT_EQ(journal[switches[0] + 1].operation, io::FileOperation::sync);
}

TEST(ImageEdit, WhatIsAddedIsInTheTable) {
  MemoryImage disk(fixture(with_snapshots));
  auto edit = ImageEdit::begin(*disk.image);
  ASSERT_TRUE(edit);
  NewSnapshot snapshot;
  snapshot.name = "fresh";
  snapshot.date_seconds = 1234567;
  snapshot.date_nanos = 89;
  snapshot.clock_nanos = 5'000'000'001;
  snapshot.icount = 77;
  snapshot.more_extra = {std::byte{1}, std::byte{2}, std::byte{3}};
  ASSERT_TRUE((*edit)->add_snapshot(snapshot));
  EXPECT_EQ((*edit)->added_id(), "4");  // QEMU gave 1 to 3
  ASSERT_TRUE((*edit)->commit(0));
  EXPECT_TRUE((*edit)->committed());
  ASSERT_EQ(disk.image->snapshots().size(), 3U);
  const Snapshot &added = disk.image->snapshots()[2];
  EXPECT_EQ(added.id, "4");
  EXPECT_EQ(added.name, "fresh");
  EXPECT_EQ(added.date_seconds, 1234567U);
  EXPECT_EQ(added.date_nanos, 89U);
  EXPECT_EQ(added.clock_nanos, 5'000'000'001U);
  EXPECT_EQ(added.icount, 77U);
  EXPECT_EQ(added.vmstate_bytes, 0U);
  EXPECT_EQ(added.disk_bytes, 64 * kib);
  EXPECT_EQ(added.more_extra, snapshot.more_extra);
}

// A chain of states, each on the one before, deleted in every order of three.
TEST(ImageEdit, StatesThatShareOutliveEachOther) {
  if (!have_qemu_img()) {
    GTEST_SKIP() << "qemu-img is missing";
  }
  const ScratchFolder folder;
  const std::string path = folder.path("disk.qcow2");
  for (const char *options :
       {"cluster_size=64k", "cluster_size=4k,compat=0.10", "cluster_size=16k,extended_l2=on"}) {
    std::vector<std::string> names{"one", "three", "two"};
    do {
      SCOPED_TRACE(options + (" " + names[0] + names[1] + names[2]));
      ASSERT_EQ(qemu_img({"create", "-q", "-f", "qcow2", "-o", options, path, "1M"}).status, 0);
      const auto file = open_writable(path);
      auto image = Image::open(*file);
      ASSERT_TRUE(image);
      std::map<std::string, Bytes> streams;
      streams["one"] = seeded_bytes(400 * kib + 5, 1);
      ASSERT_TRUE(save(*image, "one", streams["one"]));
      const std::span<const std::byte> one = streams["one"];
      const auto save_on = [&](const std::string &name, const SharedStream &shared) {
        Bytes &stream = streams[name] = shared.head;
        const auto base = std::span(streams[shared.base]).subspan(shared.from, shared.bytes);
        stream.insert(stream.end(), base.begin(), base.end());
        stream.insert(stream.end(), shared.tail.begin(), shared.tail.end());
        const auto saved = save_sharing(*image, name, shared, false);
        ASSERT_TRUE(saved) << saved.error().message;
        EXPECT_EQ(check_complaint(path), "");
      };
      save_on("two", {"one", seeded_bytes(64 * kib, 2), 64 * kib, 256 * kib, seeded_bytes(7, 3)});
      save_on("three", {"two", seeded_bytes(128 * kib, 4), 0, 192 * kib, seeded_bytes(9, 5)});
      for (const std::string &gone : names) {
        for (const auto &[name, stream] : streams) {
          const auto found = vmstate_of(*image, name);
          ASSERT_TRUE(found) << found.error().message;
          EXPECT_TRUE(*found == stream) << name;
          EXPECT_TRUE(qemu_vmstate(path, *image, name, 0, stream.size()) == stream) << name;
        }
        ASSERT_TRUE(remove(*image, gone, true));
        streams.erase(gone);
        EXPECT_EQ(check_complaint(path), "");
      }
    } while (std::next_permutation(names.begin(), names.end()));
  }
}

// Counts of two bits go to 3, and a load needs one: a cluster can have two owners.
TEST(ImageEdit, ClustersThatCannotBeCountedOnceMoreAreNotShared) {
  if (!have_qemu_img()) {
    GTEST_SKIP() << "qemu-img is missing";
  }
  const ScratchFolder folder;
  const std::string path = folder.path("disk.qcow2");
  const CommandResult made = qemu_img(
      {"create", "-q", "-f", "qcow2", "-o", "cluster_size=4k,refcount_bits=2", path, "1M"});
  ASSERT_EQ(made.status, 0) << made.output;
  const auto file = open_writable(path);
  auto image = Image::open(*file);
  ASSERT_TRUE(image);
  const Bytes stream = seeded_bytes(128 * kib, 1);
  ASSERT_TRUE(save(*image, "one", stream));
  const auto can_share = [&](const std::string &base, uint64_t from, uint64_t bytes) {
    auto edit = ImageEdit::begin(*image);
    EXPECT_TRUE(edit);
    const int index = find_snapshot(image->snapshots(), base);
    EXPECT_TRUE((*edit)->hold_vmstate(static_cast<size_t>(index), stream.size()));
    return (*edit)->vmstate().can_share(StreamOffset(from), bytes);
  };
  EXPECT_TRUE(can_share("one", 0, 128 * kib));
  EXPECT_FALSE(can_share("one", 64 * kib, 68 * kib)) << "past its end";
  ASSERT_TRUE(save_sharing(*image, "two", {"one", seeded_bytes(4096, 2), 0, 64 * kib, {}}, false));
  EXPECT_EQ(check_complaint(path), "");
  EXPECT_FALSE(can_share("one", 0, 64 * kib));
  EXPECT_FALSE(can_share("one", 60 * kib, 8 * kib));
  EXPECT_TRUE(can_share("one", 64 * kib, 64 * kib));
  EXPECT_FALSE(can_share("two", 4096, 4096));
  EXPECT_TRUE(can_share("two", 0, 4096));
  // Each can be applied, which counts once more, and deleted.
  EXPECT_EQ(qemu_img({"snapshot", "-a", "two", path}).status, 0);
  EXPECT_EQ(check_complaint(path), "");
  ASSERT_TRUE(image->reload());
  ASSERT_TRUE(remove(*image, "one"));
  EXPECT_EQ(check_complaint(path), "");
  EXPECT_TRUE(vmstate_of(*image, "two").value() == [&] {
    Bytes expected = seeded_bytes(4096, 2);
    expected.insert(expected.end(), stream.begin(), stream.begin() + 64 * kib);
    return expected;
  }());
}

TEST(ImageEdit, RenamingChangesTheNameAlone) {
  MemoryImage disk(fixture(with_snapshots));
  auto expected = view(*disk.image).value();
  ASSERT_TRUE(rename(*disk.image, "old1", "other"));
  expected.snapshots["other"] = expected.snapshots["old1"];
  expected.snapshots.erase("old1");
  EXPECT_TRUE(view(*disk.image).value() == expected);
}

TEST(ImageEdit, TheLastSnapshotLeavesNoTable) {
  MemoryImage disk(fixture(with_snapshots));
  const auto active = view(*disk.image).value().active;
  ASSERT_TRUE(remove(*disk.image, "old3"));
  ASSERT_TRUE(remove(*disk.image, "old1", true));
  EXPECT_EQ(disk.image->header().snapshot_count, 0U);
  EXPECT_EQ(disk.image->header().snapshot_table_offset.value, 0U);
  EXPECT_TRUE(view(*disk.image).value().active == active);
}

TEST(ImageEdit, AnL2EntryThatPointsBetweenClustersIsRefused) {
  Bytes bytes = fixture(with_snapshots);
  const auto l1 = load_be<uint64_t>(bytes.data() + 40);
  const uint64_t l2 = load_be<uint64_t>(bytes.data() + l1) & 0x00fffffffffffe00;
  store_be<uint64_t>(bytes.data() + l2, 0x8000000000005200);
  MemoryImage disk(bytes);
  const auto refused = save(*disk.image, "fresh", seeded_bytes(kib, 1));
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::bad_image);
  EXPECT_TRUE(std::equal(bytes.begin(), bytes.begin() + 4096, disk.contents().begin()));
}

}  // namespace
}  // namespace qvmstate::qcow2::test
