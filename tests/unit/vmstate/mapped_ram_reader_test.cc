// Reading RAM in parallel: from memory with faults, from files with holes, from qcow2 images.

#include "vmstate/mapped_ram_reader.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include "mapped_fixture.h"
#include "qcow2/io/endian.h"
#include "qcow2/io/memory_backend.h"
#include "vmstate/file_source.h"
#include "vmstate/snapshot_source.h"

namespace qvmstate::vmstate::test {
namespace {

/// Puts chunks together and checks that each page comes once.
class Collector {
 public:
  explicit Collector(const StreamSummary &summary) : page_bytes_(summary.page_bytes) {
    for (const StreamBlock &block : summary.blocks) {
      // What is not delivered differs from everything.
      memory_.emplace_back(block.used_bytes, std::byte{0xee});
      seen_.emplace_back(block.used_bytes / page_bytes_);
    }
  }
  ChunkHook hook() {
    return [this](size_t channel, size_t block, uint64_t offset, std::span<const std::byte> data,
                  uint64_t bytes) -> Result<void> {
      EXPECT_LT(channel, 64U);
      EXPECT_TRUE(data.empty() || data.size() == bytes);
      EXPECT_LE(data.size(), mapped_chunk_bytes);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(data.data()) % page_bytes_, 0U);
      EXPECT_GE(std::pair(block, offset), next_[channel]);
      next_[channel] = {block, offset + bytes};
      EXPECT_TRUE(bytes > 0 && (offset | bytes) % page_bytes_ == 0);
      for (uint64_t at = offset; at < offset + bytes; at += page_bytes_) {
        seen_[block].at(at / page_bytes_) += 1;
      }
      if (data.empty()) {
        std::memset(&memory_[block][offset], 0, bytes);
        zeros += bytes;
        zero_runs += 1;
      } else {
        std::memcpy(&memory_[block][offset], data.data(), bytes);
      }
      return {};
    };
  }
  const Blob &memory(size_t block) const { return memory_[block]; }
  bool all_seen_once(size_t block) const {
    return std::ranges::all_of(seen_[block], [](uint8_t count) { return count == 1; });
  }
  std::atomic<uint64_t> zeros = 0;
  std::atomic<uint64_t> zero_runs = 0;

 private:
  uint64_t page_bytes_;
  std::vector<std::pair<size_t, uint64_t>> next_ =
      std::vector<std::pair<size_t, uint64_t>>(64);  ///< by channel: nothing before comes again
  std::vector<Blob> memory_;
  std::vector<std::vector<uint8_t>> seen_;
};

StreamSummary summary_of(StreamSource &source, uint64_t start = 0) {
  auto summary = read_stream(source, {}, StreamOffset(start));
  EXPECT_TRUE(summary) << summary.error().message;
  return summary ? std::move(*summary) : StreamSummary{};
}

void expect_collected(const MappedStream &stream, const StreamSummary &summary,
                      const SourceOpener &open_source, unsigned channels) {
  Collector collector(summary);
  const auto done = read_mapped_ram(summary, open_source, collector.hook(), {.channels = channels});
  ASSERT_TRUE(done) << done.error().message;
  for (size_t i = 0; i < stream.blocks.size(); ++i) {
    EXPECT_TRUE(collector.all_seen_once(i));
    EXPECT_TRUE(collector.memory(i) == stream.expected(i)) << stream.blocks[i].idstr;
  }
}

MappedStream some_stream() {
  return {.blocks = {{"a", page_fills(1100, 3)}, {"b", page_fills(1)}, {"c", page_fills(400, 300)}},
          .start = 4096};
}

SourceOpener in_memory(const Blob &file, io::MemoryOptions options = {}) {
  return [&file, options, seed = uint64_t{0}]() mutable -> Result<std::unique_ptr<StreamSource>> {
    options.seed = ++seed;
    return FileSource::create(std::make_unique<io::File>(
        std::make_unique<io::MemoryBackend>(file, options), "memory", 4));
  };
}

TEST(MappedRamReader, channels) {
  MappedStream stream = some_stream();
  const Blob file = stream.build();
  BlobSource source(file);
  const StreamSummary summary = summary_of(source, stream.start);
  const SourceOpener synchronous = [&]() -> Result<std::unique_ptr<StreamSource>> {
    return std::make_unique<BlobSource>(file);
  };
  for (const unsigned channels : {1U, 3U, 64U}) {
    SCOPED_TRACE(channels);
    expect_collected(stream, summary, synchronous, channels);
    expect_collected(stream, summary, in_memory(file), channels);
    expect_collected(stream, summary,
                     in_memory(file, {.direct_alignment = 512,
                                      .short_percent = 20,
                                      .interrupted_percent = 5,
                                      .again_percent = 5,
                                      .out_of_order = true,
                                      .faults = {}}),
                     channels);
  }
  for (const unsigned channels : {0U, 65U, ~0U}) {
    const auto refused =
        read_mapped_ram(summary, synchronous, Collector(summary).hook(), {.channels = channels});
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, ErrorCode::bad_argument);
  }
}

TEST(MappedRamReader, one_block_only) {
  MappedStream stream = some_stream();
  const Blob file = stream.build();
  BlobSource source(file);
  const StreamSummary summary = summary_of(source, stream.start);
  Collector collector(summary);
  ASSERT_TRUE(
      read_mapped_ram(summary, in_memory(file), collector.hook(), {.channels = 2, .blocks = {2}}));
  EXPECT_TRUE(collector.memory(2) == stream.expected(2));
  EXPECT_TRUE(collector.all_seen_once(2));
  EXPECT_EQ(collector.memory(0)[0], std::byte{0xee});
  // 400 pages, of which the first and the 300th have data.
  EXPECT_EQ(collector.zeros, 398U * 4096);
  EXPECT_EQ(collector.zero_runs, 2U);
}

TEST(MappedRamReader, the_first_error_stops_all) {
  MappedStream stream = some_stream();
  const Blob file = stream.build();
  BlobSource source(file);
  const StreamSummary summary = summary_of(source, stream.start);
  for (const unsigned channels : {1U, 4U}) {
    for (const uint64_t nth : {0, 1, 5}) {
      const auto failed = read_mapped_ram(
          summary, in_memory(file, {.faults = {{io::FileOperation::read, nth, -EIO}}}),
          Collector(summary).hook(), {.channels = channels});
      ASSERT_FALSE(failed) << nth;
      EXPECT_EQ(failed.error().sys_errno, EIO);
      EXPECT_NE(failed.error().message.find("memory: cannot read"), std::string::npos);
    }
    std::atomic<int> calls = 0;
    const auto refused =
        read_mapped_ram(summary, in_memory(file),
                        [&](size_t, size_t, uint64_t, auto, uint64_t) -> Result<void> {
                          if (++calls >= 3) {
                            return fail(ErrorCode::no_space, "full");
                          }
                          return {};
                        },
                        {.channels = channels});
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, ErrorCode::no_space);
    EXPECT_LE(calls, 3 + static_cast<int>(channels));
  }
  const auto unopened = read_mapped_ram(
      summary,
      []() -> Result<std::unique_ptr<StreamSource>> { return fail(ErrorCode::not_found, "gone"); },
      Collector(summary).hook(), {});
  ASSERT_FALSE(unopened);
  EXPECT_EQ(unopened.error().code, ErrorCode::not_found);
}

TEST(MappedRamReader, cancel) {
  MappedStream stream = some_stream();
  const Blob file = stream.build();
  BlobSource source(file);
  const StreamSummary summary = summary_of(source, stream.start);
  std::atomic<bool> cancelled = false;
  std::atomic<int> calls = 0;
  const auto done = read_mapped_ram(summary, in_memory(file),
                                    [&](size_t, size_t, uint64_t, auto, uint64_t) -> Result<void> {
                                      cancelled = true;
                                      ++calls;
                                      return {};
                                    },
                                    {.channels = 3, .cancelled = &cancelled});
  ASSERT_FALSE(done);
  EXPECT_EQ(done.error().code, ErrorCode::cancelled);
  EXPECT_LE(calls, 3);
}

/// A file in a folder of its own, which goes away.
class TestFile {
 public:
  TestFile() {
    char folder[] = "/tmp/qvmstate-mapped-XXXXXX";
    folder_ = mkdtemp(folder);
  }
  ~TestFile() { std::filesystem::remove_all(folder_); }
  TestFile(const TestFile &) = delete;
  TestFile &operator=(const TestFile &) = delete;
  std::string path() const { return folder_ + "/file"; }
  /// Whole pages of zeros become holes.
  void write(const Blob &bytes) const {
    const int descriptor = open(path().c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    ASSERT_GE(descriptor, 0);
    for (size_t at = 0; at < bytes.size(); at += 4096) {
      const size_t piece = std::min<size_t>(4096, bytes.size() - at);
      if (std::any_of(&bytes[at], &bytes[at] + piece,
                      [](std::byte b) { return b != std::byte{}; })) {
        ASSERT_EQ(pwrite(descriptor, &bytes[at], piece, static_cast<off_t>(at)),
                  static_cast<ssize_t>(piece));
      }
    }
    ASSERT_EQ(ftruncate(descriptor, static_cast<off_t>(bytes.size())), 0);
    close(descriptor);
  }

 private:
  std::string folder_;
};

// Zeros that a file system does not store come as long runs, as do clear bits, over several
// portions.
TEST(MappedRamReader, holes_of_a_file) {
  std::vector<uint8_t> fill(18000);  // 70 MiB
  for (size_t i = 0; i < fill.size(); i += 1500) {
    fill[i] = 9;
  }
  MappedStream stream{.blocks = {{"a", fill}}, .all_bits = true};
  TestFile file;
  file.write(stream.build());
  for (const io::Engine engine : {io::Engine::automatic, io::Engine::threads}) {
    for (const io::DirectMode direct : {io::DirectMode::automatic, io::DirectMode::off}) {
      io::OpenOptions options;
      options.direct = direct;
      options.engine = engine;
      auto opened = io::File::open(file.path(), options);
      ASSERT_TRUE(opened) << opened.error().message;
      auto source = FileSource::create(std::move(*opened));
      ASSERT_TRUE(source);
      const StreamSummary summary = summary_of(**source);
      EXPECT_LE(summary.data_pages, 12U * 16);  // the file system's blocks may be larger
      std::filesystem::rename(file.path(), file.path() + ".moved");
      for (const unsigned channels : {1U, 3U}) {
        Collector collector(summary);
        const auto done =
            read_mapped_ram(summary,
                            [&]() -> Result<std::unique_ptr<StreamSource>> {
                              QV_ASSIGN(auto again, reopen_file(*(*source)->file(), options));
                              return FileSource::create(std::move(again));
                            },
                            collector.hook(), {.channels = channels});
        ASSERT_TRUE(done) << done.error().message;
        EXPECT_TRUE(collector.memory(0) == stream.expected(0));
        EXPECT_TRUE(collector.all_seen_once(0));
        EXPECT_LE(collector.zero_runs, 12U + 3);
      }
      std::filesystem::rename(file.path() + ".moved", file.path());
    }
  }
}

/// An image with one snapshot whose vmstate is `state`, made by hand: clusters of zeros have the
/// zero flag, the others lie in the file in reverse order.
Blob image_with(const Blob &state, uint32_t cluster_bits) {
  const uint64_t cluster = uint64_t{1} << cluster_bits;
  const uint64_t per_table = cluster / 8;
  const uint64_t clusters = divide_up(state.size(), cluster);
  const uint64_t tables = divide_up(clusters, per_table);
  const uint64_t disk_spans = 1;
  const uint64_t l1_entries = disk_spans + tables;
  const uint64_t l1_clusters = divide_up(l1_entries * 8, cluster);
  // Header, refcount table (empty), active L1, snapshot table, L1, L2 tables, data.
  const uint64_t l1_at = 4 * cluster;
  const uint64_t l2_at = l1_at + l1_clusters * cluster;
  const uint64_t data_at = l2_at + tables * cluster;
  Blob image(data_at);
  std::memcpy(image.data(), "QFI\xfb", 4);
  store_be<uint32_t>(&image[4], 3);
  store_be<uint32_t>(&image[20], cluster_bits);
  store_be<uint64_t>(&image[24], per_table * cluster);  // one span
  store_be<uint32_t>(&image[36], 1);
  store_be<uint64_t>(&image[40], 2 * cluster);
  store_be<uint64_t>(&image[48], cluster);
  store_be<uint32_t>(&image[56], 1);
  store_be<uint32_t>(&image[60], 1);
  store_be<uint64_t>(&image[64], 3 * cluster);
  store_be<uint32_t>(&image[96], 4);
  store_be<uint32_t>(&image[100], 104);
  const Blob entry = Bytes()
                         .u64(l1_at)
                         .u32(static_cast<uint32_t>(l1_entries))
                         .u16(1)
                         .u16(4)
                         .u32(0)
                         .u32(0)
                         .u64(0)
                         .u32(0)
                         .u32(24)
                         .u64(1)  // what QEMU says is less than what there is
                         .u64(per_table * cluster)
                         .u64(~uint64_t{0})
                         .text("1snap")
                         .done();
  std::copy(entry.begin(), entry.end(), &image[3 * cluster]);
  for (uint64_t i = 0; i < tables; ++i) {
    store_be<uint64_t>(&image[l1_at + (disk_spans + i) * 8], l2_at + i * cluster);
  }
  for (uint64_t i = clusters; i-- > 0;) {
    Blob data(cluster);
    std::copy(state.begin() + static_cast<std::ptrdiff_t>(i * cluster),
              state.begin() +
                  static_cast<std::ptrdiff_t>(std::min<uint64_t>((i + 1) * cluster, state.size())),
              data.begin());
    uint64_t l2_entry = 1;
    if (data != Blob(cluster)) {
      l2_entry = image.size();
      image.insert(image.end(), data.begin(), data.end());
    }
    store_be<uint64_t>(&image[l2_at + i * 8], l2_entry);
  }
  return image;
}

TEST(MappedRamReader, snapshots_of_images) {
  for (const bool all_bits : {false, true}) {
    for (const uint32_t cluster_bits : {9U, 12U, 16U}) {
      SCOPED_TRACE(cluster_bits);
      MappedStream stream = some_stream();
      stream.start = 0;
      stream.all_bits = all_bits;
      TestFile file;
      Blob bytes = image_with(stream.build(), cluster_bits);
      if (cluster_bits > 9) {
        bytes.resize(bytes.size() -
                     100);  // the last cluster ends in zeros past the end of the file
      }
      file.write(bytes);
      io::OpenOptions options;
      auto opened = io::File::open(file.path(), options);
      ASSERT_TRUE(opened) << opened.error().message;
      const auto image = qcow2::Image::open(**opened);
      ASSERT_TRUE(image) << image.error().message;
      const qcow2::Snapshot &snapshot = image->snapshots().at(0);
      const auto source = SnapshotSource::create(*image, snapshot);
      ASSERT_TRUE(source);
      const StreamSummary summary = summary_of(**source);
      EXPECT_EQ(summary.layout, Layout::mapped_ram);
      if (cluster_bits <= 12) {
        EXPECT_EQ(summary.data_pages, 367U + 1 + 2);  // zero clusters are not data
      }
      for (const unsigned channels : {1U, 4U}) {
        expect_collected(
            stream, summary, [&] { return SnapshotSource::reopen(*image, snapshot, options); },
            channels);
      }
      // Replaced meanwhile.
      qcow2::Snapshot other = snapshot;
      other.l1_offset += 1;
      const auto gone = SnapshotSource::reopen(*image, other, options);
      ASSERT_FALSE(gone);
      EXPECT_EQ(gone.error().code, ErrorCode::not_found);
    }
  }
}

}  // namespace
}  // namespace qvmstate::vmstate::test
