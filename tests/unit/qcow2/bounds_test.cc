// What an image of 1 MiB can cost, whatever its tables say: the figures in limits.h. Each image
// here names the same few clusters over and over.
#include <gtest/gtest.h>

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>

#include "edit_helpers.h"
#include "qcow2/cluster_reader.h"
#include "qcow2/image_check.h"

namespace qvmstate::qcow2::test {
namespace {

constexpr uint64_t memory_bytes_max = 64 * mib;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool frees_memory = false;  // sanitizers keep what was freed for a while
#else
constexpr bool frees_memory = true;
#endif
constexpr double cpu_seconds_max = 10;

struct Cost {
  double cpu_seconds = 0;
  uint64_t memory_bytes = 0;
  bool ended = false;  ///< by itself
};

/// What `work` costs, in a process of its own.
Cost cost_of(const std::function<void()> &work) {
  const pid_t child = ::fork();
  if (child == 0) {
    const rlimit limit{3 * static_cast<rlim_t>(cpu_seconds_max), RLIM_INFINITY};
    ::setrlimit(RLIMIT_CPU, &limit);
    work();
    ::_exit(0);
  }
  int status = 0;
  rusage usage = {};
  if (child < 0 || ::wait4(child, &status, 0, &usage) != child) {
    throw std::runtime_error("cannot start a process");
  }
  const auto seconds = [](const timeval &time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) / 1e6;
  };
  return {seconds(usage.ru_utime) + seconds(usage.ru_stime),
          static_cast<uint64_t>(usage.ru_maxrss) * kib, WIFEXITED(status) && status == 0};
}

/// What a disk and the VM state behind it hold, up to what is refused.
void read_all(const Image &image, HostOffset l1, uint32_t l1_entries) {
  ClusterReader reader(image, l1, l1_entries);
  const uint64_t end = l1_entries * image.geometry().span_bytes();
  Bytes piece(1 * mib);
  for (GuestOffset at(0); at.value < end;) {
    const auto extent = reader.extent_at(at);
    if (!extent) {
      return;
    }
    uint64_t bytes = extent->bytes;
    if (extent->kind == ClusterKind::data || extent->kind == ClusterKind::compressed) {
      bytes = std::min<uint64_t>(bytes, piece.size());
      if (!reader.read(at, std::span(piece).first(bytes))) {
        return;
      }
    }
    at += bytes;
  }
}

/// Everything that is done with an image; each step may be refused.
void use(const Bytes &bytes) {
  const auto with_image = [&](const std::function<void(Image &)> &step) {
    auto backend = std::make_unique<io::MemoryBackend>(bytes, io::MemoryOptions());
    io::File file(std::move(backend), "disk.qcow2", 4);
    if (auto image = Image::open(file)) {
      step(*image);
    }
  };
  with_image([](Image &image) {
    Findings findings;
    (void)check_image(image, findings);
  });
  with_image([](Image &image) {
    read_all(image, image.header().l1_offset, image.header().l1_entries);
    if (!image.snapshots().empty()) {
      read_all(image, image.snapshots()[0].l1_offset, image.snapshots()[0].l1_entries);
    }
  });
  with_image([](Image &image) { (void)save(image, "fresh", seeded_bytes(100 * kib, 1)); });
  with_image([](Image &image) {
    if (!image.snapshots().empty()) {
      (void)remove(image, image.snapshots()[0].name, true);
    }
  });
  with_image([](Image &image) { (void)recover_set({&image}); });
}

/// 1 MiB: header, one refcount block with counts that never run out, an L1 table, an L2 table.
class HostileImage {
 public:
  explicit HostileImage(uint32_t cluster_bits = 16) : cluster_(uint64_t{1} << cluster_bits) {
    put32(0, 0x514649fb);  // magic
    put32(4, 3);           // version
    put32(20, cluster_bits);
    put32(96, 6);         // refcounts of 64 bits
    put32(100, 104);      // header length
    put64(48, cluster_);  // refcount table
    put32(56, 1);         // its clusters
    put64(cluster_, 2 * cluster_);
    for (uint64_t i = 0; i < bytes.size() / cluster_; ++i) {
      put64(2 * cluster_ + i * 8, uint64_t{1} << 40);
    }
  }
  void put32(uint64_t at, uint32_t value) { store_be(&bytes.at(at), value); }
  void put64(uint64_t at, uint64_t value) { store_be(&bytes.at(at), value); }
  uint64_t at(uint64_t cluster) const { return cluster * cluster_; }

  /// Clusters 3 to 10: an L1 table that names the L2 table in cluster 11 everywhere, which names
  /// cluster 12 everywhere.
  void put_one_table_for_all() {
    constexpr uint64_t copied = uint64_t{1} << 63;
    put32(36, l1_entries);
    put64(40, at(3));
    put64(24, l1_entries * (cluster_ / 8 * cluster_));  // disk size
    for (uint64_t i = 0; i < l1_entries; ++i) {
      put64(at(3) + i * 8, copied | at(11));
    }
    for (uint64_t i = 0; i < cluster_ / 8; ++i) {
      put64(at(11) + i * 8, copied | at(12));
    }
  }
  /// In clusters 13 to 15: as many snapshots as fit, all with the same L1 table.
  void put_snapshots() {
    std::vector<Snapshot> snapshots(3 * cluster_ / 72);
    for (size_t i = 0; i < snapshots.size(); ++i) {
      snapshots[i].id = "0";
      snapshots[i].name = std::to_string(i + 1);
      snapshots[i].l1_offset = HostOffset(at(3));
      snapshots[i].l1_entries = l1_entries;
    }
    const Bytes table = format_snapshot_table(snapshots).value();
    std::copy(table.begin(), table.end(), bytes.begin() + static_cast<ptrdiff_t>(at(13)));
    put32(60, static_cast<uint32_t>(snapshots.size()));
    put64(64, at(13));
  }

  static constexpr uint32_t l1_entries = 65536;
  Bytes bytes = Bytes(1 * mib);

 private:
  const uint64_t cluster_;
};

HostileImage one_table_for_all() {
  HostileImage image;
  image.put_one_table_for_all();
  return image;
}

HostileImage snapshots_of_one_table() {
  HostileImage image = one_table_for_all();
  image.put_snapshots();
  return image;
}

/// Nothing in the active disk, so that deleting gets to the snapshot.
HostileImage one_snapshot_of_one_table() {
  HostileImage image = snapshots_of_one_table();
  image.put32(60, 1);
  image.put32(36, 0);
  image.put64(24, 0);
  return image;
}

HostileImage one_refcount_block_for_all() {
  HostileImage image(18);  // four clusters
  image.put32(96, 1);      // refcounts of 2 bits
  for (uint64_t i = 0; i < image.at(1) / 8; ++i) {
    image.put64(image.at(1) + i * 8, image.at(2));
  }
  std::fill_n(image.bytes.begin() + static_cast<ptrdiff_t>(image.at(2)), image.at(1),
              std::byte{0x55});
  return image;
}

HostileImage bitmaps_of_one_table() {
  HostileImage image = one_table_for_all();
  constexpr uint32_t count = 8192;
  image.put64(88, 1);            // autoclear: bitmaps
  image.put32(104, 0x23852875);  // extension
  image.put32(108, 24);          // its length
  image.put32(112, count);       // bitmaps
  image.put64(120, count * 24);  // bytes of the directory
  image.put64(128, image.at(13));
  for (uint64_t i = 0; i < count; ++i) {
    image.put64(image.at(13) + i * 24, image.at(3));                   // table
    image.put32(image.at(13) + i * 24 + 8, HostileImage::l1_entries);  // its entries
  }
  return image;
}

HostileImage sizes_without_bound() {
  HostileImage image;
  image.put32(36, UINT32_MAX);  // L1 entries
  image.put32(56, UINT32_MAX);  // refcount table clusters
  image.put32(60, 65536);       // snapshots
  image.put64(64, image.at(13));
  return image;
}

HostileImage more_snapshots_than_fit() {
  HostileImage image;
  image.put32(60, 65536);
  image.put64(64, image.at(3));
  return image;
}

struct HostileCase {
  const char *name;
  HostileImage (*make)();
};

class Bounds : public testing::TestWithParam<HostileCase> {};

TEST_P(Bounds, AnImageOfOneMebibyteCostsLittle) {
  const HostileImage image = GetParam().make();
  const Cost nothing = cost_of([] {});
  const Cost cost = cost_of([&] { use(image.bytes); });
  EXPECT_TRUE(cost.ended);
  EXPECT_LT(cost.cpu_seconds, cpu_seconds_max);
  if (frees_memory) {
    EXPECT_LT(cost.memory_bytes, nothing.memory_bytes + memory_bytes_max);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Images, Bounds,
    testing::Values(HostileCase{"OneTableForAll", one_table_for_all},
                    HostileCase{"SnapshotsOfOneTable", snapshots_of_one_table},
                    HostileCase{"OneSnapshotOfOneTable", one_snapshot_of_one_table},
                    HostileCase{"OneRefcountBlockForAll", one_refcount_block_for_all},
                    HostileCase{"BitmapsOfOneTable", bitmaps_of_one_table},
                    HostileCase{"SizesWithoutBound", sizes_without_bound},
                    HostileCase{"MoreSnapshotsThanFit", more_snapshots_than_fit}),
    [](const auto &info) { return info.param.name; });

}  // namespace
}  // namespace qvmstate::qcow2::test
