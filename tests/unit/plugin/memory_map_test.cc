#include "plugin/qemu/memory_map.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <cstring>

#include "plugin/qemu/attach_source.h"
#include "plugin/qemu/inprocess_source.h"

namespace qvmstate::qemu {
namespace {

constexpr size_t page = 4096;

struct Region {
  Region(size_t bytes, int flags, int file) : size(bytes) {
    data = static_cast<std::byte *>(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, file, 0));
    if (data == MAP_FAILED) {
      std::abort();
    }
    // Huge pages would touch neighbours.
    ::madvise(data, bytes, MADV_NOHUGEPAGE);
  }
  ~Region() { ::munmap(data, size); }
  std::vector<HostRamBlock> blocks() const {
    return {{{"ram", size, page}, reinterpret_cast<uint64_t>(data)}};
  }
  std::byte *data;
  size_t size;
};

/// The touched pages as presence() tells them.
std::vector<size_t> touched_pages(MemoryMap &map, size_t bytes) {
  std::vector<size_t> touched;
  for (uint64_t offset = 0; offset < bytes;) {
    auto found = map.presence(0, offset);
    EXPECT_TRUE(found);
    if (!found || found->bytes == 0 || found->bytes % page != 0) {
      ADD_FAILURE() << "at " << offset;
      return touched;
    }
    for (uint64_t at = offset; found->touched && at < offset + found->bytes; at += page) {
      touched.push_back(at / page);
    }
    offset += found->bytes;
    EXPECT_LE(offset, bytes);
  }
  return touched;
}

TEST(MapsLine, Parses) {
  auto mapping = parse_maps_line(
      "7f00a8000000-7f00b8000000 rw-s 00002000 00:01 1234                       "
      "/memfd:my ram (deleted)");
  ASSERT_TRUE(mapping);
  EXPECT_EQ(mapping->start, 0x7f00a8000000U);
  EXPECT_EQ(mapping->end, 0x7f00b8000000U);
  EXPECT_TRUE(mapping->shared);
  EXPECT_EQ(mapping->file_offset, 0x2000U);
  EXPECT_EQ(mapping->device_minor, 1U);
  EXPECT_EQ(mapping->inode, 1234U);
  EXPECT_EQ(mapping->path, "/memfd:my ram (deleted)");
  mapping = parse_maps_line("5654a4429000-5654a445c000 rw-p 00000000 00:00 0 ");
  ASSERT_TRUE(mapping);
  EXPECT_FALSE(mapping->shared);
  EXPECT_EQ(mapping->inode, 0U);
  EXPECT_EQ(mapping->path, "");
}

TEST(MapsLine, RefusesGarbage) {
  for (const char *line :
       {"", "-", "1000", "1000-", "2000-1000 rw-p 0 0:0 0", "1000-2000 rw", "1000-2000 rw-p",
        "1000-2000 rw-p 0 0:", "zz-2000 rw-p 0 0:0 0", "1000-2000 rw-p 0 00 0"}) {
    EXPECT_FALSE(parse_maps_line(line)) << line;
  }
}

TEST(MemoryMap, TellsTouchedFromUntouchedPrivatePages) {
  constexpr size_t pages = 20000;  // more than one batch of the pagemap
  const Region region(pages * page, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  for (const size_t index :
       {size_t{0}, size_t{7}, size_t{8}, size_t{8191}, size_t{8192}, pages - 1}) {
    region.data[index * page + 5] = std::byte{1};
  }
  auto map = MemoryMap::read(::getpid(), region.blocks());
  ASSERT_TRUE(map) << map.error().message;
  EXPECT_EQ(touched_pages(*map, region.size),
            (std::vector<size_t>{0, 7, 8, 8191, 8192, pages - 1}));
  EXPECT_EQ(*map->touched_bytes(), 6 * page);
}

TEST(MemoryMap, AsksTheFileOfSharedMemoryAndLeavesItsHoles) {
  const Descriptor file(::memfd_create("test", MFD_CLOEXEC));
  ASSERT_EQ(::ftruncate(file.get(), 64 * page), 0);
  const Region region(64 * page, MAP_SHARED, file.get());
  region.data[3 * page] = std::byte{1};
  // Written through the file only: this process never touched it.
  ASSERT_EQ(::pwrite(file.get(), "x", 1, 40 * page), 1);
  struct stat before;
  ASSERT_EQ(::fstat(file.get(), &before), 0);

  auto source = InProcessSource::open(region.blocks());
  ASSERT_TRUE(source) << source.error().message;
  EXPECT_TRUE((*source)->map().warnings().empty());
  EXPECT_EQ(touched_pages((*source)->map(), region.size), (std::vector<size_t>{3, 40}));

  struct stat after;
  ASSERT_EQ(::fstat(file.get(), &after), 0);
  EXPECT_EQ(after.st_blocks, before.st_blocks);
}

TEST(MemoryMap, AlwaysReadsPrivateFiles) {
  const Descriptor file(::memfd_create("test", MFD_CLOEXEC));
  ASSERT_EQ(::ftruncate(file.get(), 8 * page), 0);
  const Region region(8 * page, MAP_PRIVATE, file.get());
  auto map = MemoryMap::read(::getpid(), region.blocks());
  ASSERT_TRUE(map);
  EXPECT_EQ(touched_pages(*map, region.size).size(), 8U);
}

TEST(MemoryMap, HandlesABlockThatIsSplitIntoMappings) {
  const Region region(64 * page, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  region.data[1 * page] = std::byte{1};
  region.data[33 * page] = std::byte{1};
  ASSERT_EQ(::mprotect(region.data + 16 * page, 16 * page, PROT_READ), 0);  // three mappings
  auto map = MemoryMap::read(::getpid(), region.blocks());
  ASSERT_TRUE(map);
  EXPECT_EQ(touched_pages(*map, region.size), (std::vector<size_t>{1, 33}));
}

TEST(MemoryMap, RefusesABlockThatIsNotThere) {
  auto region = std::make_unique<Region>(64 * page, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  auto blocks = region->blocks();
  ::munmap(region->data + 8 * page, 8 * page);
  auto map = MemoryMap::read(::getpid(), blocks);
  ASSERT_FALSE(map);
  EXPECT_EQ(map.error().code, ErrorCode::not_found);
}

/// A child that sleeps until it is killed.
struct Child {
  Child() : pid(::fork()) {
    if (pid == 0) {
      for (;;) {
        ::pause();
      }
    }
  }
  ~Child() { end(); }
  void end() {
    if (pid > 0) {
      ::kill(pid, SIGKILL);
      ::waitpid(pid, nullptr, 0);
      pid = -1;
    }
  }
  pid_t pid;
};

TEST(AttachSource, ReadsPagesOfAnotherProcessWithAStride) {
  constexpr size_t pages = 3000;  // more than one list of vectors
  const Region region(pages * page, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  for (size_t i = 0; i < pages; ++i) {
    std::memset(region.data + i * page, static_cast<int>(i % 251 + 1), page);
  }
  const Child child;
  auto source = AttachSource::open(child.pid, region.blocks());
  ASSERT_TRUE(source) << source.error().message;
  EXPECT_EQ((*source)->view(0), nullptr);
  constexpr size_t stride = page + 8;
  std::vector<std::byte> copy(pages * stride, std::byte{0xee});
  ASSERT_TRUE((*source)->read_pages(0, 0, pages, page, copy.data(), stride));
  for (size_t i = 0; i < pages; ++i) {
    ASSERT_EQ(std::memcmp(copy.data() + i * stride, region.data + i * page, page), 0) << i;
    ASSERT_EQ(copy[i * stride + page], std::byte{0xee}) << i;
  }
  ASSERT_TRUE((*source)->read_pages(0, 7 * page, 1, page, copy.data(), page));
  EXPECT_EQ(copy[0], std::byte{8});
}

TEST(AttachSource, NamesAProcessThatIsGone) {
  const Region region(4 * page, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  region.data[0] = std::byte{1};
  Child child;
  auto source = AttachSource::open(child.pid, region.blocks());
  ASSERT_TRUE(source);
  child.end();
  std::byte copy[page];
  auto read = (*source)->read_pages(0, 0, 1, page, copy, page);
  ASSERT_FALSE(read);
  EXPECT_EQ(read.error().code, ErrorCode::peer);
}

}  // namespace
}  // namespace qvmstate::qemu
