#include "qcow2/cluster_reader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <zlib.h>

#include <optional>
#include <stdexcept>

#include "qcow2/io/memory_backend.h"
#include "test_images.h"

namespace qvmstate::qcow2 {
namespace {

using test::Bytes;
using testing::HasSubstr;

/// Counts the reads that reach the file.
class CountingBackend : public io::MemoryBackend {
 public:
  using MemoryBackend::MemoryBackend;
  int64_t read_some(void *data, size_t bytes, uint64_t offset) override {
    ++reads;
    return MemoryBackend::read_some(data, bytes, offset);
  }
  int reads = 0;
};

/// An image in memory and a reader of its active disk.
struct ImageInMemory {
  explicit ImageInMemory(Bytes bytes) {
    auto backend_owned = std::make_unique<CountingBackend>(std::move(bytes));
    backend = backend_owned.get();
    file = std::make_unique<io::File>(std::move(backend_owned), "image", 1);
    auto opened = Image::open(*file);
    if (!opened) {
      throw std::runtime_error(opened.error().message);
    }
    image = std::move(*opened);
    reader.emplace(image, image.header().l1_offset, image.header().l1_entries);
  }
  Result<Bytes> read(uint64_t offset, size_t bytes) {
    Bytes to(bytes, std::byte{0xee});
    QV_TRY(reader->read(GuestOffset(offset), to));
    return to;
  }

  CountingBackend *backend;
  std::unique_ptr<io::File> file;
  Image image;
  std::optional<ClusterReader> reader;
};

Bytes filled(size_t bytes, uint8_t value) {
  return Bytes(bytes, std::byte{value});
}

Bytes joined(std::initializer_list<Bytes> parts) {
  Bytes all;
  for (const Bytes &part : parts) {
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

/// The minimal image of 512-byte clusters with L2 entry `index` replaced.
Bytes with_entry(uint64_t index, uint64_t entry, uint32_t version = 3) {
  Bytes bytes = test::minimal_image(9, version);
  store_be<uint64_t>(bytes.data() + 4 * 512 + index * 8, entry);
  return bytes;
}

/// The same with 16 KiB clusters (subclusters of 512 bytes) and extended entries.
Bytes with_extended_entry(uint64_t index, uint64_t entry, uint64_t bitmap) {
  Bytes bytes = test::minimal_image(14, 3, true);
  store_be<uint64_t>(bytes.data() + 4 * 16384 + index * 16, entry);
  store_be<uint64_t>(bytes.data() + 4 * 16384 + index * 16 + 8, bitmap);
  return bytes;
}

Bytes deflated(std::span<const std::byte> bytes) {
  Bytes out(bytes.size() + 1024);
  z_stream stream = {};
  EXPECT_EQ(deflateInit2(&stream, 9, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY), Z_OK);
  stream.next_in = reinterpret_cast<Bytef *>(const_cast<std::byte *>(bytes.data()));
  stream.avail_in = static_cast<uInt>(bytes.size());
  stream.next_out = reinterpret_cast<Bytef *>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

/// An image of 4 KiB clusters whose first cluster is compressed from `contents`, at an offset of
/// 100 bytes into host cluster 5.
Bytes with_compressed(std::span<const std::byte> contents) {
  Bytes bytes = test::minimal_image(12);
  const Bytes packed = deflated(contents);
  EXPECT_LT(packed.size(), 4096U - 100);
  const uint64_t offset = 5 * 4096 + 100;
  std::copy(packed.begin(), packed.end(), bytes.begin() + static_cast<int64_t>(offset));
  const uint64_t additional_sectors = (100 + packed.size() - 1) / 512;
  // 4 KiB clusters: 58 bits of offset, then the additional sectors (formats: 70 - cluster_bits).
  const uint64_t entry = uint64_t{1} << 62 | additional_sectors << 58 | offset;
  store_be<uint64_t>(bytes.data() + 4 * 4096, entry);
  return bytes;
}

TEST(ClusterReader, ReadsDataZerosAndUnallocatedClusters) {
  ImageInMemory image(with_entry(3, 0xa00 | 1));  // zero, but with a host cluster
  auto bytes = image.read(0, 5 * 512);
  ASSERT_TRUE(bytes) << bytes.error().message;
  EXPECT_EQ(*bytes,
            joined({filled(512, 0x55), filled(512, 0x66), filled(512, 0x77), filled(1024, 0)}));
  // From inside one cluster into another.
  bytes = image.read(500, 20);
  ASSERT_TRUE(bytes) << bytes.error().message;
  EXPECT_EQ(*bytes, joined({filled(12, 0x55), filled(8, 0x66)}));
  // Over the end of a span without an L2 table behind it.
  bytes = image.read(32768 - 10, 20);
  ASSERT_TRUE(bytes) << bytes.error().message;
  EXPECT_EQ(*bytes, filled(20, 0));
  EXPECT_TRUE(image.read(0, 0));
}

TEST(ClusterReader, ContiguousClustersAreOneRead) {
  ImageInMemory image(test::minimal_image());
  ASSERT_TRUE(image.read(0, 512));  // L1 and L2 are cached from here on
  image.backend->reads = 0;
  ASSERT_TRUE(image.read(10, 3 * 512 - 20));
  EXPECT_EQ(image.backend->reads, 1);

  // The second cluster elsewhere: three pieces, each in its place.
  ImageInMemory scattered(joined({with_entry(1, 8 * 512), filled(512, 0x88)}));
  ASSERT_TRUE(scattered.read(0, 512));
  scattered.backend->reads = 0;
  const auto bytes = scattered.read(0, 3 * 512);
  ASSERT_TRUE(bytes) << bytes.error().message;
  EXPECT_EQ(*bytes, joined({filled(512, 0x55), filled(512, 0x88), filled(512, 0x77)}));
  EXPECT_EQ(scattered.backend->reads, 3);
}

TEST(ClusterReader, PastTheTableIsAnError) {
  ImageInMemory image(test::minimal_image());
  constexpr uint64_t end = 4 * 32768;  // 4 L1 entries
  EXPECT_TRUE(image.read(end - 10, 10));
  for (const uint64_t offset : {end - 9, end, uint64_t{1} << 40, UINT64_MAX - 5}) {
    const auto bytes = image.read(offset, 10);
    ASSERT_FALSE(bytes) << offset;
    EXPECT_EQ(bytes.error().code, ErrorCode::bad_image);
    EXPECT_THAT(bytes.error().message, HasSubstr("past the 4 entries of the L1 table"));
  }
  EXPECT_FALSE(image.reader->extent_at(GuestOffset(end)));
}

TEST(ClusterReader, DataPastTheEndOfTheFileReadsAsZeros) {
  Bytes bytes = test::minimal_image();
  bytes.resize(6 * 512 + 100);  // inside the second data cluster
  ImageInMemory image(std::move(bytes));
  const auto read = image.read(0, 3 * 512);
  ASSERT_TRUE(read) << read.error().message;
  EXPECT_EQ(*read, joined({filled(512, 0x55), filled(100, 0x66), filled(412 + 512, 0)}));
}

TEST(ClusterReader, ExtentsFollowTheKind) {
  Bytes bytes = with_entry(3, 1);                                                 // zero
  store_be<uint64_t>(bytes.data() + 4 * 512 + 4 * 8, 0xa00 | 1);                  // zero, allocated
  store_be<uint64_t>(bytes.data() + 4 * 512 + 5 * 8, uint64_t{1} << 62 | 0xa00);  // compressed
  ImageInMemory image(std::move(bytes));
  const auto expect = [&](uint64_t offset, ClusterKind kind, uint64_t length) {
    const auto extent = image.reader->extent_at(GuestOffset(offset));
    ASSERT_TRUE(extent) << extent.error().message;
    EXPECT_EQ(extent->kind, kind) << offset;
    EXPECT_EQ(extent->bytes, length) << offset;
  };
  expect(0, ClusterKind::data, 3 * 512);
  expect(700, ClusterKind::data, 3 * 512 - 700);
  expect(3 * 512, ClusterKind::zero, 512);
  expect(4 * 512 + 1, ClusterKind::zero_allocated, 511);
  expect(5 * 512, ClusterKind::compressed, 512);
  expect(6 * 512, ClusterKind::unallocated, 32768 - 6 * 512);
  expect(32768 + 100, ClusterKind::unallocated, 32768 - 100);
}

TEST(ClusterReader, HostileEntriesAreRefused) {
  struct Case {
    uint64_t entry;
    uint32_t version;
    const char *why;
  };
  const Case cases[] = {
      {0xa00 | 2, 3, "reserved bits"},
      {0xa00 | 0x100, 3, "reserved bits"},
      {uint64_t{1} << 56 | 0xa00, 3, "reserved bits"},
      {uint64_t{1} << 61 | 0xa00, 3, "reserved bits"},
      {1, 2, "zero flag"},
      {0xa00 | 1, 2, "zero flag"},
      {uint64_t{3} << 62 | 0xa00, 3, "copied flag"},
      {uint64_t{1} << 62 | uint64_t{1} << 56, 3, "2^56"},
      {uint64_t{1} << 62 | ((uint64_t{1} << 61) - 1), 3, "2^56"},
  };
  for (const Case &hostile : cases) {
    ImageInMemory image(with_entry(1, hostile.entry, hostile.version));
    for (const Result<void> &result : {image.reader->extent_at(GuestOffset(512)).map([](auto) {}),
                                       image.read(0, 1024).map([](auto) {})}) {
      ASSERT_FALSE(result) << hostile.entry;
      EXPECT_EQ(result.error().code, ErrorCode::bad_image);
      EXPECT_THAT(result.error().message, HasSubstr("image: L2 table entry 0x"));
      EXPECT_THAT(result.error().message, HasSubstr(hostile.why));
    }
    EXPECT_TRUE(image.read(0, 512)) << "the entry before it";
  }
  Bytes bytes = test::minimal_image(12);
  store_be<uint64_t>(bytes.data() + 4 * 4096, 5 * 4096 + 512);
  ImageInMemory image(std::move(bytes));
  EXPECT_THAT(image.read(0, 1).error().message, HasSubstr("does not point at the start"));
}

TEST(ClusterReader, SubclustersAreHonoured) {
  // Subclusters 0 and 31 allocated, 1 and 2 zero, the others neither.
  ImageInMemory image(with_extended_entry(1, 6 * 16384, 0x0000000680000001));
  const auto bytes = image.read(16384, 16384);
  ASSERT_TRUE(bytes) << bytes.error().message;
  EXPECT_EQ(*bytes, joined({filled(512, 0x66), filled(30 * 512, 0), filled(512, 0x66)}));
  const auto expect = [&](uint64_t offset, ClusterKind kind, uint64_t length) {
    const auto extent = image.reader->extent_at(GuestOffset(offset));
    ASSERT_TRUE(extent) << extent.error().message;
    EXPECT_EQ(extent->kind, kind) << offset;
    EXPECT_EQ(extent->bytes, length) << offset;
  };
  expect(0, ClusterKind::data, 16384 + 512);
  expect(16384 + 512, ClusterKind::zero_allocated, 1024);
  expect(16384 + 1536, ClusterKind::unallocated, 28 * 512);
  expect(16384 + 31 * 512 + 5, ClusterKind::data, 512 - 5 + 16384);

  ImageInMemory zero(with_extended_entry(0, 0, 0xffffffff00000000));
  const auto extent = zero.reader->extent_at(GuestOffset(0));
  ASSERT_TRUE(extent) << extent.error().message;
  EXPECT_EQ(extent->kind, ClusterKind::zero);
  EXPECT_EQ(extent->bytes, 16384U);
}

TEST(ClusterReader, HostileSubclustersAreRefused) {
  struct Case {
    uint64_t entry, bitmap;
    const char *why;
  };
  const Case cases[] = {
      {5 * 16384, 0x0000000400000004, "both allocated and zero"},
      {0, 1, "no cluster"},
      {5 * 16384 | 1, 0xffffffff, "zero flag"},
      {uint64_t{1} << 62 | 5 * 16384, 1, "has subclusters"},
      {5 * 16384 + 512, 0xffffffff, "does not point at the start"},
  };
  for (const Case &hostile : cases) {
    ImageInMemory image(with_extended_entry(0, hostile.entry, hostile.bitmap));
    const auto bytes = image.read(0, 512);
    ASSERT_FALSE(bytes) << hostile.why;
    EXPECT_EQ(bytes.error().code, ErrorCode::bad_image);
    EXPECT_THAT(bytes.error().message, HasSubstr(hostile.why));
  }
}

TEST(ClusterReader, InflatesCompressedClusters) {
  const Bytes contents = test::compressible_bytes(4096, 1);
  ImageInMemory image(with_compressed(contents));
  auto bytes = image.read(0, 4096 + 10);
  ASSERT_TRUE(bytes) << bytes.error().message;
  EXPECT_EQ(*bytes, joined({contents, filled(10, 0x66)}));
  // A part of it, and without reading the file again.
  image.backend->reads = 0;
  bytes = image.read(1000, 50);
  ASSERT_TRUE(bytes) << bytes.error().message;
  EXPECT_EQ(*bytes, Bytes(contents.begin() + 1000, contents.begin() + 1050));
  EXPECT_EQ(image.backend->reads, 0);
}

TEST(ClusterReader, CompressedBytesThatAreNotOneClusterAreRefused) {
  for (const size_t bytes : {0, 100, 4095, 4097, 5000}) {
    ImageInMemory image(with_compressed(test::compressible_bytes(bytes, 1)));
    const auto read = image.read(0, 1);
    ASSERT_FALSE(read) << bytes;
    EXPECT_EQ(read.error().code, ErrorCode::bad_image);
    EXPECT_THAT(read.error().message, HasSubstr("does not inflate to one"));
  }
  // Not deflate at all, and bytes past the end of the file.
  ImageInMemory image(with_entry(1, uint64_t{1} << 62 | 0xa00));
  EXPECT_THAT(image.read(512, 1).error().message, HasSubstr("does not inflate"));
  ImageInMemory outside(with_entry(1, uint64_t{1} << 62 | 0x100000));
  EXPECT_THAT(outside.read(512, 1).error().message, HasSubstr("does not inflate"));
}

TEST(ClusterReader, EncryptedAndExternalDataAreRefused) {
  Bytes bytes = test::minimal_image();
  store_be<uint32_t>(bytes.data() + 32, 2);
  ImageInMemory encrypted(bytes);
  EXPECT_EQ(encrypted.read(0, 1).error().code, ErrorCode::not_supported);
  EXPECT_TRUE(encrypted.reader->extent_at(GuestOffset(0)));
  bytes = test::minimal_image();
  store_be<uint64_t>(bytes.data() + 72, 4);
  EXPECT_EQ(ImageInMemory(bytes).read(0, 1).error().code, ErrorCode::not_supported);
}

/// The minimal image, of 8 clusters, with a table in cluster `table` that has `count` times
/// `entry`.
Bytes with_entries(uint64_t table, uint64_t count, uint64_t entry) {
  Bytes bytes = test::minimal_image();
  for (uint64_t i = 0; i < count; ++i) {
    store_be<uint64_t>(bytes.data() + table * 512 + i * 8, entry);
  }
  store_be<uint32_t>(bytes.data() + 36, 64);  // L1 entries
  return bytes;
}

TEST(ClusterReader, TablesThatNameMoreClustersThanTheFileHasAreRefused) {
  constexpr uint64_t compressed = uint64_t{1} << 62 | 5 * 512;
  EXPECT_TRUE(ImageInMemory(with_entries(3, 8, 4 * 512)).read(0, 1));
  EXPECT_TRUE(ImageInMemory(with_entries(4, 8, 5 * 512)).read(0, 1));
  for (const Bytes &bytes : {with_entries(3, 9, 4 * 512), with_entries(4, 9, 5 * 512)}) {
    ImageInMemory image(bytes);
    for (const Result<void> &result : {image.reader->extent_at(GuestOffset(512)).map([](auto) {}),
                                       image.read(0, 1024).map([](auto) {})}) {
      ASSERT_FALSE(result);
      EXPECT_EQ(result.error().code, ErrorCode::bad_image);
      EXPECT_THAT(result.error().message, HasSubstr("names 9 clusters"));
      EXPECT_THAT(result.error().message, HasSubstr("in a file of 4096 bytes"));
    }
  }
  // Of compressed ones more: many share a cluster.
  EXPECT_TRUE(ImageInMemory(with_entries(4, 64, compressed)).reader->extent_at(GuestOffset(0)));
  // An L2 table of 512 KiB clusters maps 32 GiB, here with 4 MiB of file.
  Bytes large = test::minimal_image(19);
  for (uint64_t i = 0; i < 65536; ++i) {
    store_be<uint64_t>(large.data() + (4 << 19) + i * 8, compressed);
  }
  EXPECT_THAT(ImageInMemory(large).read(0, 1).error().message,
              HasSubstr("0 clusters and 34359738368 bytes of compressed ones"));
}

TEST(VmstateReader, StartsPastTheSnapshotsOwnDisk) {
  ImageInMemory image(test::minimal_image());
  Snapshot snapshot;
  snapshot.name = "s";
  snapshot.l1_offset = HostOffset(3 * 512);
  snapshot.l1_entries = 4;
  snapshot.disk_bytes = 0;  // L1 entry 0, the one with data, is the vmstate's
  VmstateReader whole(image.image, snapshot);
  EXPECT_EQ(whole.mapped_bytes(), 4 * 32768U);
  Bytes bytes(4);
  ASSERT_TRUE(whole.read(StreamOffset(510), bytes));
  EXPECT_EQ(bytes, joined({filled(2, 0x55), filled(2, 0x66)}));
  const auto extent = whole.extent_at(StreamOffset(512));
  ASSERT_TRUE(extent);
  EXPECT_EQ(extent->bytes, 1024U);

  snapshot.disk_bytes = 32769;  // two entries are the disk's
  VmstateReader rest(image.image, snapshot);
  EXPECT_EQ(rest.mapped_bytes(), 2 * 32768U);
  EXPECT_TRUE(rest.read(StreamOffset(2 * 32768 - 4), bytes));
  for (const uint64_t offset : {uint64_t{2 * 32768 - 3}, UINT64_MAX}) {
    const auto past = rest.read(StreamOffset(offset), bytes);
    ASSERT_FALSE(past);
    EXPECT_EQ(past.error().code, ErrorCode::bad_stream);
    EXPECT_THAT(past.error().message, HasSubstr("image: snapshot 's'"));
  }
  EXPECT_FALSE(rest.extent_at(StreamOffset(2 * 32768)));

  for (const uint64_t disk_bytes : {uint64_t{4 * 32768}, uint64_t{1} << 62, UINT64_MAX}) {
    snapshot.disk_bytes = disk_bytes;
    EXPECT_EQ(VmstateReader(image.image, snapshot).mapped_bytes(), 0U);
    EXPECT_FALSE(VmstateReader(image.image, snapshot).read(StreamOffset(0), bytes));
  }
}

struct Variant {
  const char *name;
  const char *options;
};

class AgainstQemu : public testing::TestWithParam<Variant> {
 protected:
  void SetUp() override {
    if (!test::have_tool("qemu-img") || !test::have_tool("qemu-io")) {
      GTEST_SKIP() << "qemu-img or qemu-io is missing";
    }
    test::write_file(folder_.path("noise"), test::compressible_bytes(disk_bytes, 7));
  }
  void run(const std::vector<std::string> &words) {
    const auto result = test::run_command(words);
    ASSERT_EQ(result.status, 0) << words[0] << " " << words[1] << ": " << result.output;
  }
  /// Everything that `table` maps of the disk, in reads of `piece` bytes.
  Bytes read_disk(const Image &image, HostOffset l1_offset, uint32_t l1_entries, size_t piece) {
    ClusterReader reader(image, l1_offset, l1_entries);
    Bytes bytes(disk_bytes, std::byte{0xee});
    for (size_t at = 0; at < bytes.size(); at += piece) {
      const auto result = reader.read(
          GuestOffset(at), std::span(bytes).subspan(at, std::min(piece, bytes.size() - at)));
      if (!result) {
        ADD_FAILURE() << result.error().message;
        return {};
      }
    }
    return bytes;
  }

  static constexpr size_t disk_bytes = 3 * mib + 512;
  test::ScratchFolder folder_;
};

TEST_P(AgainstQemu, DisksAndSnapshotsReadTheSame) {
  const std::string path = folder_.path("disk.qcow2");
  const std::string noise = folder_.path("noise");
  // Compressed first, then partly overwritten, zeroed, snapshotted and overwritten again.
  run({"qemu-img", "convert", "-t", "unsafe", "-c", "-f", "raw", "-O", "qcow2", "-o",
       GetParam().options, noise, path});
  run({"qemu-io", "-t", "unsafe", "-f", "qcow2", "-c", "write -q -s " + noise + " 600k 500k", "-c",
       "write -q -z 1300k 300k", "-c", "write -q -P 0x5a 1450k 5k", "-c", "discard -q 2M 256k",
       path});
  run({"qemu-img", "snapshot", "-c", "one", path});
  run({"qemu-io", "-t", "unsafe", "-f", "qcow2", "-c", "write -q -s " + noise + " 513k 700k", "-c",
       "write -q -P 0xa5 0 1k", "-c", "write -q -z 2500k 128k", path});
  run({"qemu-img", "snapshot", "-c", "two", path});
  run({"qemu-io", "-t", "unsafe", "-f", "qcow2", "-c", "write -q -P 0x77 1M 1M", path});

  const auto file = test::open_file(path);
  const auto image = Image::open(*file);
  ASSERT_TRUE(image) << image.error().message;
  ASSERT_EQ(image->snapshots().size(), 2U);
  struct Source {
    std::string raw;
    HostOffset l1_offset;
    uint32_t l1_entries;
  };
  std::vector<Source> sources = {
      {folder_.path("active.raw"), image->header().l1_offset, image->header().l1_entries}};
  run({"qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, sources[0].raw});
  for (const Snapshot &snapshot : image->snapshots()) {
    sources.push_back({folder_.path(snapshot.name), snapshot.l1_offset, snapshot.l1_entries});
    run({"qemu-img", "convert", "-l", "snapshot.name=" + snapshot.name, "-f", "qcow2", "-O", "raw",
         path, sources.back().raw});
  }
  for (const Source &source : sources) {
    SCOPED_TRACE(source.raw);
    const Bytes expected = test::read_file(source.raw);
    ASSERT_EQ(expected.size(), disk_bytes);
    EXPECT_TRUE(read_disk(*image, source.l1_offset, source.l1_entries, disk_bytes) == expected);
    EXPECT_TRUE(read_disk(*image, source.l1_offset, source.l1_entries, 10007) == expected);
  }
  EXPECT_FALSE(test::read_file(sources[0].raw) == test::read_file(sources[1].raw));
  EXPECT_FALSE(test::read_file(sources[1].raw) == test::read_file(sources[2].raw));
}

const Variant variants[] = {
    {"Version2", "compat=0.10"},
    {"Version2Clusters512", "compat=0.10,cluster_size=512"},
    {"Clusters512", "cluster_size=512"},
    {"Clusters1k", "cluster_size=1k"},
    {"Clusters4kRefcounts64", "cluster_size=4k,refcount_bits=64"},
    {"Clusters64k", "cluster_size=64k"},
    {"Clusters64kRefcounts8", "cluster_size=64k,refcount_bits=8"},
    {"Clusters1M", "cluster_size=1M"},
    {"Clusters2M", "cluster_size=2M"},
    {"ExtendedL2Clusters16k", "cluster_size=16k,extended_l2=on"},
    {"ExtendedL2Clusters64k", "cluster_size=64k,extended_l2=on"},
    {"ExtendedL2Clusters2M", "cluster_size=2M,extended_l2=on"},
};

INSTANTIATE_TEST_SUITE_P(Variants, AgainstQemu, testing::ValuesIn(variants),
                         [](const auto &test) { return test.param.name; });

TEST(ClusterReader, ReadsZstd) {
  test::ScratchFolder folder;
  const std::string raw = folder.path("raw"), path = folder.path("disk.qcow2");
  const Bytes contents = test::compressible_bytes(mib, 3);
  test::write_file(raw, contents);
  if (test::run_command({"qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o",
                         "compression_type=zstd", raw, path})
          .status != 0) {
    GTEST_SKIP() << "qemu-img is missing or has no zstd";
  }
  const auto file = test::open_file(path);
  const auto image = Image::open(*file);
  ASSERT_TRUE(image) << image.error().message;
  ClusterReader reader(*image, image->header().l1_offset, image->header().l1_entries);
  Bytes bytes(mib);
  const auto result = reader.read(GuestOffset(0), bytes);
  ASSERT_TRUE(result) << result.error().message;
  EXPECT_TRUE(bytes == contents);
}

}  // namespace
}  // namespace qvmstate::qcow2
