// Round trips over images that qemu-img made: a vmstate written by an edit is read back by our
// reader and by libqcow (where it refuses the image, by QEMU), QEMU's tools find the image clean
// and use the snapshot, and everything that was in the image before reads the same. And the same
// over the images in fixtures/.
//
// $QVMSTATE_ALL_IMAGES=1 tries every geometry with every content; otherwise every content is tried
// with every cluster size, and every refcount width with every cluster size and two contents.
#include <gtest/gtest.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>

#include "edit_helpers.h"
#include "qcow2/cluster_reader.h"
#include "qcow2/suitability.h"
#include "tools/libqcow_reader.h"

namespace qvmstate::qcow2::test {
namespace {

enum class Content {
  empty,
  data,
  qemu_snapshots,
  larger_backing_file,
  preallocated,
  compressed,
  zeros,
  qemu_savevm,  // and what it leaves in the active L1
  // Tried with one geometry only.
  compressed_zstd,
  preallocated_falloc,
  preallocated_full,
  lazy_refcounts,
};
constexpr Content all_contents[] = {Content::empty,          Content::data,
                                    Content::qemu_snapshots, Content::larger_backing_file,
                                    Content::preallocated,   Content::compressed,
                                    Content::zeros,          Content::qemu_savevm};

const char *name_of(Content content) {
  switch (content) {
    case Content::empty:
      return "empty";
    case Content::data:
      return "data";
    case Content::qemu_snapshots:
      return "qemu_snapshots";
    case Content::larger_backing_file:
      return "larger_backing_file";
    case Content::preallocated:
      return "preallocated";
    case Content::compressed:
      return "compressed";
    case Content::zeros:
      return "zeros";
    case Content::qemu_savevm:
      return "qemu_savevm";
    case Content::compressed_zstd:
      return "compressed_zstd";
    case Content::preallocated_falloc:
      return "preallocated_falloc";
    case Content::preallocated_full:
      return "preallocated_full";
    case Content::lazy_refcounts:
      return "lazy_refcounts";
  }
  return "?";
}

struct ImageKind {
  uint32_t version;
  uint64_t cluster_bytes;
  uint32_t refcount_bits;
  Content content;
  bool extended_l2 = false;

  // A disk that ends inside a cluster.
  uint64_t disk_bytes() const { return (cluster_bytes == 2 * mib ? 17 * mib : 6 * mib) + 512; }
  // Two bits count to 3, and loading needs one spare: a cluster with two owners has no room.
  bool has_no_room() const {
    return refcount_bits == 2 &&
           (content == Content::qemu_snapshots || content == Content::compressed ||
            content == Content::qemu_savevm);
  }
  // A third owner would be more than QEMU can count with two bits.
  int qemu_snapshots() const { return refcount_bits == 2 ? 1 : 3; }
  // For two snapshots beside the older ones; a cluster that holds several compressed ones is
  // counted once for each.
  bool has_room_to_mix() const {
    return refcount_bits > 4 || (refcount_bits == 4 && content != Content::compressed);
  }
  std::string content_options() const {
    switch (content) {
      case Content::compressed_zstd:
        return ",compression_type=zstd";
      case Content::preallocated:
        return ",preallocation=metadata";
      case Content::preallocated_falloc:
        return ",preallocation=falloc";
      case Content::preallocated_full:
        return ",preallocation=full";
      case Content::lazy_refcounts:
        return ",lazy_refcounts=on";
      default:
        return "";
    }
  }
  std::string options() const {
    return "compat=" + std::string(version == 2 ? "0.10" : "1.1") +
           ",cluster_size=" + std::to_string(cluster_bytes) +
           (version == 2 ? std::string() : ",refcount_bits=" + std::to_string(refcount_bits)) +
           (extended_l2 ? ",extended_l2=on" : "") + content_options();
  }
};

std::string kind_name(const ImageKind &kind) {
  return "v" + std::to_string(kind.version) + "_cluster" + std::to_string(kind.cluster_bytes) +
         "_refcount" + std::to_string(kind.refcount_bits) +
         (kind.extended_l2 ? "_extended_" : "_") + name_of(kind.content);
}

std::vector<ImageKind> all_kinds() {
  const char *wanted = std::getenv("QVMSTATE_ALL_IMAGES");
  const bool all = wanted && std::string(wanted) == "1";
  std::vector<ImageKind> kinds;
  size_t turn = 0;
  for (const uint64_t cluster_bytes : {512 * uint64_t{1}, 4 * kib, 64 * kib, 2 * mib}) {
    for (const Content content : all_contents) {
      // Both versions at the common sizes, turn by turn at the others.
      const bool both = all || cluster_bytes == 4 * kib || cluster_bytes == 64 * kib;
      const bool first = static_cast<int>(content) % 2 == 0;
      if (both || first) {
        kinds.push_back({2, cluster_bytes, 16, content});
      }
      if (both || !first) {
        kinds.push_back({3, cluster_bytes, 16, content});
      }
    }
    for (const uint32_t bits : {2, 4, 8, 32, 64}) {
      if (all) {
        for (const Content content : all_contents) {
          kinds.push_back({3, cluster_bytes, bits, content});
        }
        continue;
      }
      for (int i = 0; i < 2; ++i) {
        kinds.push_back({3, cluster_bytes, bits, all_contents[turn++ % std::size(all_contents)]});
      }
    }
  }
  for (const uint64_t cluster_bytes : {16 * kib, 64 * kib, 2 * mib}) {
    for (const Content content : all_contents) {
      const bool sampled =
          cluster_bytes == 16 * kib ||
          content == (cluster_bytes == 2 * mib ? Content::data : Content::larger_backing_file);
      if (all || sampled) {
        kinds.push_back({3, cluster_bytes, 16, content, true});
      }
    }
  }
  for (const Content content : {Content::compressed_zstd, Content::preallocated_falloc,
                                Content::preallocated_full, Content::lazy_refcounts}) {
    kinds.push_back({3, 64 * kib, 16, content});
  }
  kinds.push_back({3, 16 * kib, 16, Content::compressed_zstd, true});
  return kinds;
}

void must(const CommandResult &result) {
  if (result.status != 0) {
    throw std::runtime_error("exit " + std::to_string(result.status) + ": " + result.output);
  }
}

// A sparse file that is larger than the disk and full of other bytes where a vmstate would show it
// through.
void make_backing_file(const ImageKind &kind, const std::string &path) {
  Geometry geometry;
  geometry.cluster_bits = static_cast<uint32_t>(std::countr_zero(kind.cluster_bytes));
  geometry.extended_l2 = kind.extended_l2;
  const uint64_t area = geometry.vmstate_l1_index(kind.disk_bytes()) * geometry.span_bytes();
  const int descriptor = open(path.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
  const Bytes disk = compressible_bytes(kind.disk_bytes() / 2, 7);
  const Bytes beyond(8 * mib, std::byte{0xee});
  const bool written =
      pwrite(descriptor, disk.data(), disk.size(), 0) == static_cast<ssize_t>(disk.size()) &&
      pwrite(descriptor, beyond.data(), beyond.size(), static_cast<off_t>(area)) ==
          static_cast<ssize_t>(beyond.size());
  close(descriptor);
  if (!written) {
    throw std::runtime_error("cannot write " + path);
  }
}

void make_image(const ImageKind &kind, const std::string &path, const ScratchFolder &scratch) {
  const std::string size = std::to_string(kind.disk_bytes());
  if (kind.content == Content::compressed || kind.content == Content::compressed_zstd) {
    const std::string raw = scratch.path("source.raw");
    Bytes source = compressible_bytes(kind.disk_bytes() / 3, 3);
    source.resize(kind.disk_bytes());
    write_file(raw, source);
    must(qemu_img({"convert", "-f", "raw", "-O", "qcow2", "-c", "-o", kind.options(), raw, path}));
    return;
  }
  std::vector<std::string> create{"create", "-q", "-f", "qcow2"};
  if (kind.content == Content::larger_backing_file) {
    make_backing_file(kind, scratch.path("backing.raw"));
    create.insert(create.end(), {"-b", "backing.raw", "-F", "raw"});
  }
  create.insert(create.end(), {"-o", kind.options(), path, size});
  must(qemu_img(create));
  if (kind.content == Content::empty) {
    return;
  }
  must(qemu_io(path, {"write -P 17 0 64k", "write -P 18 1M 300k", "write -P 19 5M 200k"}));
  switch (kind.content) {
    case Content::qemu_snapshots:
      for (int i = 0; i < kind.qemu_snapshots(); ++i) {
        must(qemu_img({"snapshot", "-c", "old" + std::to_string(i), path}));
        must(qemu_io(path,
                     {"write -P " + std::to_string(33 + i) + " " + std::to_string(i) + "M 200k"}));
      }
      break;
    case Content::zeros:
      must(qemu_io(path, {"write -z 0 64k", "write -z 3M 1M", "write -z -u 1M 128k"}));
      break;
    case Content::qemu_savevm: {
      RunningCommand qemu({"qemu-system-x86_64", "-machine", "pc", "-accel", "tcg", "-m", "8", "-S",
                           "-display", "none", "-nodefaults", "-monitor", "stdio", "-drive",
                           "if=ide,format=qcow2,file=" + path});
      qemu.wait_for_output("(qemu)");
      qemu.send("savevm old0");
      qemu.send("savevm old1");
      qemu.send("delvm old1");
      qemu.send("quit");
      qemu.finish();
      break;
    }
    default:
      break;
  }
}

// Bytes of the active disk and of every older snapshot, as QEMU's tool reads them.
std::map<std::string, Bytes> all_converted(const std::string &path,
                                           const std::vector<std::string> &snapshots) {
  std::map<std::string, Bytes> disks;
  disks[""] = converted(path);
  for (const std::string &snapshot : snapshots) {
    disks[snapshot] = converted(path, snapshot);
  }
  return disks;
}

Result<Bytes> libqcow_vmstate(const std::string &path, const Image &image,
                              const std::string &name) {
  const Snapshot &snapshot =
      image.snapshots().at(static_cast<size_t>(find_snapshot(image.snapshots(), name)));
  QV_ASSIGN(tools::LibqcowReader reader,
            tools::LibqcowReader::open(path, snapshot.l1_offset, snapshot.l1_entries));
  Bytes bytes(snapshot.vmstate_bytes);
  const Geometry &geometry = image.geometry();
  QV_TRY(reader.read(
      GuestOffset(geometry.vmstate_l1_index(snapshot.disk_bytes) * geometry.span_bytes()), bytes));
  return bytes;
}

// An image opened for one edit, as every command opens it.
struct Opened {
  explicit Opened(const std::string &path, io::Engine engine = io::Engine::automatic)
      : file(open_writable(path, engine)), image(Image::open(*file)) {}
  Image &operator*() { return image.value(); }
  Image *operator->() { return &image.value(); }

  std::unique_ptr<io::File> file;
  Result<Image> image;
};

#define EXPECT_CLEAN(path) EXPECT_EQ(check_complaint(path), "")
#define ASSERT_OK(expression)                                    \
  do {                                                           \
    auto result_ = (expression);                                 \
    ASSERT_TRUE(result_.has_value()) << result_.error().message; \
  } while (0)

void expect_vmstate(const std::string &path, const std::string &name, const Bytes &stream) {
  Opened opened(path);
  const auto ours = vmstate_of(*opened, name);
  ASSERT_TRUE(ours) << ours.error().message;
  EXPECT_TRUE(*ours == stream) << "our reader, " << name;
  if (opened->geometry().extended_l2 || opened->header().compression_type != 0) {
    if (have_qemu_img()) {
      EXPECT_TRUE(qemu_vmstate(path, *opened, name, 0, stream.size()) == stream)
          << "qemu-img, " << name;
    }
    return;
  }
  const auto theirs = libqcow_vmstate(path, *opened, name);
  ASSERT_TRUE(theirs) << theirs.error().message;
  EXPECT_TRUE(*theirs == stream) << "libqcow, " << name;
}

class RoundTrip : public testing::TestWithParam<ImageKind> {};

TEST_P(RoundTrip, SavedReadUsedByQemuReplacedAndDeleted) {
  const ImageKind kind = GetParam();
  if (!have_qemu_img()) {
    GTEST_SKIP() << "qemu-img is not installed";
  }
  if (kind.content == Content::qemu_savevm && !have_tool("qemu-system-x86_64")) {
    GTEST_SKIP() << "qemu-system-x86_64 is not installed";
  }
  ScratchFolder scratch;
  const std::string path = scratch.path("disk.qcow2");
  make_image(kind, path, scratch);
  ASSERT_EQ(check_complaint(path), "");
  const io::Engine engine =
      kind.version == 2 || kind.refcount_bits == 4 ? io::Engine::threads : io::Engine::automatic;

  std::vector<std::string> old_snapshots;
  ImageView before;
  {
    Opened opened(path);
    for (const Snapshot &snapshot : opened->snapshots()) {
      old_snapshots.push_back(snapshot.name);
    }
    const auto seen = view(*opened);
    ASSERT_TRUE(seen) << seen.error().message;
    before = *seen;
  }
  ASSERT_EQ(old_snapshots.size(), kind.content == Content::qemu_snapshots
                                      ? static_cast<size_t>(kind.qemu_snapshots())
                                  : kind.content == Content::qemu_savevm ? 1U
                                                                         : 0U);
  const auto disks = all_converted(path, old_snapshots);
  const Bytes stream = seeded_bytes(3 * mib + 12345, 1);

  if (kind.has_no_room()) {
    const Bytes bytes = read_file(path);
    Opened opened(path, engine);
    ASSERT_OK(check_image_suits(*opened, ImageRole::vmstate));
    const auto refused = save(*opened, "fresh", stream);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, ErrorCode::not_supported) << refused.error().message;
    EXPECT_TRUE(read_file(path) == bytes);
    return;
  }

  // Save, and look at it with every reader.
  {
    Opened opened(path, engine);
    ASSERT_OK(check_image_suits(*opened, ImageRole::vmstate));
    ASSERT_OK(save(*opened, "fresh", stream));
  }
  EXPECT_CLEAN(path);
  EXPECT_NE(qemu_img({"snapshot", "-l", path}).output.find("fresh"), std::string::npos);
  EXPECT_TRUE(all_converted(path, old_snapshots) == disks);
  EXPECT_TRUE(converted(path, "fresh") == disks.at(""));
  expect_vmstate(path, "fresh", stream);
  {
    Opened opened(path);
    auto seen = view(*opened);
    ASSERT_TRUE(seen) << seen.error().message;
    EXPECT_TRUE(seen->snapshots["fresh"].disk == before.active);
    seen->snapshots.erase("fresh");
    EXPECT_TRUE(*seen == before);
  }

  // QEMU writes to the disk, goes back to the snapshot, writes again.
  const std::string overwrite = "write -P 99 0 1500k";
  must(qemu_io(path, {overwrite, "write -P 98 4M 600k"}));
  EXPECT_CLEAN(path);
  EXPECT_FALSE(converted(path) == disks.at(""));
  EXPECT_TRUE(converted(path, "fresh") == disks.at(""));
  expect_vmstate(path, "fresh", stream);
  const CommandResult applied = qemu_img({"snapshot", "-a", "fresh", path});
  EXPECT_EQ(applied.status, 0) << applied.output;
  EXPECT_CLEAN(path);
  EXPECT_TRUE(converted(path) == disks.at(""));
  must(qemu_io(path, {overwrite}));
  EXPECT_CLEAN(path);
  expect_vmstate(path, "fresh", stream);
  const Bytes active = converted(path);

  // Ours and QEMU's snapshots in turns.
  std::vector<std::string> others = old_snapshots;
  if (kind.has_room_to_mix()) {
    must(qemu_img({"snapshot", "-c", "mixed", path}));
    EXPECT_CLEAN(path);
    others.push_back("mixed");
  }
  const auto disks_mixed = all_converted(path, others);
  const Bytes second = seeded_bytes(2 * mib + 1, 2);
  {
    Opened opened(path, engine);
    SaveOptions options;
    options.replace = true;
    if (kind.has_room_to_mix()) {
      ASSERT_OK(save(*opened, "fresh", second, options));
    } else {
      ASSERT_OK(remove(*opened, "fresh"));
      EXPECT_CLEAN(path);
      ASSERT_OK(save(*opened, "fresh", second));
    }
  }
  EXPECT_CLEAN(path);
  EXPECT_TRUE(all_converted(path, others) == disks_mixed);
  EXPECT_TRUE(converted(path, "fresh") == active);
  expect_vmstate(path, "fresh", second);

  if (kind.has_room_to_mix()) {
    Opened opened(path, engine);
    ASSERT_OK(save(*opened, "other", stream));
    EXPECT_CLEAN(path);
    expect_vmstate(path, "fresh", second);
    expect_vmstate(path, "other", stream);
    must(qemu_img({"snapshot", "-d", "mixed", path}));
    EXPECT_CLEAN(path);
  }
  {
    Opened opened(path, engine);
    ASSERT_OK(remove(*opened, "fresh", true));
  }
  EXPECT_CLEAN(path);
  EXPECT_TRUE(converted(path) == active);
  if (kind.has_room_to_mix()) {
    expect_vmstate(path, "other", stream);
    EXPECT_TRUE(converted(path, "other") == active);
    const CommandResult deleted = qemu_img({"snapshot", "-d", "other", path});
    EXPECT_EQ(deleted.status, 0) << deleted.output;
    EXPECT_CLEAN(path);
  }
  // The disk is the only owner of its clusters again, and QEMU writes to them in place.
  must(qemu_io(path, {"write -P 97 0 6M"}));
  EXPECT_CLEAN(path);
  for (const std::string &snapshot : old_snapshots) {
    EXPECT_TRUE(converted(path, snapshot) == disks.at(snapshot)) << snapshot;
  }
}

// The same images, the stream at fixed offsets with zeros between.
Bytes stream_with_zeros() {
  Bytes stream = seeded_bytes(5 * mib + 4096 * 3, 21);
  std::fill(stream.begin() + 1 * mib + 200 * kib, stream.begin() + 4 * mib, std::byte{0});
  return stream;
}

/// libqcow does not know the zero flag, so only pages that hold data are compared.
void expect_data_pages(const Bytes &theirs, const Bytes &stream) {
  ASSERT_EQ(theirs.size(), stream.size());
  const Bytes zeros(4096);
  size_t compared = 0;
  for (size_t at = 0; at < stream.size(); at += zeros.size()) {
    if (std::memcmp(&stream[at], zeros.data(), zeros.size()) != 0) {
      ASSERT_EQ(std::memcmp(&theirs[at], &stream[at], zeros.size()), 0) << "at byte " << at;
      ++compared;
    }
  }
  EXPECT_GT(compared, 300U);
}

void expect_fixed_vmstate(const std::string &path, const std::string &name, const Bytes &stream,
                          bool for_libqcow, uint64_t zero_bytes_min = 2 * mib) {
  Opened opened(path);
  const auto ours = vmstate_of(*opened, name);
  ASSERT_TRUE(ours) << ours.error().message;
  EXPECT_TRUE(*ours == stream) << "our reader, " << name;
  // No cluster of the stream lets a backing file show through.
  const Snapshot &snapshot =
      opened->snapshots().at(static_cast<size_t>(find_snapshot(opened->snapshots(), name)));
  VmstateReader reader(*opened, snapshot);
  uint64_t zero_bytes = 0;
  for (uint64_t at = 0; at < stream.size();) {
    const auto extent = reader.extent_at(StreamOffset(at));
    ASSERT_TRUE(extent) << extent.error().message;
    EXPECT_NE(extent->kind, ClusterKind::unallocated) << "at byte " << at;
    zero_bytes += extent->kind == ClusterKind::zero ? extent->bytes : 0;
    at += extent->bytes;
  }
  if (opened->header().version < 3) {
    EXPECT_EQ(zero_bytes, 0U);
  } else {
    EXPECT_GE(zero_bytes, opened->geometry().cluster_bytes() == 2 * mib ? 0 : zero_bytes_min);
  }
  if (opened->geometry().extended_l2) {
    EXPECT_TRUE(qemu_vmstate(path, *opened, name, 0, stream.size()) == stream)
        << "qemu-img, " << name;
  } else if (for_libqcow) {
    const auto theirs = libqcow_vmstate(path, *opened, name);
    ASSERT_TRUE(theirs) << theirs.error().message;
    expect_data_pages(*theirs, stream);
  }
}

/// The placement does not depend on the other kinds, which the round trip above tries.
std::vector<ImageKind> fixed_kinds() {
  std::vector<ImageKind> kinds = all_kinds();
  std::erase_if(kinds, [](const ImageKind &kind) {
    return kind.content == Content::qemu_savevm || kind.refcount_bits < 8;
  });
  return kinds;
}

class RoundTripFixed : public RoundTrip {};

TEST_P(RoundTripFixed, WrittenInAnyOrder) {
  const ImageKind kind = GetParam();
  if (!have_qemu_img()) {
    GTEST_SKIP() << "qemu-img is not installed";
  }
  ScratchFolder scratch;
  const std::string path = scratch.path("disk.qcow2");
  make_image(kind, path, scratch);
  const Bytes disk = converted(path);
  const Bytes stream = stream_with_zeros();
  {
    Opened opened(path);
    ASSERT_OK(save(*opened, "first", stream, {.fixed = true}));
  }
  EXPECT_CLEAN(path);
  const bool for_libqcow = kind.content != Content::compressed_zstd;
  expect_fixed_vmstate(path, "first", stream, for_libqcow);
  // Into clusters that were used before, whose old bytes must not show.
  {
    Opened opened(path);
    ASSERT_OK(save(*opened, "other", seeded_bytes(6 * mib, 5), {}));
    ASSERT_OK(remove(*opened, "other"));
    ASSERT_OK(save(*opened, "second", stream, {.fixed = true}));
  }
  EXPECT_CLEAN(path);
  expect_fixed_vmstate(path, "second", stream, for_libqcow);
  {
    Opened opened(path);
    ASSERT_OK(remove(*opened, "first"));
  }
  EXPECT_CLEAN(path);
  expect_fixed_vmstate(path, "second", stream, for_libqcow);
  EXPECT_TRUE(converted(path) == disk);
}

TEST(RoundTripZeros, ZerosTakeNoSpace) {
  if (!have_qemu_img()) {
    GTEST_SKIP() << "qemu-img is not installed";
  }
  ScratchFolder scratch;
  for (const char *compat : {"0.10", "1.1"}) {
    const std::string path = scratch.path("disk.qcow2");
    must(qemu_img(
        {"create", "-q", "-f", "qcow2", "-o", "compat=" + std::string(compat), path, "6M"}));
    // One page in ten, so that nearly every cluster has one.
    Bytes stream(40 * mib);
    const Bytes page = seeded_bytes(3 * 4096, 4);
    for (size_t at = 0; at < stream.size(); at += 10 * 4096) {
      std::copy_n(page.begin(), 4096, stream.begin() + static_cast<ptrdiff_t>(at));
    }
    {
      Opened opened(path);
      ASSERT_OK(save(*opened, "sparse", stream, {.fixed = true}));
    }
    EXPECT_CLEAN(path);
    expect_fixed_vmstate(path, "sparse", stream, false, 0);  // every cluster has a page of data
    struct stat status = {};
    ASSERT_EQ(::stat(path.c_str(), &status), 0);
    EXPECT_LT(static_cast<uint64_t>(status.st_blocks) * 512, 6 * mib);
  }
}

INSTANTIATE_TEST_SUITE_P(Images, RoundTripFixed, testing::ValuesIn(fixed_kinds()),
                         [](const auto &info) { return kind_name(info.param); });

INSTANTIATE_TEST_SUITE_P(Images, RoundTrip, testing::ValuesIn(all_kinds()),
                         [](const auto &info) { return kind_name(info.param); });

TEST(RoundTripRefusals, RefcountsOfOneBit) {
  if (!have_qemu_img()) {
    GTEST_SKIP() << "qemu-img is not installed";
  }
  ScratchFolder scratch;
  const std::string path = scratch.path("disk.qcow2");
  must(qemu_img({"create", "-q", "-f", "qcow2", "-o", "refcount_bits=1", path, "4M"}));
  const Bytes bytes = read_file(path);
  Opened opened(path);
  const auto suits = check_image_suits(*opened, ImageRole::disk_only);
  ASSERT_FALSE(suits);
  EXPECT_EQ(suits.error().code, ErrorCode::not_supported);
  EXPECT_TRUE(read_file(path) == bytes);
}

// 50 saves and deletes in one image: what is freed is used again.
TEST(RoundTripManyTimes, FiftySavesAndDeletesKeepTheFileBounded) {
  if (!have_qemu_img()) {
    GTEST_SKIP() << "qemu-img is not installed";
  }
  for (const bool give_back_space : {false, true}) {
    ScratchFolder scratch;
    const std::string path = scratch.path("disk.qcow2");
    must(qemu_img({"create", "-q", "-f", "qcow2", path, "64M"}));
    must(qemu_io(path, {"write -P 5 0 3M"}));
    const uint64_t bytes_before = std::filesystem::file_size(path);
    constexpr uint64_t stream_bytes = 5 * mib + 4321;
    Opened opened(path);
    const Bytes disk = converted(path);
    for (uint32_t round = 0; round < 50; ++round) {
      const Bytes stream = seeded_bytes(stream_bytes, round);
      ASSERT_OK(save(*opened, "again", stream));
      ASSERT_EQ(check_complaint(path), "") << "round " << round;
      const auto read = vmstate_of(*opened, "again");
      ASSERT_TRUE(read) << read.error().message;
      ASSERT_TRUE(*read == stream) << "round " << round;
      ASSERT_OK(remove(*opened, "again", give_back_space));
      ASSERT_EQ(check_complaint(path), "") << "round " << round;
    }
    EXPECT_TRUE(converted(path) == disk);
    // One vmstate, and as much again for what free runs shorter than 1 MiB leave unused; metadata
    // is less than a MiB.
    EXPECT_LE(std::filesystem::file_size(path), bytes_before + 2 * stream_bytes + 1 * mib);
  }
}

// The same with the old one living until the new one is there: room for two, and the same spare.
TEST(RoundTripManyTimes, FiftyReplacementsKeepTheFileBounded) {
  if (!have_qemu_img()) {
    GTEST_SKIP() << "qemu-img is not installed";
  }
  ScratchFolder scratch;
  const std::string path = scratch.path("disk.qcow2");
  must(qemu_img({"create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "64M"}));
  must(qemu_io(path, {"write -P 5 0 3M"}));
  const uint64_t bytes_before = std::filesystem::file_size(path);
  constexpr uint64_t stream_bytes = 5 * mib + 4321;
  Opened opened(path);
  SaveOptions options;
  options.replace = true;
  for (uint32_t round = 0; round < 50; ++round) {
    const Bytes stream = seeded_bytes(stream_bytes, round);
    ASSERT_OK(save(*opened, "again", stream, options));
    ASSERT_EQ(check_complaint(path), "") << "round " << round;
    ASSERT_EQ(opened->snapshots().size(), 1U);
    const auto read = vmstate_of(*opened, "again");
    ASSERT_TRUE(read) << read.error().message;
    ASSERT_TRUE(*read == stream) << "round " << round;
  }
  EXPECT_LE(std::filesystem::file_size(path), bytes_before + 4 * stream_bytes + 1 * mib);
}

// Images that were made once by the QEMU releases named in fixtures/README.md.
std::vector<std::string> fixture_names() {
  std::vector<std::string> names;
  for (const auto &entry :
       std::filesystem::directory_iterator(std::string(QVMSTATE_SOURCE_DIR) + "/fixtures")) {
    if (entry.path().extension() == ".qcow2") {
      names.push_back(entry.path().filename());
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

class Fixture : public testing::TestWithParam<std::string> {};

TEST_P(Fixture, SavedReadReplacedAndDeleted) {
  ScratchFolder scratch;
  const std::string folder = std::string(QVMSTATE_SOURCE_DIR) + "/fixtures/";
  const std::string path = scratch.path("disk.qcow2");
  std::filesystem::copy_file(folder + GetParam(), path);
  std::filesystem::copy_file(folder + "backing.raw", scratch.path("backing.raw"));
  const bool with_qemu = have_qemu_img();

  Opened opened(path);
  ASSERT_OK(check_image_suits(*opened, ImageRole::vmstate));
  const auto before = view(*opened);
  ASSERT_TRUE(before) << before.error().message;
  Bytes disk;
  if (with_qemu) {
    ASSERT_EQ(check_complaint(path), "");
    disk = converted(path);
  }
  const Bytes first = seeded_bytes(300 * kib + 77, 1);
  const Bytes second = seeded_bytes(200 * kib, 2);
  const auto expect_saved = [&](const Bytes &stream) {
    expect_vmstate(path, "fresh", stream);
    auto after = view(*opened);
    ASSERT_TRUE(after) << after.error().message;
    EXPECT_TRUE(after->snapshots["fresh"].disk == before->active);
    after->snapshots.erase("fresh");
    EXPECT_TRUE(*after == *before);
    if (with_qemu) {
      EXPECT_CLEAN(path);
      EXPECT_TRUE(converted(path) == disk);
      EXPECT_TRUE(converted(path, "fresh") == disk);
    }
  };
  ASSERT_OK(save(*opened, "fresh", first));
  expect_saved(first);
  SaveOptions options;
  options.replace = true;
  ASSERT_OK(save(*opened, "fresh", second, options));
  expect_saved(second);
  ASSERT_OK(remove(*opened, "fresh", true));
  const auto after = view(*opened);
  ASSERT_TRUE(after) << after.error().message;
  EXPECT_TRUE(*after == *before);
  if (with_qemu) {
    EXPECT_CLEAN(path);
    EXPECT_TRUE(converted(path) == disk);
  }
}

INSTANTIATE_TEST_SUITE_P(Images, Fixture, testing::ValuesIn(fixture_names()), [](const auto &info) {
  std::string name = info.param.substr(0, info.param.find('.'));
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

}  // namespace
}  // namespace qvmstate::qcow2::test
