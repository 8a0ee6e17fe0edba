#include "qcow2/header.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "test_images.h"

namespace qvmstate::qcow2 {
namespace {

using test::Bytes;
using testing::HasSubstr;

// Version 2, clusters of 512 bytes: header, refcount table, refcount block, L1 table.
constexpr uint8_t version_2_bytes[] = {
    0x51, 0x46, 0x49, 0xfb,                          // 0   magic
    0x00, 0x00, 0x00, 0x02,                          // 4   version 2
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,  // 8   no backing name
    0x00, 0x00, 0x00, 0x00,                          // 16  its length
    0x00, 0x00, 0x00, 0x09,                          // 20  clusters of 2^9 bytes
    0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00,  // 24  disk of 64 KiB
    0x00, 0x00, 0x00, 0x00,                          // 32  not encrypted
    0x00, 0x00, 0x00, 0x03,                          // 36  3 L1 entries, 2 needed
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x06, 0x00,  // 40  L1 table in cluster 3
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x02, 0x00,  // 48  refcount table in cluster 1
    0x00, 0x00, 0x00, 0x01,                          // 56  of one cluster
    0x00, 0x00, 0x00, 0x00,                          // 60  no snapshots
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,  // 64  no snapshot table
};
static_assert(sizeof version_2_bytes == 72);

// Version 3, clusters of 16 KiB, with everything that can be in a header.
constexpr uint8_t version_3_bytes[] = {
    0x51, 0x46, 0x49, 0xfb,                          // 0   magic
    0x00, 0x00, 0x00, 0x03,                          // 4   version 3
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xb0,  // 8   backing name at 176
    0x00, 0x00, 0x00, 0x08,                          // 16  its length
    0x00, 0x00, 0x00, 0x0e,                          // 20  clusters of 2^14 bytes
    0x00, 0x00, 0x00, 0x00, 0x04, 0x00, 0x02, 0x00,  // 24  disk of 64 MiB + 512
    0x00, 0x00, 0x00, 0x02,                          // 32  LUKS
    0x00, 0x00, 0x00, 0x05,                          // 36  5 L1 entries (a span is 16 MiB)
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xc0, 0x00,  // 40  L1 table in cluster 3
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x40, 0x00,  // 48  refcount table in cluster 1
    0x00, 0x00, 0x00, 0x01,                          // 56  of one cluster
    0x00, 0x00, 0x00, 0x02,                          // 60  2 snapshots
    0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00,  // 64  snapshot table in cluster 4
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x18,  // 72  compression type, extended L2
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01,  // 80  lazy refcounts
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01,  // 88  bitmaps are consistent
    0x00, 0x00, 0x00, 0x06,                          // 96  refcounts of 2^6 bits
    0x00, 0x00, 0x00, 0x70,                          // 100 header of 112 bytes
    0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,  // 104 zstd, padding
    0x23, 0x85, 0x28, 0x75,                          // 112 bitmaps extension
    0x00, 0x00, 0x00, 0x18,                          // 116 of 24 bytes
    0x00, 0x00, 0x00, 0x02,                          // 120 2 bitmaps
    0x00, 0x00, 0x00, 0x00,                          // 124 reserved
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x40,  // 128 directory size
    0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x40, 0x00,  // 136 directory offset
    0x12, 0x34, 0x56, 0x78,                          // 144 an extension nobody knows
    0x00, 0x00, 0x00, 0x03,                          // 148 of 3 bytes
    'a',  'b',  'c',  0x00, 0x00, 0x00, 0x00, 0x00,  // 152 padded to 8
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,  // 160 end of extensions
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,  // 168 not an extension any more
    'b',  'a',  's',  'e',  '.',  'i',  'm',  'g',   // 176 backing name
};
static_assert(sizeof version_3_bytes == 184);

Bytes image_of(std::span<const uint8_t> header, size_t bytes) {
  Bytes image(bytes);
  std::memcpy(image.data(), header.data(), header.size());
  return image;
}
Bytes version_2_image() {
  return image_of(version_2_bytes, 4 * 512);
}
Bytes version_3_image() {
  return image_of(version_3_bytes, 5 * 16384);
}

Result<Header> read_header_of(const Bytes &image) {
  test::ScratchFolder folder;
  test::write_file(folder.path("image"), image);
  const auto file = test::open_file(folder.path("image"));
  return read_header(*file);
}

template <class T>
Bytes patched(Bytes image, uint64_t offset, T value) {
  store_be<T>(image.data() + offset, value);
  return image;
}

TEST(Header, ReadsVersion2) {
  const auto header = read_header_of(version_2_image());
  ASSERT_TRUE(header) << header.error().message;
  EXPECT_EQ(header->version, 2U);
  EXPECT_EQ(header->geometry.cluster_bits, 9U);
  EXPECT_EQ(header->geometry.refcount_order, 4U);
  EXPECT_FALSE(header->geometry.extended_l2);
  EXPECT_EQ(header->disk_bytes, 65536U);
  EXPECT_EQ(header->crypt_method, 0U);
  EXPECT_EQ(header->l1_entries, 3U);
  EXPECT_EQ(header->l1_offset, HostOffset(1536));
  EXPECT_EQ(header->refcount_table_offset, HostOffset(512));
  EXPECT_EQ(header->refcount_table_clusters, 1U);
  EXPECT_EQ(header->snapshot_count, 0U);
  EXPECT_EQ(header->header_bytes, 72U);
  EXPECT_EQ(header->incompatible_features, 0U);
  EXPECT_EQ(header->backing_name, "");
  EXPECT_TRUE(header->extensions.empty());
  EXPECT_EQ(header->persistent_bitmaps(), 0U);
}

TEST(Header, ReadsVersion3WithExtensionsAndBackingName) {
  const auto header = read_header_of(version_3_image());
  ASSERT_TRUE(header) << header.error().message;
  EXPECT_EQ(header->version, 3U);
  EXPECT_EQ(header->geometry.cluster_bits, 14U);
  EXPECT_EQ(header->geometry.refcount_order, 6U);
  EXPECT_TRUE(header->geometry.extended_l2);
  EXPECT_EQ(header->disk_bytes, 0x4000200U);
  EXPECT_EQ(header->crypt_method, 2U);
  EXPECT_EQ(header->l1_entries, 5U);
  EXPECT_EQ(header->l1_offset, HostOffset(0xc000));
  EXPECT_EQ(header->refcount_table_offset, HostOffset(0x4000));
  EXPECT_EQ(header->snapshot_count, 2U);
  EXPECT_EQ(header->snapshot_table_offset, HostOffset(0x10000));
  EXPECT_EQ(header->incompatible_features, 0x18U);
  EXPECT_EQ(header->compatible_features, 1U);
  EXPECT_EQ(header->autoclear_features, 1U);
  EXPECT_EQ(header->header_bytes, 112U);
  EXPECT_EQ(header->compression_type, 1U);
  EXPECT_EQ(header->backing_name, "base.img");
  ASSERT_EQ(header->extensions.size(), 2U);
  EXPECT_EQ(header->extensions[0].type, extension_bitmaps);
  EXPECT_EQ(header->extensions[0].data.size(), 24U);
  EXPECT_EQ(header->persistent_bitmaps(), 2U);
  const HeaderExtension *unknown = header->extension(0x12345678);
  ASSERT_NE(unknown, nullptr);
  EXPECT_EQ(unknown->data, (Bytes{std::byte{'a'}, std::byte{'b'}, std::byte{'c'}}));
  EXPECT_EQ(header->extension(extension_luks), nullptr);
}

TEST(Header, BitmapsCountOnlyWhileTheirAutoclearBitIsSet) {
  const auto header = read_header_of(patched<uint64_t>(version_3_image(), 88, 0));
  ASSERT_TRUE(header) << header.error().message;
  EXPECT_EQ(header->persistent_bitmaps(), 0U);
}

TEST(Header, ExtensionsMayEndExactlyWhereTheBackingNameStarts) {
  // The name starts where the end mark was.
  const auto header = read_header_of(patched<uint64_t>(version_3_image(), 8, 160));
  ASSERT_TRUE(header) << header.error().message;
  EXPECT_EQ(header->extensions.size(), 2U);
}

TEST(Header, ShortVersion3HeaderHasNoCompressionType) {
  Bytes image = version_2_image();
  store_be<uint32_t>(image.data() + 4, 3);      // version
  store_be<uint32_t>(image.data() + 96, 4);     // refcount order
  store_be<uint32_t>(image.data() + 100, 104);  // header length: extensions start at 104
  const auto header = read_header_of(image);
  ASSERT_TRUE(header) << header.error().message;
  EXPECT_EQ(header->compression_type, 0U);
}

TEST(Header, AnEmptyDiskNeedsNoL1Table) {
  Bytes image = version_2_image();
  store_be<uint64_t>(image.data() + 24, 0);  // disk size
  store_be<uint32_t>(image.data() + 36, 0);  // L1 entries
  store_be<uint64_t>(image.data() + 40, 0);  // L1 offset
  EXPECT_TRUE(read_header_of(image));
}

struct HostileCase {
  const char *name;
  uint64_t offset;
  unsigned bytes;  ///< 4 or 8
  uint64_t value;
  ErrorCode code;
  const char *message;
};

constexpr uint64_t top = uint64_t{1} << 63;
const HostileCase hostile_cases[] = {
    {"Magic", 0, 4, 0x514649fa, ErrorCode::bad_image, "is not a qcow2 image"},
    {"Version1", 4, 4, 1, ErrorCode::not_supported, "version 1"},
    {"Version4", 4, 4, 4, ErrorCode::not_supported, "version 4"},
    {"BackingNameOutside", 8, 8, 16385, ErrorCode::bad_image, "backing file name"},
    {"BackingNameFarOutside", 8, 8, UINT64_MAX, ErrorCode::bad_image, "backing file name"},
    {"BackingNameOverEnd", 8, 8, 16384 - 7, ErrorCode::bad_image, "backing file name"},
    {"BackingNameTooLong", 16, 4, 1024, ErrorCode::bad_image, "1024 bytes is too long"},
    {"BackingNameHuge", 16, 4, 0xffffffff, ErrorCode::bad_image, "too long"},
    {"BackingNameInsideExtension", 8, 8, 154, ErrorCode::bad_image, "extension"},
    {"BackingNameInsideExtensionHeader", 8, 8, 148, ErrorCode::bad_image, "extension"},
    {"ClusterBits8", 20, 4, 8, ErrorCode::bad_image, "2^8"},
    {"ClusterBits22", 20, 4, 22, ErrorCode::bad_image, "2^22"},
    {"ClusterBitsHuge", 20, 4, 0xffffffff, ErrorCode::bad_image, "2^4294967295"},
    {"ExtendedL2WithSmallClusters", 20, 4, 13, ErrorCode::bad_image, "extended L2"},
    {"DiskTooLarge", 24, 8, 5 * 16 * mib + 1, ErrorCode::bad_image, "5 entries, too few"},
    {"DiskHuge", 24, 8, UINT64_MAX, ErrorCode::bad_image, "too few"},
    {"Crypt3", 32, 4, 3, ErrorCode::not_supported, "encryption method 3"},
    {"L1TooSmall", 36, 4, 4, ErrorCode::bad_image, "too few"},
    {"L1TooLarge", 36, 4, 4194305, ErrorCode::bad_image, "33554440"},
    {"L1Huge", 36, 4, 0xffffffff, ErrorCode::bad_image, "L1 table"},
    {"L1PastEnd", 36, 4, 4097, ErrorCode::bad_image, "cut short"},
    {"L1Unaligned", 40, 8, 0xc200, ErrorCode::bad_image, "L1 table"},
    {"L1InHeader", 40, 8, 0, ErrorCode::bad_image, "lies in the header"},
    {"L1BehindFile", 40, 8, 0x14000, ErrorCode::bad_image, "cut short"},
    {"L1Past56Bits", 40, 8, uint64_t{1} << 56, ErrorCode::bad_image, "2^56"},
    {"L1Wraps", 40, 8, UINT64_MAX << 14, ErrorCode::bad_image, "2^56"},
    {"RefcountTableUnaligned", 48, 8, 0x4001, ErrorCode::bad_image, "refcount table"},
    {"RefcountTableInHeader", 48, 8, 0, ErrorCode::bad_image, "refcount table"},
    {"RefcountTableBehindFile", 48, 8, 0x14000, ErrorCode::bad_image, "cut short"},
    {"RefcountTableWraps", 48, 8, top, ErrorCode::bad_image, "2^56"},
    {"RefcountTableEmpty", 56, 4, 0, ErrorCode::bad_image, "no refcount table"},
    {"RefcountTableTooLarge", 56, 4, 513, ErrorCode::bad_image, "refcount table"},
    {"RefcountTableHuge", 56, 4, 0xffffffff, ErrorCode::bad_image, "refcount table"},
    {"SnapshotsTooMany", 60, 4, 65537, ErrorCode::bad_image, "65537 snapshots"},
    {"SnapshotsHuge", 60, 4, 0xffffffff, ErrorCode::bad_image, "snapshots"},
    {"SnapshotsPastEnd", 60, 4, 410, ErrorCode::bad_image, "snapshot table"},
    {"SnapshotTableUnaligned", 64, 8, 0x10008, ErrorCode::bad_image, "snapshot table"},
    {"SnapshotTableInHeader", 64, 8, 0, ErrorCode::bad_image, "snapshot table"},
    {"SnapshotTableWraps", 64, 8, UINT64_MAX << 14, ErrorCode::bad_image, "2^56"},
    {"UnknownIncompatible", 72, 8, 0x18 | 0x20 | top, ErrorCode::not_supported, "bits 5, 63"},
    {"CompressionBitWithoutType", 104, 4, 0, ErrorCode::bad_image, "compression"},
    {"CompressionTypeWithoutBit", 72, 8, 0x10, ErrorCode::bad_image, "compression"},
    {"CompressionType2", 104, 4, 0x02000000, ErrorCode::not_supported, "compression type 2"},
    {"RefcountOrder7", 96, 4, 7, ErrorCode::bad_image, "2^7"},
    {"RefcountOrderHuge", 96, 4, 0xffffffff, ErrorCode::bad_image, "refcounts"},
    {"HeaderShort", 100, 4, 103, ErrorCode::bad_image, "103 bytes"},
    {"HeaderLong", 100, 4, 16385, ErrorCode::bad_image, "16385 bytes"},
    {"ExtensionTooLong", 148, 4, 177 - 152, ErrorCode::bad_image, "offset 144 says 25 bytes"},
    {"ExtensionHuge", 148, 4, 0xffffffff, ErrorCode::bad_image, "extension"},
};

class HostileHeader : public testing::TestWithParam<HostileCase> {};

TEST_P(HostileHeader, IsRefused) {
  const HostileCase &hostile = GetParam();
  const Bytes image = hostile.bytes == 8
                          ? patched<uint64_t>(version_3_image(), hostile.offset, hostile.value)
                          : patched<uint32_t>(version_3_image(), hostile.offset,
                                              static_cast<uint32_t>(hostile.value));
  const auto header = read_header_of(image);
  ASSERT_FALSE(header);
  EXPECT_EQ(header.error().code, hostile.code) << header.error().message;
  EXPECT_THAT(header.error().message, HasSubstr(hostile.message));
  EXPECT_THAT(header.error().message, HasSubstr("/image: "));
}

INSTANTIATE_TEST_SUITE_P(Fields, HostileHeader, testing::ValuesIn(hostile_cases),
                         [](const auto &test) { return test.param.name; });

TEST(Header, FilesShorterThanAHeaderAreRefused) {
  for (const size_t bytes : {0, 1, 3, 4, 71, 72, 103, 512, 1535}) {
    Bytes image = version_2_image();
    image.resize(bytes);
    const auto header = read_header_of(image);
    ASSERT_FALSE(header) << bytes;
    EXPECT_EQ(header.error().code, ErrorCode::bad_image);
  }
  EXPECT_THAT(read_header_of(Bytes(0)).error().message, HasSubstr("is not a qcow2 image"));
  Bytes short_image = version_2_image();
  short_image.resize(71);
  EXPECT_THAT(read_header_of(short_image).error().message, HasSubstr("ends inside its header"));
  short_image = version_2_image();
  short_image.resize(3 * 512);
  EXPECT_THAT(read_header_of(short_image).error().message, HasSubstr("it was cut short"));
}

}  // namespace
}  // namespace qvmstate::qcow2
