#include "plugin/qemu/dirty_tracker.h"

#include <fcntl.h>
#include <sys/ioctl.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <mutex>

#include "qcow2/io/offsets.h"

namespace qvmstate::qemu {
namespace {

constexpr uint64_t page_bytes = 4096;
constexpr size_t regions_at_once = 1024;

// Not in the headers of Linux before 6.7 (include/uapi/linux/userfaultfd.h and fs.h).
constexpr uint64_t feature_wp_async = uint64_t{1} << 15;

enum PageCategory : uint64_t {
  page_written = 1 << 1,  ///< not protected
  page_present = 1 << 3,
  page_swapped = 1 << 4,
};

enum ScanFlag : uint64_t {
  scan_protect_matching = 1 << 0,
  scan_check_async = 1 << 1,  ///< EPERM for memory that is not tracked
};

struct PageRegion {
  uint64_t begin = 0;
  uint64_t end = 0;
  uint64_t categories = 0;
};

struct ScanArguments {
  uint64_t size = sizeof(ScanArguments);
  uint64_t flags = 0;
  uint64_t begin = 0;
  uint64_t end = 0;
  uint64_t walk_end = 0;  ///< set: how far it came
  uint64_t regions = 0;   ///< PageRegion[]
  uint64_t regions_max = 0;
  uint64_t pages_max = 0;
  uint64_t inverted = 0;  ///< categories of which having them counts as not having them
  uint64_t all_of = 0;
  uint64_t any_of = 0;
  uint64_t told = 0;  ///< of the categories; regions differ in these
};
static_assert(sizeof(ScanArguments) == 96);

constexpr unsigned long pagemap_scan = _IOWR('f', 16, ScanArguments);

/// The pages of a piece that are there and are as `arguments` say besides. 0 or an errno.
int scan(int pagemap, const MemoryRange &piece, ScanArguments arguments,
         std::vector<PageRegion> &found) {
  std::vector<PageRegion> regions(regions_at_once);
  arguments.end = piece.address + piece.bytes;
  arguments.regions = reinterpret_cast<uint64_t>(regions.data());
  arguments.regions_max = regions.size();
  arguments.any_of = page_present | page_swapped;
  for (uint64_t at = piece.address; at < arguments.end; at = arguments.walk_end) {
    arguments.begin = at;
    const int count = ::ioctl(pagemap, pagemap_scan, &arguments);
    if (count < 0) {
      return errno;
    }
    found.insert(found.end(), regions.begin(), regions.begin() + count);
  }
  return 0;
}

/// Pages that had no protection; they have it from now on.
int protect_written(int pagemap, const MemoryRange &piece, std::vector<PageRegion> &found) {
  return scan(pagemap, piece,
              {.flags = scan_protect_matching | scan_check_async, .all_of = page_written}, found);
}

/// Pages that have it.
int find_protected(int pagemap, const MemoryRange &piece, std::vector<PageRegion> &found) {
  return scan(pagemap, piece,
              {.flags = scan_check_async, .inverted = page_written, .all_of = page_written}, found);
}

void set_bits(std::vector<uint64_t> &words, uint64_t begin, uint64_t end, bool value) {
  while (begin < end) {
    const uint64_t shift = begin % 64;
    const uint64_t count = std::min(64 - shift, end - begin);
    const uint64_t bits = (~uint64_t{0} >> (64 - count)) << shift;
    uint64_t &word = words[begin / 64];
    word = value ? word | bits : word & ~bits;
    begin += count;
  }
}

}  // namespace

Result<DirtyTracker> DirtyTracker::begin(std::vector<MemoryRange> ranges) {
  QV_ASSIGN(Descriptor userfaultfd, open_userfaultfd(feature_wp_async, "6.7"));
  Descriptor pagemap(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  if (!pagemap) {
    return fail_errno(errno, "opening '/proc/self/pagemap'");
  }
  QV_TRY(register_ranges(userfaultfd.get(), ranges));
  return DirtyTracker(std::move(userfaultfd), std::move(pagemap), std::move(ranges));
}

Result<std::vector<std::vector<uint64_t>>> DirtyTracker::next_changed() {
  std::vector<std::vector<uint64_t>> changed;
  changed.reserve(ranges_.size());
  for (const MemoryRange &range : ranges_) {
    changed.emplace_back(divide_up(range.bytes / page_bytes, 64), ~uint64_t{0});
  }
  std::mutex mutex;  // for `changed`
  const int error = for_pieces(ranges_, [&](const MemoryRange &piece) {
    // In this order a page that is written between the two is found by neither, and is changed.
    std::vector<PageRegion> written;
    std::vector<PageRegion> kept;
    if (const int failed = protect_written(pagemap_.get(), piece, written); failed != 0) {
      return failed;
    }
    if (const int failed = find_protected(pagemap_.get(), piece, kept); failed != 0) {
      return failed;
    }
    const auto range = std::ranges::find_if(ranges_, [&](const MemoryRange &whole) {
      return piece.address >= whole.address && piece.address < whole.address + whole.bytes;
    });
    assert(range != ranges_.end());
    const auto mark = [&](const std::vector<PageRegion> &regions, bool value) {
      for (const PageRegion &region : regions) {
        set_bits(changed[static_cast<size_t>(range - ranges_.begin())],
                 (region.begin - range->address) / page_bytes,
                 (region.end - range->address) / page_bytes, value);
      }
    };
    const std::lock_guard lock(mutex);
    mark(kept, false);
    mark(written, true);
    return 0;
  });
  if (error != 0) {
    return fail_errno(error, "asking the kernel which pages of guest RAM were written");
  }
  return changed;
}

}  // namespace qvmstate::qemu
