#include "plugin/qemu/ram_blocks.h"

#include <gtest/gtest.h>

#include "qcow2/io/offsets.h"

namespace qvmstate::qemu {
namespace {

// As QEMU 7.2.22 prints it; the second block is a memory backend that no device uses.
constexpr const char *text_7_2 =
    "              Block Name    PSize              Offset               Used              Total\n"
    "                  pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000\n"
    "                            2 MiB  0x0000000020000000 0x0000000000200000 0x0000000000200000\n"
    "   0000:00:02.0/vga.vram    4 KiB  0x0000000010080000 0x0000000001000000 0x0000000001000000\n"
    "    /rom@etc/acpi/tables    4 KiB  0x0000000011100000 0x0000000000020000 0x0000000000200000\n";

// As QEMU 10.0 prints it, with HVA and RO.
constexpr const char *text_10 =
    "              Block Name    PSize              Offset               Used              Total"
    "                HVA  RO\n"
    "                  pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 "
    "0x00007f00a8000000  rw\n"
    "        my memory device    2 MiB  0x0000000010000000 0x0000000000400000 0x0000000000400000 "
    "0x00007f00b8000000  rw\n"
    "                            4 KiB  0x0000000020000000 0x0000000000200000 0x0000000000200000 "
    "0x00007f00c0000000  rw\n"
    "                 pc.bios    4 KiB  0x0000000030000000 0x0000000000040000 0x0000000000040000 "
    "0x00007f00d0000000  ro\n";

TEST(RamBlocks, ParsesTheColumnsOf72) {
  auto blocks = parse_info_ramblock(text_7_2);
  ASSERT_TRUE(blocks) << blocks.error().message;
  ASSERT_EQ(blocks->size(), 3U);
  EXPECT_EQ((*blocks)[0].block.idstr, "pc.ram");
  EXPECT_EQ((*blocks)[0].block.used_bytes, 256 * mib);
  EXPECT_FALSE((*blocks)[0].address);
  EXPECT_EQ((*blocks)[1].block.idstr, "0000:00:02.0/vga.vram");
  EXPECT_EQ((*blocks)[2].block.idstr, "/rom@etc/acpi/tables");
  EXPECT_EQ((*blocks)[2].block.used_bytes, 128 * kib);  // used, not total
}

TEST(RamBlocks, ParsesAddressesAndNamesWithSpaces) {
  auto blocks = parse_info_ramblock(text_10);
  ASSERT_TRUE(blocks) << blocks.error().message;
  ASSERT_EQ(blocks->size(), 3U);
  EXPECT_EQ((*blocks)[0].address, 0x7f00a8000000U);
  EXPECT_EQ((*blocks)[1].block.idstr, "my memory device");
  EXPECT_EQ((*blocks)[1].block.page_bytes, 2 * mib);
  EXPECT_EQ((*blocks)[1].address, 0x7f00b8000000U);
  EXPECT_EQ((*blocks)[2].block.idstr, "pc.bios");
}

TEST(RamBlocks, RefusesWhatItDoesNotUnderstand) {
  const std::string header = std::string(text_7_2).substr(0, std::string(text_7_2).find('\n') + 1);
  const std::string lines[] = {
      "",
      "unknown command: 'info ramblock'\n",
      header,
      header + "pc.ram 4 KiB 0x0 0x1000\n",
      header + "pc.ram 4 XiB 0x0 0x1000 0x1000\n",
      header + "pc.ram 4 KiB 0x0 0x2000 0x1000\n",
      header + "pc.ram 4 KiB 0x0 0x10zz 0x1000\n",
      header + "pc.ram 0 KiB 0x0 0x1000 0x1000\n",
      header + "pc.ram 99999999999999999999 KiB 0x0 0x1000 0x1000\n",
      header + "pc.ram 4 KiB 0x0 0x1001 0x2000\n",
      header + std::string(256, 'n') + " 4 KiB 0x0 0x1000 0x1000\n",
  };
  for (const std::string &line : lines) {
    EXPECT_FALSE(parse_info_ramblock(line)) << line;
  }
}

}  // namespace
}  // namespace qvmstate::qemu
