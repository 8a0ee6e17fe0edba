// A state in an image as the base of the next one: what is shared, what is written, and bases that
// lie.
#include "vmstate/base_state.h"

#include <gmock/gmock.h>

#include <memory>

#include "qcow2/image_set.h"
#include "stream_fixture.h"
#include "unit/qcow2/edit_helpers.h"
#include "vmstate/snapshot_source.h"
#include "vmstate/state_check.h"
#include "vmstate/stored_state.h"

namespace qvmstate::vmstate::test {
namespace {

using qcow2::Image;
using qcow2::Snapshot;
using testing::HasSubstr;

constexpr auto U = Touch::untouched;
constexpr auto Z = Touch::zero;
constexpr auto D = Touch::data;
constexpr uint64_t group_pages = 15;

class BaseStateTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!qcow2::test::have_qemu_img()) {
      GTEST_SKIP() << "qemu-img, which makes the image, is not installed";
    }
    create("cluster_size=64k");
    std::vector<Touch> pages(40 * group_pages + 7, D);
    std::fill_n(pages.begin() + 5 * group_pages, group_pages, Z);
    std::fill_n(pages.begin() + 6 * group_pages, 2 * group_pages, U);
    ram_.add_block("pc.ram", pages, 1);
    ram_.add_block("rom", std::vector<Touch>(3, D), 2);
  }

  void create(const std::string &options) {
    const auto made =
        qcow2::test::qemu_img({"create", "-q", "-f", "qcow2", "-o", options, path_, "1M"});
    ASSERT_EQ(made.status, 0) << made.output;
    file_ = qcow2::test::open_writable(path_);
    auto opened = Image::open(*file_);
    ASSERT_TRUE(opened) << opened.error().message;
    image_ = std::make_unique<Image>(std::move(*opened));
  }

  const Snapshot &snapshot(const std::string &name) const {
    return image_->snapshots().at(
        static_cast<size_t>(qcow2::find_snapshot(image_->snapshots(), name)));
  }

  /// As a save does it, `threads` of which look for what has changed, as far as it is not known.
  Result<StreamStats> save(const std::string &name, const std::string &base = {},
                           size_t threads = 1, KnownGroups *groups = nullptr) {
    std::optional<StateChecksum> checksum;
    std::vector<Digest> digests;
    std::optional<qcow2::SetBase> shared;
    if (!base.empty()) {
      QV_ASSIGN(checksum, check_base(*image_, snapshot(base)));
      QV_ASSIGN(digests, read_kept_digests(*image_, snapshot(base), *checksum));
      shared = qcow2::SetBase{base, checksum->stream_bytes};
    }
    qcow2::NewSnapshot added;
    added.name = name;
    QV_ASSIGN(auto set, qcow2::SetSave::begin({image_.get()}, 0, added, true, shared));
    std::optional<BaseState> state;
    AlignedOptions options = {.group_bytes = 64 * kib, .groups = groups};
    if (shared) {
      options.base = &state.emplace(*checksum, digests, set->vmstate());
      options.ram_again.assign(threads - 1, &ram_);
    }
    QV_ASSIGN(io::BufferPool pool, io::BufferPool::create(3, 256 * kib));
    io::StreamBuffer out(image_->file(), pool, set->vmstate());
    QV_ASSIGN(const StreamStats stats,
              write_aligned_stream(out, {"pc", {}, 4096}, ram_, {}, options, {}));
    set->set_more_extra(format_checksum(*stats.checksum));
    QV_TRY(image_->file().sync());
    QV_TRY(set->commit(stats.stream_bytes));
    return stats;
  }

  /// The RAM that the snapshot brings back, and its checksum, are right.
  void expect_holds(const std::string &name, const FakeRam &ram) {
    const auto open = [&]() -> Result<std::unique_ptr<StreamSource>> {
      QV_ASSIGN(auto source, SnapshotSource::reopen(*image_, snapshot(name), {}));
      return std::unique_ptr<StreamSource>(std::move(source));
    };
    qcow2::Findings findings;
    const auto check = check_state(open, parse_checksum(snapshot(name).more_extra), name, findings);
    ASSERT_TRUE(check) << check.error().message;
    EXPECT_EQ(check->checksum, ChecksumResult::right) << name;
    EXPECT_EQ(findings.list().size(), 0U) << name;
    const auto state = StoredState::open(open);
    ASSERT_TRUE(state) << state.error().message;
    const auto stored = (*state)->ram();
    ASSERT_TRUE(stored);
    for (size_t block = 0; block < ram.blocks().size(); ++block) {
      Blob bytes(ram.blocks()[block].used_bytes);
      ASSERT_TRUE((*stored)->read_pages(block, 0, bytes.size() / page, page, bytes.data(), page));
      EXPECT_TRUE(bytes == ram.expected(block)) << name << ", block " << block;
    }
  }

  /// Bytes of the extra data of "one" are others; the digests of its groups cannot be had then.
  void expect_refused(const StateChecksum &lie, const std::string &why) {
    const auto read = read_kept_digests(*image_, snapshot("one"), lie);
    ASSERT_FALSE(read) << why;
    EXPECT_EQ(read.error().code, ErrorCode::bad_image);
    EXPECT_THAT(read.error().message, HasSubstr(why));
    EXPECT_THAT(read.error().message, HasSubstr("without --base"));
  }

  const qcow2::test::ScratchFolder folder_;
  const std::string path_ = folder_.path("disk.qcow2");
  std::unique_ptr<io::File> file_;
  std::unique_ptr<Image> image_;
  FakeRam ram_{true};
};

TEST_F(BaseStateTest, WhatIsTheSameIsShared) {
  const auto first = save("one");
  ASSERT_TRUE(first) << first.error().message;
  EXPECT_EQ(first->written_groups, 39U);  // 41 of pc.ram without three, 1 of rom
  EXPECT_EQ(first->shared_groups, 0U);
  const FakeRam before = ram_;
  // One changes, one becomes zeros, one is not zeros any more.
  ram_.memory(0)[10 * group_pages * page + 5] ^= std::byte{1};
  std::memset(ram_.memory(0).data() + 20 * group_pages * page, 0, group_pages * page);
  ram_.memory(0)[5 * group_pages * page] = std::byte{1};
  for (const size_t threads : {1U, 2U, 3U}) {
    SCOPED_TRACE(threads);
    const auto second = save("two", "one", threads);
    ASSERT_TRUE(second) << second.error().message;
    EXPECT_EQ(second->written_groups, 2U);
    EXPECT_EQ(second->shared_groups, 37U);
    EXPECT_EQ(second->ram_bytes, first->ram_bytes);
    EXPECT_EQ(second->data_pages, first->data_pages);
    EXPECT_EQ(qcow2::test::check_complaint(path_), "");
    expect_holds("one", before);
    expect_holds("two", ram_);
  }
  // Nothing has changed since.
  const auto third = save("three", "two", 2);
  ASSERT_TRUE(third) << third.error().message;
  EXPECT_EQ(third->written_groups, 0U);
  EXPECT_EQ(third->shared_groups, 39U);
  ASSERT_TRUE(qcow2::test::remove(*image_, "one", true));
  ASSERT_TRUE(qcow2::test::remove(*image_, "two", true));
  EXPECT_EQ(qcow2::test::check_complaint(path_), "");
  expect_holds("three", ram_);
}

// The same stream comes of what is known as of what is read, with a base and without; and what is
// known is not read.
TEST_F(BaseStateTest, WhatIsKnownIsNotRead) {
  KnownGroups groups = nothing_known(ram_.blocks(), 64 * kib);
  const auto first = save("one", {}, 1, &groups);
  ASSERT_TRUE(first) << first.error().message;
  EXPECT_EQ(first->read_groups, 40U);  // two were never touched
  EXPECT_EQ(first->known_groups, 0U);
  // One changes, one becomes zeros, one is not zeros any more.
  ram_.memory(0)[10 * group_pages * page + 5] ^= std::byte{1};
  std::memset(ram_.memory(0).data() + 20 * group_pages * page, 0, group_pages * page);
  ram_.memory(0)[5 * group_pages * page] = std::byte{1};
  const auto expected = save("expected", "one");
  ASSERT_TRUE(expected) << expected.error().message;
  EXPECT_EQ(expected->read_groups, 40U);
  EXPECT_EQ(expected->known_groups, 0U);
  for (const size_t threads : {1U, 3U}) {
    SCOPED_TRACE(threads);
    KnownGroups known = groups;
    for (const uint64_t group : {10U, 20U, 5U}) {
      known[0][group].reset();
    }
    const auto second = save("two", "one", threads, &known);
    ASSERT_TRUE(second) << second.error().message;
    EXPECT_EQ(second->checksum, expected->checksum);
    EXPECT_EQ(second->read_groups, 3U);
    EXPECT_EQ(second->known_groups, 39U);
    EXPECT_EQ(second->written_groups, 2U);
    EXPECT_EQ(second->shared_groups, 37U);
    EXPECT_EQ(second->data_pages, expected->data_pages);
    EXPECT_EQ(second->zero_pages, expected->zero_pages);
    EXPECT_EQ(second->untouched_pages, expected->untouched_pages);
    expect_holds("two", ram_);
    // All is known now, so that only that is read which has to be written.
    const auto third = save("three", "one", threads, &known);
    ASSERT_TRUE(third) << third.error().message;
    EXPECT_EQ(third->checksum, expected->checksum);
    EXPECT_EQ(third->read_groups, 2U);
    EXPECT_EQ(third->written_groups, 2U);
    const auto whole = save("four", {}, threads, &known);
    ASSERT_TRUE(whole) << whole.error().message;
    EXPECT_EQ(whole->checksum->stream_bytes, expected->checksum->stream_bytes);
    EXPECT_EQ(whole->read_groups, 39U);
    EXPECT_EQ(whole->known_groups, 3U);
    EXPECT_EQ(whole->written_groups, 39U);
    expect_holds("three", ram_);
    expect_holds("four", ram_);
  }
  // A group of which that is wrong: the state has it as it was.
  KnownGroups wrong = groups;
  for (const uint64_t group : {10U, 5U}) {
    wrong[0][group].reset();
  }
  const auto lie = save("lie", "one", 2, &wrong);
  ASSERT_TRUE(lie) << lie.error().message;
  EXPECT_NE(lie->checksum, expected->checksum);
  EXPECT_EQ(qcow2::test::check_complaint(path_), "");
}

TEST_F(BaseStateTest, IsReplacedByTheOneOnIt) {
  ASSERT_TRUE(save("one"));
  ram_.memory(0)[200 * page] ^= std::byte{1};
  const auto second = save("one", "one");
  ASSERT_TRUE(second) << second.error().message;
  EXPECT_EQ(second->written_groups, 1U);
  EXPECT_EQ(second->shared_groups, 38U);
  EXPECT_EQ(image_->snapshots().size(), 1U);
  EXPECT_EQ(qcow2::test::check_complaint(path_), "");
  expect_holds("one", ram_);
}

TEST_F(BaseStateTest, ClustersOfManyToAGroup) {
  create("cluster_size=4k");
  ASSERT_TRUE(save("one"));
  ram_.memory(0)[200 * page] ^= std::byte{1};
  const auto second = save("two", "one");
  ASSERT_TRUE(second) << second.error().message;
  EXPECT_EQ(second->written_groups, 1U);
  EXPECT_EQ(qcow2::test::check_complaint(path_), "");
  expect_holds("two", ram_);
}

TEST_F(BaseStateTest, AnotherStateIsNone) {
  const Blob stream(100 * kib, std::byte{1});
  ASSERT_TRUE(qcow2::test::save(*image_, "plain", stream));
  ASSERT_TRUE(qcow2::test::save(*image_, "disk", {}));
  const auto plain = check_base(*image_, snapshot("plain"));
  ASSERT_FALSE(plain);
  EXPECT_EQ(plain.error().code, ErrorCode::not_supported);
  EXPECT_THAT(plain.error().message, HasSubstr("'plain'"));
  EXPECT_THAT(plain.error().message, HasSubstr("--layout stream-aligned"));
  const auto disk = check_base(*image_, snapshot("disk"));
  ASSERT_FALSE(disk);
  EXPECT_THAT(disk.error().message, HasSubstr("no VM state"));
  // Groups of another size than this image's clusters want.
  Snapshot other = snapshot("plain");
  other.more_extra = format_checksum({1000, {}, 128 * kib, 4096});
  EXPECT_FALSE(check_base(*image_, other));
  other.more_extra = format_checksum({1000, {}, 64 * kib, 4096});
  EXPECT_TRUE(check_base(*image_, other));
}

TEST_F(BaseStateTest, LiesAreRefused) {
  ASSERT_TRUE(save("one"));
  const auto checksum = check_base(*image_, snapshot("one"));
  ASSERT_TRUE(checksum) << checksum.error().message;
  ASSERT_TRUE(read_kept_digests(*image_, snapshot("one"), *checksum));
  StateChecksum lie = *checksum;
  lie.digest[3] ^= std::byte{1};
  expect_refused(lie, "are others");
  lie = *checksum;
  lie.kept_offset += 16;
  expect_refused(lie, "are others");
  for (const uint64_t offset : {uint64_t{4096}, uint64_t{1} << 40, UINT64_MAX, UINT64_MAX - 100}) {
    lie.kept_offset = offset;
    expect_refused(lie, "do not lie in the image");
  }
  lie = *checksum;
  lie.stream_bytes = lie.kept_offset = uint64_t{1} << 41;  // tables for that would take 512 MiB
  expect_refused(lie, "do not lie in the image");
}

}  // namespace
}  // namespace qvmstate::vmstate::test
