// Which memory the kernel's write protection is no help with.
#include "plugin/qemu/protectable_ram.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "tests/unit/plugin/memory.h"

namespace qvmstate::qemu {
namespace {

using test::huge_page;
using test::Memory;

TEST(ProtectableRam, SharedMemoryIsNot) {
  const Memory memory(huge_page, false, true);
  const std::vector<HostRamBlock> blocks{memory.block("pc.ram")};
  const auto map = MemoryMap::read(::getpid(), blocks);
  ASSERT_TRUE(map) << map.error().message;
  const auto refused = check_protectable(blocks, *map);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::not_supported);
  EXPECT_NE(refused.error().message.find("'pc.ram' is shared memory"), std::string::npos);
}

// Whether KSM runs says a file of the test's own.
TEST(ProtectableRam, MergedMemoryIsNot) {
  const Memory memory(huge_page, false);
  const std::vector<HostRamBlock> blocks{memory.block("pc.ram")};
  const std::string run = testing::TempDir() + "ksm-run-" + std::to_string(::getpid());
  const auto check = [&](const std::string &state) {
    std::ofstream(run) << state << "\n";
    return check_not_merged(blocks, run);
  };
  const bool allowed_at_first = check("1").has_value();
  const bool has_ksm = ::madvise(memory.data, memory.size, MADV_MERGEABLE) == 0;
  const bool allowed_without = check("0") && check("2");  // stopped; and everything unmerged
  const auto refused = check("1");
  std::filesystem::remove(run);
  EXPECT_TRUE(allowed_at_first);
  EXPECT_TRUE(allowed_without);
  if (!has_ksm) {
    GTEST_SKIP() << "no KSM in this kernel";
  }
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::not_supported);
  EXPECT_NE(refused.error().message.find("'pc.ram'"), std::string::npos);
  EXPECT_NE(refused.error().message.find("mem-merge=off"), std::string::npos);
}

}  // namespace
}  // namespace qvmstate::qemu
