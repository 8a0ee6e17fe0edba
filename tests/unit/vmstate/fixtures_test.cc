// Streams that QEMU made (fixtures/README.md): what they hold is known, and whatever happens to
// their bytes, reading them ends in an error or in something true. What QEMU said of their memory
// is compared by tests/interop/test_fixtures.py.
#include <zlib.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <random>

#include "stream_fixture.h"
#include "vmstate/stored_state.h"

namespace qvmstate::vmstate::test {
namespace {

struct Fixture {
  const char *name;
  const char *machine;
  Layout layout;
  const char *main_block;
  uint64_t main_bytes;
  size_t devices_min;
  uint64_t compressed_pages_min = 0;
  uint64_t xbzrle_pages_min = 0;
};

// Where in main memory the guest, or on arm a loader, put "QVMS".
constexpr uint64_t x86_marker_offset = 0x7000;
constexpr uint64_t arm_marker_offset = 0x207000;
constexpr const char *pc = "pc.ram";
constexpr const char *microvm = "microvm.ram";
constexpr const char *arm = "mach-virt.ram";

const Fixture fixtures[] = {
    {"72-pc", "pc-i440fx-7.2", Layout::legacy, pc, 8 * mib, 20},
    {"72-microvm-rounds", "microvm", Layout::legacy, microvm, 8 * mib, 10},
    {"72-microvm-compress", "microvm", Layout::legacy, microvm, 8 * mib, 10, 1},
    {"72-microvm-xbzrle", "microvm", Layout::legacy, microvm, 8 * mib, 10, 0, 64},
    {"72-microvm-no-footers", "microvm", Layout::legacy, microvm, 8 * mib, 10},
    {"72-microvm-no-configuration", "", Layout::legacy, microvm, 8 * mib, 10},
    {"72-virt", "virt-7.2", Layout::legacy, arm, 8 * mib, 10},
    {"72-i386", "pc-i440fx-7.2", Layout::legacy, pc, 8 * mib, 20},
    {"newest-i386", "pc-i440fx-11.1", Layout::legacy, pc, 8 * mib, 20},
    {"100-pc", "pc-i440fx-10.0", Layout::legacy, pc, 8 * mib, 20},
    {"100-microvm-mapped", "microvm", Layout::mapped_ram, microvm, 8 * mib, 10},
    {"100-microvm-xbzrle", "microvm", Layout::legacy, microvm, 8 * mib, 10, 0, 64},
    {"newest-pc", "pc-i440fx-11.1", Layout::legacy, pc, 8 * mib, 20},
    {"newest-microvm-mapped", "microvm", Layout::mapped_ram, microvm, 8 * mib, 10},
    {"newest-microvm-xbzrle", "microvm", Layout::legacy, microvm, 8 * mib, 10, 0, 64},
    {"newest-virt", "virt-11.1", Layout::legacy, arm, 8 * mib, 10},
};

Blob inflated(const std::string &name) {
  const std::string path =
      std::string(QVMSTATE_SOURCE_DIR) + "/fixtures/" + "qemu-" + name + ".mig.gz";
  const gzFile file = gzopen(path.c_str(), "rb");
  EXPECT_NE(file, nullptr) << path;
  Blob bytes;
  std::vector<std::byte> piece(1 * mib);
  int count = 0;
  while (file != nullptr && (count = gzread(file, piece.data(), piece.size())) > 0) {
    bytes.insert(bytes.end(), piece.begin(), piece.begin() + count);
  }
  EXPECT_EQ(count, 0);
  gzclose(file);
  return bytes;
}

/// RAM by what is in it; pages of zeros are not.
using Memory = std::map<std::pair<size_t, uint64_t>, Blob>;

Result<StreamSummary> load(std::span<const std::byte> bytes, Memory &memory) {
  BlobSource source(bytes);
  StreamHooks hooks;
  hooks.page = [&](size_t block, uint64_t offset, uint64_t, auto data) -> Result<void> {
    if (data.empty()) {
      memory.erase({block, offset});
    } else {
      memory[{block, offset}] = Blob(data.begin(), data.end());
    }
    return {};
  };
  hooks.page_now = [&](size_t block, uint64_t offset, std::span<std::byte> to) -> Result<void> {
    if (const auto found = memory.find({block, offset}); found != memory.end()) {
      std::ranges::copy(found->second, to.begin());
    }
    return {};
  };
  return read_stream(source, {}, hooks);
}

class Fixtures : public testing::TestWithParam<Fixture> {};

TEST_P(Fixtures, HoldWhatIsKnown) {
  const Fixture &fixture = GetParam();
  const Blob bytes = inflated(fixture.name);
  Memory memory;
  const auto stream = load(bytes, memory);
  ASSERT_TRUE(stream) << stream.error().message;
  EXPECT_EQ(stream->machine_type, fixture.machine);
  EXPECT_EQ(stream->layout, fixture.layout);
  EXPECT_EQ(stream->page_bytes, 4096U);
  EXPECT_EQ(stream->stream_bytes, bytes.size());
  EXPECT_GE(stream->devices.size(), fixture.devices_min);
  EXPECT_FALSE(stream->vmdescription.empty());
  EXPECT_GE(stream->compressed_pages, fixture.compressed_pages_min);
  EXPECT_GE(stream->xbzrle_pages, fixture.xbzrle_pages_min);
  const auto block = std::ranges::find(stream->blocks, fixture.main_block, &StreamBlock::idstr);
  ASSERT_NE(block, stream->blocks.end());
  EXPECT_EQ(block->used_bytes, fixture.main_bytes);
  const auto page = memory.find(
      {static_cast<size_t>(block - stream->blocks.begin()),
       std::string_view(fixture.main_block) == arm ? arm_marker_offset : x86_marker_offset});
  ASSERT_NE(page, memory.end());
  EXPECT_EQ(std::string_view(reinterpret_cast<const char *>(page->second.data()), 4), "QVMS");
}

/// A part of a stream, as every reader of it has it: an error, or something that lies in it.
void expect_error_or_truth(std::span<const std::byte> bytes, bool must_fail, uint64_t where) {
  BlobSource source(bytes);
  const auto read = read_stream(source);
  if (read) {
    EXPECT_FALSE(must_fail) << where;
    EXPECT_LE(read->stream_bytes, bytes.size()) << where;
    for (const StreamSection &section : read->devices) {
      EXPECT_LE(section.offset + section.bytes, bytes.size()) << where;
    }
  } else {
    EXPECT_FALSE(read.error().message.empty()) << where;
  }
  const auto state = StoredState::open([bytes]() -> Result<std::unique_ptr<StreamSource>> {
    return std::make_unique<BlobSource>(bytes);
  });
  EXPECT_TRUE(!state || read) << where;
  EXPECT_TRUE(state || !state.error().message.empty()) << where;
}

/// Where sections of RAM end and the next ones begin; a few other places look the same.
std::vector<uint64_t> ram_borders(std::span<const std::byte> bytes) {
  const Blob end_of_body = Bytes().u64(0x10).done();
  constexpr uint64_t footer_bytes = 5;
  std::vector<uint64_t> borders;
  for (auto at = bytes.begin(); at != bytes.end(); ++at) {
    at = std::search(at, bytes.end(), end_of_body.begin(), end_of_body.end());
    if (at == bytes.end()) {
      break;
    }
    const auto end = static_cast<uint64_t>(at - bytes.begin()) + end_of_body.size();
    borders.insert(borders.end(), {end - end_of_body.size(), end, end + footer_bytes});
  }
  return borders;
}

TEST_P(Fixtures, CutAtTheBordersOfSections) {
  const Blob bytes = inflated(GetParam().name);
  BlobSource whole(bytes);
  const auto stream = read_stream(whole);
  ASSERT_TRUE(stream) << stream.error().message;
  const uint64_t json_start = bytes.size() - stream->vmdescription.size();
  const uint64_t end_mark = json_start - 1 - 4 - 1;
  std::vector<uint64_t> borders = {0, 8, 8 + 1 + 4 + stream->machine_type.size(), json_start};
  for (const StreamSection &section : stream->devices) {
    borders.push_back(section.offset);
    borders.push_back(section.offset + section.bytes);
  }
  const std::vector<uint64_t> of_ram = ram_borders({bytes.data(), end_mark});
  EXPECT_GE(of_ram.size(), 3U * 2);  // START and END
  borders.insert(borders.end(), of_ram.begin(), of_ram.end());
  for (const uint64_t border : borders) {
    for (const uint64_t size : {border, border + 1, border - std::min<uint64_t>(border, 1)}) {
      expect_error_or_truth({bytes.data(), size}, size <= end_mark, size);
    }
  }
}

TEST_P(Fixtures, SurviveChangedBytes) {
  Blob bytes = inflated(GetParam().name);
  std::mt19937_64 random(5);
  // Where something is: the zeros between pages of mapped-ram are not looked at.
  std::vector<size_t> places;
  for (size_t at = 0; at < bytes.size(); ++at) {
    if (bytes[at] != std::byte{0}) {
      places.push_back(at);
    }
  }
  // All with QVMSTATE_THOROUGH, as in ./dev san.
  const int changes = std::getenv("QVMSTATE_THOROUGH") != nullptr ? 1000 : 100;
  for (int i = 0; i < changes; ++i) {
    const size_t at = places[random() % places.size()];
    const auto change = static_cast<std::byte>(1 + random() % 255);
    bytes[at] ^= change;
    expect_error_or_truth(bytes, false, at);
    bytes[at] ^= change;
  }
}

INSTANTIATE_TEST_SUITE_P(Streams, Fixtures, testing::ValuesIn(fixtures), [](const auto &info) {
  std::string name = info.param.name;
  std::ranges::replace(name, '-', '_');
  return name;
});

}  // namespace
}  // namespace qvmstate::vmstate::test
