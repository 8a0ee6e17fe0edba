// Where main memory lies on each machine type, at the sizes where the rules change.
#include "vmstate/ram_map.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "qcow2/io/offsets.h"

namespace qvmstate::vmstate {
namespace {

using ::testing::HasSubstr;

StreamSummary stream_of(const std::string &machine_type, uint64_t bytes,
                        const std::string &idstr = "pc.ram") {
  StreamSummary stream;
  stream.machine_type = machine_type;
  stream.blocks = {{"0000:00:02.0/vga.vram", 16 * mib, {}},
                   {"pc.bios", 256 * kib, {}},
                   {"/rom@etc/acpi/tables", 128 * kib, {}},
                   {idstr, bytes, {}}};
  return stream;
}

/// "block:offset+bytes@address ..." in hexadecimal, or the error.
std::string shown(const Result<std::vector<RamPiece>> &pieces) {
  if (!pieces) {
    return pieces.error().message;
  }
  std::string text;
  for (const RamPiece &piece : *pieces) {
    char one[100];
    std::snprintf(one, sizeof one, "%s%zu:%lx+%lx@%lx", text.empty() ? "" : " ", piece.block,
                  piece.block_offset, piece.bytes, piece.address);
    text += one;
  }
  return text;
}

std::string by_machine(const std::string &machine_type, uint64_t bytes) {
  return shown(ram_of_machine(stream_of(machine_type, bytes)));
}

TEST(RamMap, I440fxSplitsAtThreeGibibytesFromThreeAndAHalfOn) {
  EXPECT_EQ(by_machine("pc-i440fx-7.2", 128 * mib), "3:0+8000000@0");
  EXPECT_EQ(by_machine("pc-i440fx-7.2", 0xdfff0000), "3:0+dfff0000@0");
  EXPECT_EQ(by_machine("pc-i440fx-7.2", 0xe0000000),
            "3:0+c0000000@0 3:c0000000+20000000@100000000");
  EXPECT_EQ(by_machine("pc-i440fx-rhel7.6.0", 4 * gib),
            "3:0+c0000000@0 3:c0000000+40000000@100000000");
  EXPECT_EQ(by_machine("pc-i440fx-1.7", 4 * gib), "3:0+e0000000@0 3:e0000000+20000000@100000000");
}

TEST(RamMap, Q35SplitsAtTwoGibibytesFromTwoAndThreeQuartersOn) {
  EXPECT_EQ(by_machine("pc-q35-10.0", 0xafff0000), "3:0+afff0000@0");
  EXPECT_EQ(by_machine("pc-q35-10.0", 0xb0000000), "3:0+80000000@0 3:80000000+30000000@100000000");
  EXPECT_EQ(by_machine("pc-q35-1.7", 3 * gib), "3:0+b0000000@0 3:b0000000+10000000@100000000");
}

TEST(RamMap, MicrovmSplitsAtThreeGibibytes) {
  EXPECT_EQ(by_machine("microvm", 3 * gib), "3:0+c0000000@0");
  EXPECT_EQ(by_machine("microvm", 3 * gib + 4096), "3:0+c0000000@0 3:c0000000+1000@100000000");
}

TEST(RamMap, ArmVirtIsOnePieceAtOneGibibyte) {
  StreamSummary stream = stream_of("virt-7.2", 8 * gib, "mach-virt.ram");
  EXPECT_EQ(shown(ram_of_machine(stream)), "3:0+200000000@40000000");
  stream.blocks[3].idstr = "mem0";
  EXPECT_THAT(shown(ram_of_machine(stream)), HasSubstr("'virt-7.2' is not known"));
  stream.target_page_bits = 12;
  EXPECT_EQ(shown(ram_of_machine(stream)), "3:0+200000000@40000000");
}

TEST(RamMap, AMemoryBackendIsMainMemoryToo) {
  EXPECT_EQ(shown(ram_of_machine(stream_of("pc-q35-7.2", gib, "mem0"))), "3:0+40000000@0");
  EXPECT_EQ(shown(ram_of_machine(stream_of("pc-q35-7.2", gib, "/objects/m"))), "3:0+40000000@0");
}

TEST(RamMap, WhatTheStreamDoesNotTellIsAsked) {
  EXPECT_THAT(by_machine("sun4u", gib), HasSubstr("'sun4u' is not known"));
  EXPECT_THAT(by_machine("", gib), HasSubstr("does not name its machine type"));
  EXPECT_THAT(by_machine("pc-q35-7.1", 2048 * gib), HasSubstr("at 4 GiB or at 1 TiB"));
  EXPECT_THAT(by_machine("pc-q35-7.0", 2048 * gib), HasSubstr("@100000000"));
  StreamSummary stream = stream_of("pc-q35-7.2", gib);
  stream.blocks.push_back({"dimm0", gib, {}});
  EXPECT_THAT(shown(ram_of_machine(stream)), HasSubstr("--ram-map BLOCK=ADDRESS[,BYTES[,OFFSET]]"));
  stream.blocks = {{"pc.bios", 256 * kib, {}}};
  EXPECT_THAT(shown(ram_of_machine(stream)), HasSubstr("no RAM block looks like main memory"));
}

TEST(RamMap, PlacesAreRead) {
  const auto place = parse_ram_place("a=b=0x100000000,4096,0x2000");
  ASSERT_TRUE(place);
  EXPECT_EQ(place->idstr, "a=b");
  EXPECT_EQ(place->address, 4 * gib);
  EXPECT_EQ(place->bytes, 4096U);
  EXPECT_EQ(place->block_offset, 8192U);
  EXPECT_FALSE(parse_ram_place("pc.ram=0")->bytes);
  for (const char *text : {"", "pc.ram", "=0", "pc.ram=", "pc.ram=0x", "pc.ram=0,", "pc.ram=-1",
                           "pc.ram=1,2,3,4", "pc.ram=99999999999999999999", "pc.ram=1k"}) {
    EXPECT_FALSE(parse_ram_place(text)) << text;
  }
}

TEST(RamMap, PlacesMustFit) {
  const StreamSummary stream = stream_of("x", gib);
  const auto by_places = [&](const std::vector<RamPlace> &places) {
    return shown(ram_of_places(stream, places));
  };
  EXPECT_EQ(by_places({{"pc.ram", 4 * gib}, {"pc.bios", 0}}), "1:0+40000@0 3:0+40000000@100000000");
  EXPECT_EQ(by_places({{"pc.ram", 0, 4096, 8192}}), "3:2000+1000@0");
  EXPECT_THAT(by_places({{"ram", 0}}), HasSubstr("no RAM block 'ram'"));
  EXPECT_THAT(by_places({{"pc.ram", 1}}), HasSubstr("whole pages"));
  EXPECT_THAT(by_places({{"pc.ram", 0, 0}}), HasSubstr("whole pages"));
  EXPECT_THAT(by_places({{"pc.ram", 0, gib + 4096}}), HasSubstr("must lie in it"));
  EXPECT_THAT(by_places({{"pc.ram", 0, 4096, gib}}), HasSubstr("must lie in it"));
  EXPECT_THAT(by_places({{"pc.ram", UINT64_MAX - 4095}}), HasSubstr("must lie in it"));
  EXPECT_THAT(by_places({{"pc.ram", 0}, {"pc.bios", 4096}}), HasSubstr("over each other"));
}

}  // namespace
}  // namespace qvmstate::vmstate
