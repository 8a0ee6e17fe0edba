// A vmstate in compressed clusters, and one put into the place of another: read back by our reader
// and judged by qemu-img.
#include "qcow2/compressed_area.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "edit_helpers.h"
#include "qcow2/compression.h"
#include "qcow2/image_edit.h"
#include "qcow2/suitability.h"
#include "test_images.h"

namespace qvmstate::qcow2::test {
namespace {

TEST(Compression, ExpandsWhatItCompressed) {
  for (const uint8_t type : {compression_deflate, compression_zstd}) {
    auto compressor = ClusterCompressor::create(type);
    ASSERT_TRUE(compressor);
    for (const size_t cluster_bytes : {size_t{512}, size_t{65536}, size_t{2 * mib}}) {
      for (const uint32_t seed : {1U, 2U}) {
        const Bytes cluster = compressible_bytes(cluster_bytes, seed);
        Bytes stored(cluster_bytes - 1);
        const size_t bytes = (*compressor)->compress(cluster, stored);
        ASSERT_GT(bytes, 0U);
        Bytes expanded(cluster_bytes);
        // What follows in the last sector is of others.
        EXPECT_TRUE(expand_cluster(type, stored, expanded));
        EXPECT_TRUE(expanded == cluster);
        stored.resize(bytes / 2);
        EXPECT_FALSE(expand_cluster(type, stored, expanded));
      }
      Bytes noise = seeded_bytes(cluster_bytes, 7);
      Bytes stored(cluster_bytes - 1);
      if (cluster_bytes == 512) {
        EXPECT_EQ((*compressor)->compress(noise, stored), 0U);
      }
    }
  }
}

/// Every third cluster zeros, every third compressible, every third not.
Bytes mixed_stream(uint64_t cluster_bytes, size_t clusters) {
  Bytes stream = seeded_bytes(cluster_bytes * clusters, 3);
  const Bytes compressible = compressible_bytes(cluster_bytes, 5);
  for (size_t i = 0; i < clusters; ++i) {
    if (i % 3 == 0) {
      std::memset(&stream[i * cluster_bytes], 0, cluster_bytes);
    } else if (i % 3 == 1) {
      std::memcpy(&stream[i * cluster_bytes], compressible.data(), cluster_bytes);
      stream[i * cluster_bytes] = static_cast<std::byte>(i);
    }
  }
  stream.resize(stream.size() - cluster_bytes / 3);
  return stream;
}

Result<void> put_compressed(Image &image, const Bytes &stream, CompressedArea &area) {
  const uint64_t cluster_bytes = image.geometry().cluster_bytes();
  QV_ASSIGN(const auto compressor, ClusterCompressor::create(image.header().compression_type));
  Bytes padded = stream;
  padded.resize(round_up(stream.size(), cluster_bytes));
  Bytes stored(cluster_bytes - 1);
  for (uint64_t at = 0; at < padded.size(); at += cluster_bytes) {
    const auto cluster = std::span(padded).subspan(at, cluster_bytes);
    const bool zeros = std::ranges::all_of(cluster, [](std::byte b) { return b == std::byte{0}; });
    const size_t bytes = compressor->compress(cluster, stored);
    if (zeros && image.header().version >= 3) {
      QV_TRY(area.add_zeros());
    } else if (bytes == 0) {
      QV_TRY(area.add_plain(cluster));
    } else {
      QV_TRY(area.add_compressed(std::span(stored).first(bytes)));
    }
  }
  return area.finish();
}

class Replaced : public testing::TestWithParam<const char *> {};

TEST_P(Replaced, StateChangesAndNothingElse) {
  if (!have_qemu_img()) {
    GTEST_SKIP() << "qemu-img is missing";
  }
  const ScratchFolder folder;
  const std::string path = folder.path("image");
  if (qemu_img({"create", "-q", "-f", "qcow2", "-o", GetParam(), path, "4M"}).status != 0) {
    GTEST_SKIP() << "this qemu-img cannot make such an image";
  }
  // Counts of 2 bits have no room for the disk in three snapshots.
  if (std::string(GetParam()).find("refcount_bits=2") == std::string::npos) {
    ASSERT_EQ(qemu_io(path, {"write -q -P 1 0 1M"}).status, 0);
  }
  const auto file = open_writable(path);
  auto image = Image::open(*file);
  ASSERT_TRUE(image);
  const uint64_t cluster_bytes = image->geometry().cluster_bytes();
  const Bytes first = mixed_stream(cluster_bytes, cluster_bytes > mib ? 7 : 40);
  ASSERT_TRUE(save(*image, "before", seeded_bytes(3000, 1)));
  ASSERT_TRUE(save(*image, "it", first));
  ASSERT_TRUE(save(*image, "after", seeded_bytes(5000, 2)));
  auto seen = view(*image);
  ASSERT_TRUE(seen);
  ImageView expected = std::move(*seen);

  // Compressed, and then as before, several times, so that clusters are used again.
  for (const bool compress : {true, false, true, true}) {
    {
      auto edit = ImageEdit::begin(*image);
      ASSERT_TRUE(edit) << edit.error().message;
      ASSERT_TRUE((*edit)->replace_vmstate(1));
      const auto put = compress ? put_compressed(*image, first, (*edit)->compressed_vmstate())
                                : write_stream(*file, (*edit)->vmstate(), first);
      ASSERT_TRUE(put) << put.error().message;
      (*edit)->set_added_extra({std::byte{'x'}});
      const auto committed = (*edit)->commit(first.size());
      ASSERT_TRUE(committed) << committed.error().message;
      (*edit)->give_back_space();
    }
    expected.snapshots.at("it").more_extra = {std::byte{'x'}};
    const auto now = view(*image);
    ASSERT_TRUE(now) << now.error().message;
    EXPECT_TRUE(*now == expected);
    EXPECT_EQ(image->snapshots()[1].name, "it");
    EXPECT_EQ(check_complaint(path), "");
  }
  // QEMU goes on with it: applies it, deletes it.
  ASSERT_TRUE(file->sync());
  EXPECT_EQ(qemu_img({"snapshot", "-a", "it", path}).status, 0);
  EXPECT_EQ(check_complaint(path), "");
  EXPECT_EQ(qemu_img({"snapshot", "-d", "it", path}).status, 0);
  EXPECT_EQ(check_complaint(path), "");
}

TEST_P(Replaced, AnAbortedEditLeavesWhatWasThere) {
  if (!have_qemu_img()) {
    GTEST_SKIP() << "qemu-img is missing";
  }
  const ScratchFolder folder;
  const std::string path = folder.path("image");
  if (qemu_img({"create", "-q", "-f", "qcow2", "-o", GetParam(), path, "1M"}).status != 0) {
    GTEST_SKIP() << "this qemu-img cannot make such an image";
  }
  const auto file = open_writable(path);
  auto image = Image::open(*file);
  ASSERT_TRUE(image);
  const Bytes stream = mixed_stream(image->geometry().cluster_bytes(), 9);
  ASSERT_TRUE(save(*image, "it", stream));
  const auto before = view(*image);
  ASSERT_TRUE(before);
  const size_t file_bytes = read_file(path).size();
  {
    auto edit = ImageEdit::begin(*image);
    ASSERT_TRUE(edit);
    ASSERT_TRUE((*edit)->replace_vmstate(0));
    ASSERT_TRUE(put_compressed(*image, stream, (*edit)->compressed_vmstate()));
  }
  ASSERT_TRUE(image->reload());
  const auto after = view(*image);
  ASSERT_TRUE(after);
  EXPECT_TRUE(*after == *before);
  EXPECT_EQ(read_file(path).size(), file_bytes);
  EXPECT_EQ(check_complaint(path), "");
}

INSTANTIATE_TEST_SUITE_P(Images, Replaced,
                         testing::Values("compat=0.10,cluster_size=4k", "cluster_size=512",
                                         "cluster_size=64k", "cluster_size=2M",
                                         "cluster_size=4k,refcount_bits=2",
                                         "cluster_size=4k,refcount_bits=8",
                                         "compression_type=zstd,cluster_size=64k",
                                         "extended_l2=on,cluster_size=16k",
                                         "extended_l2=on,cluster_size=2M,compression_type=zstd"));

}  // namespace
}  // namespace qvmstate::qcow2::test
