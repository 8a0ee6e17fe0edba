// Decoding of device sections: by a vmdescription written by hand, by the layouts of our own, and
// what does not fit.
#include "vmstate/section_decoder.h"

#include <gtest/gtest.h>

#include "stream_fixture.h"
#include "vmstate/cpu_state.h"
#include "vmstate/elf_core.h"

namespace qvmstate::vmstate::test {
namespace {

StreamSummary described(const std::string &devices) {
  StreamSummary stream;
  stream.vmdescription = R"({"page_size": 4096, "devices": [)" + devices + "]}";
  return stream;
}

DecodedJson decoded(const std::string &devices, const Bytes &body) {
  StreamSection section{"dev", 3, 2, 0, body.done().size()};
  return SectionDecoder(described(devices)).decode(section, body.done());
}

const std::string head = R"({"name": "dev", "instance_id": 3, "vmsd_name": "d", "version": 2, )";

TEST(SectionDecoder, FieldsOfEveryKind) {
  const DecodedJson json = decoded(head + R"("fields": [
        {"name": "a", "type": "uint32", "size": 4},
        {"name": "b", "type": "int16 equal", "size": 2},
        {"name": "c", "type": "bool", "size": 1},
        {"name": "d", "type": "buffer", "size": 3},
        {"name": "e", "type": "uint8", "size": 1, "array_len": 2},
        {"name": "f", "index": 0, "type": "uint8", "size": 1},
        {"name": "f", "index": 1, "type": "uint8", "size": 1},
        {"name": "g", "type": "struct", "size": 2, "array_len": 2, "struct": {"vmsd_name": "s",
           "version": 1, "fields": [{"name": "x", "type": "uint8", "size": 1},
                                    {"name": "y", "type": "int8", "size": 1}]}},
        {"name": "h", "type": "tmp", "vmsd_name": "t", "version": 0, "size": 8,
           "fields": [{"name": "z", "type": "uint64", "size": 8}]}],
      "subsections": [{"vmsd_name": "d/sub", "version": 1,
        "fields": [{"name": "s", "type": "uint16", "size": 2}]}]})",
                                   Bytes()
                                       .u32(0xfffffffe)  // a
                                       .u16(0xfffe)      // b
                                       .u8(1)            // c
                                       .u8(1)
                                       .u8(2)
                                       .u8(0xff)  // d
                                       .u8(7)
                                       .u8(8)   // e
                                       .u8(9)   // f[0]
                                       .u8(10)  // f[1]
                                       .u8(1)
                                       .u8(0xff)  // g, first
                                       .u8(2)
                                       .u8(3)            // g, second
                                       .u64(UINT64_MAX)  // h
                                       .u8(5)
                                       .u8(5)
                                       .text("d/sub")
                                       .u32(1)
                                       .u16(6));  // subsection: type, name, version, s
  EXPECT_EQ(json.dump(),
            R"({"name":"dev","instance":3,"version":2,"size":39,"fields":{"a":4294967294,"b":-2,)"
            R"("c":true,"d":"0102ff","e":[7,8],"f[0]":9,"f[1]":10,"g":[{"x":1,"y":-1},)"
            R"({"x":2,"y":3}],"h":{"z":18446744073709551615}},"subsections":{"d/sub":{"s":6}}})");
}

TEST(SectionDecoder, WhatDoesNotFitIsRaw) {
  const std::string field = R"({"name": "a", "type": "uint16", "size": 2})";
  const Bytes two = Bytes().u16(0x0102);
  EXPECT_TRUE(decoded(head + R"("fields": [)" + field + "]}", two).contains("fields"));
  for (const std::string &device :
       {std::string(),
        head + R"("fields": [)" + field + "," + field + "]}",                  // too long
        head + R"("fields": []})",                                             // too short
        head + R"("fields": [{"name": "a", "type": "uint16", "size": -2}]})",  // no size
        head + R"("fields": [{"name": "a", "type": "uint16"}]})",              // no size
        head + R"("fields": [5]})",                                            // no field
        head + R"("fields": [{"name": "a", "array_len": 18446744073709551615, "type": "struct",
          "struct": {"fields": []}}]})",                                       // no end
        head + R"("fields": [)" + field + R"(], "subsections": [{"vmsd_name": "s"}]})",
        R"({"name": "dev", "instance_id": 4, "fields": [)" + field + "]}",  // another one
        // As qvmstate describes sections.
        head + R"("size": 2, "fields": [{"name": "data", "size": 2, "type": "buffer"}]})",
        std::string("5"), std::string("{"), std::string("[[[[")}) {
    const DecodedJson json = decoded(device, two);
    EXPECT_FALSE(json.contains("fields")) << device;
    EXPECT_EQ(json["raw"], "0102") << device;
  }
  std::string nested = field;
  for (int i = 0; i < 100; ++i) {
    nested = R"({"name": "n", "type": "struct", "struct": {"fields": [)" + nested + "]}}";
  }
  EXPECT_EQ(decoded(head + R"("fields": [)" + nested + "]}", two)["raw"], "0102");
}

/// The section "cpu" of x86 up to what a core needs; each value tells its field.
Bytes x86_body(uint32_t hflags = 0x4000) {  // LMA
  Bytes body;
  for (uint64_t i = 0; i < 16; ++i) {
    body.u64(0x1000 + i);  // rax rcx rdx rbx rsp rbp rsi rdi r8...
  }
  body.u64(0x2000).u64(0x202).u32(hflags);  // rip, rflags
  body.u64(0x037f000000000000);             // fpuc, fpus, fptag, format
  body.blob(Blob(80));                      // fpregs
  for (uint32_t i = 0; i < 10; ++i) {       // es cs ss ds fs gs ldt tr gdt idt
    body.u32(0x10 + i).u64(0x3000 + i).u32(0xff + i).u32(0xa000 + i);  // selector base limit flags
  }
  body.u32(0).u64(0).u64(0);                                        // sysenter
  body.u64(0xc0).u64(0xc2).u64(0xc3).u64(0xc4);                     // cr0 cr2 cr3 cr4
  body.blob(Blob(64)).u32(0xffffffff).u32(0x1f80).blob(Blob(256));  // dr, a20, mxcsr, xmm
  body.u64(0xd01).u64(1).u64(2).u64(3).u64(4).u64(0x6b6b);  // efer star lstar cstar fmask kernelgs
  return body;
}

std::vector<std::byte> elf_of(const std::string &machine, const Bytes &body, uint32_t version,
                              uint64_t high_address = 0x100000000) {
  StreamSummary stream;
  stream.machine_type = machine;
  stream.devices = {{"cpu", 1, version, 0, body.done().size()}};
  BlobSource source(body.done());
  const auto cpus = read_cpus(source, stream);
  if (!cpus) {
    ADD_FAILURE() << cpus.error().message;
    return {};
  }
  const std::vector<RamPiece> pieces = {{0, 0, 0x1000, 0}, {0, 0x1000, 0x2000, high_address}};
  return format_elf_head(pieces, *cpus).value();
}

uint64_t le64(const std::vector<std::byte> &bytes, size_t at) {
  uint64_t value = 0;
  std::memcpy(&value, &bytes.at(at + 7) - 7, 8);
  return value;
}

TEST(ElfCore, X86ByTheBuiltInLayout) {
  const auto head = elf_of("pc-q35-7.2", x86_body().blob(Blob(100)), 12);
  ASSERT_EQ(head.size(), 64 + 3 * 56 + 12 + 8 + 336 + 12 + 8 + 440);
  EXPECT_EQ(le64(head, 16), 0x0000'0001'003e'0004);  // ET_CORE, EM_X86_64, version
  // The second PT_LOAD: offset, virtual and physical address, size.
  EXPECT_EQ(le64(head, 64 + 2 * 56 + 8), 4 * mib + 0x1000);
  EXPECT_EQ(le64(head, 64 + 2 * 56 + 16), 0x100000000);
  EXPECT_EQ(le64(head, 64 + 2 * 56 + 24), 0x100000000);
  EXPECT_EQ(le64(head, 64 + 2 * 56 + 32), 0x2000);
  const size_t prstatus = 64 + 3 * 56 + 20;
  EXPECT_EQ(le64(head, prstatus + 32), 2);                 // pid: CPU 1
  EXPECT_EQ(le64(head, prstatus + 112), 0x100f);           // r15
  EXPECT_EQ(le64(head, prstatus + 112 + 10 * 8), 0x1000);  // rax
  EXPECT_EQ(le64(head, prstatus + 112 + 16 * 8), 0x2000);  // rip
  EXPECT_EQ(le64(head, prstatus + 112 + 17 * 8), 0x11);    // cs
  EXPECT_EQ(le64(head, prstatus + 112 + 19 * 8), 0x1004);  // rsp
  EXPECT_EQ(le64(head, prstatus + 112 + 21 * 8), 0x3004);  // fs base
  EXPECT_EQ(le64(head, prstatus + 112 + 26 * 8), 0x15);    // gs
  const size_t qemu = prstatus + 336 + 20;
  EXPECT_EQ(le64(head, qemu), 440ULL << 32 | 1);                    // version, size
  EXPECT_EQ(le64(head, qemu + 8 + 16 * 8), 0x2000);                 // rip
  EXPECT_EQ(le64(head, qemu + 8 + 18 * 8), 0x100ULL << 32 | 0x11);  // cs: limit, selector
  EXPECT_EQ(le64(head, qemu + 8 + 18 * 8 + 16), 0x3001);            // cs: base
  EXPECT_EQ(le64(head, qemu + 392 + 3 * 8), 0xc3);                  // cr3
  EXPECT_EQ(le64(head, qemu + 432), 0x6b6b);                        // kernel_gs_base
}

uint32_t le32(const std::vector<std::byte> &bytes, size_t at) {
  uint32_t value = 0;
  std::memcpy(&value, &bytes.at(at + 3) - 3, 4);
  return value;
}

TEST(ElfCore, X86OutsideOfLongMode) {
  for (const bool is_high : {false, true}) {
    const auto head =
        elf_of("pc-q35-7.2", x86_body(0), 12, is_high ? 0x100000000 : uint64_t{0x80000000});
    const size_t headers = is_high ? 64 + 3 * 56 : 52 + 3 * 32;
    ASSERT_EQ(head.size(), headers + 12 + 8 + 144 + 12 + 8 + 440);
    EXPECT_EQ(le32(head, 4) & 0xff, is_high ? 2U : 1U);  // class
    EXPECT_EQ(le32(head, 16), 0x0003'0004U);             // ET_CORE, EM_386
    if (!is_high) {
      // The second PT_LOAD: offset, virtual and physical address, size.
      EXPECT_EQ(le32(head, 52 + 2 * 32 + 4), 4 * mib + 0x1000);
      EXPECT_EQ(le32(head, 52 + 2 * 32 + 8), 0x80000000U);
      EXPECT_EQ(le32(head, 52 + 2 * 32 + 12), 0x80000000U);
      EXPECT_EQ(le32(head, 52 + 2 * 32 + 16), 0x2000U);
    }
    const size_t prstatus = headers + 20;
    EXPECT_EQ(le32(head, prstatus + 24), 2U);                          // pid: CPU 1
    EXPECT_EQ(le32(head, prstatus + 72), 0x1003U);                     // ebx
    EXPECT_EQ(le32(head, prstatus + 72 + 6 * 4), 0x1000U);             // eax
    EXPECT_EQ(le32(head, prstatus + 72 + 7 * 4), 0x13U);               // ds
    EXPECT_EQ(le32(head, prstatus + 72 + 12 * 4), 0x2000U);            // eip
    EXPECT_EQ(le32(head, prstatus + 72 + 13 * 4), 0x11U);              // cs
    EXPECT_EQ(le32(head, prstatus + 72 + 15 * 4), 0x1004U);            // esp
    EXPECT_EQ(le32(head, prstatus + 72 + 16 * 4), 0x12U);              // ss
    EXPECT_EQ(le64(head, prstatus + 144 + 20 + 8 + 16 * 8), 0x2000U);  // rip of the note "QEMU"
  }
}

TEST(ElfCore, I386ByTheBuiltInLayout) {
  Bytes body;
  for (uint32_t i = 0; i < 8; ++i) {
    body.u32(0x1000 + i);  // eax ecx edx ebx esp ebp esi edi
  }
  body.u32(0x2000).u32(0x202).u32(0x00c0);                      // eip, eflags, hflags
  body.u64(0x037f000000000000);                                 // fpuc, fpus, fptag, format
  body.blob(Blob(80));                                          // fpregs
  for (uint32_t i = 0; i < 10; ++i) {                           // es cs ss ds fs gs ldt tr gdt idt
    body.u32(0x10 + i).u32(0).u32(0xffffffff).u32(0xa000 + i);  // selector base limit flags
  }
  body.u32(0).u32(0).u32(0);                     // sysenter
  body.u32(0xc0).u32(0xc2).u32(0xc3).u32(0xc4);  // cr0 cr2 cr3 cr4
  const auto head = elf_of("pc-q35-7.2", body.blob(Blob(2000)), 12, 0x80000000);
  ASSERT_EQ(head.size(), 52 + 3 * 32 + 12 + 8 + 144 + 12 + 8 + 440U);
  const size_t prstatus = 52 + 3 * 32 + 20;
  EXPECT_EQ(le32(head, prstatus + 72), 0x1003U);                   // ebx
  EXPECT_EQ(le32(head, prstatus + 72 + 12 * 4), 0x2000U);          // eip
  EXPECT_EQ(le32(head, prstatus + 72 + 13 * 4), 0x11U);            // cs
  EXPECT_EQ(le64(head, prstatus + 144 + 20 + 392 + 3 * 8), 0xc3);  // cr3 of the note "QEMU"
}

TEST(ElfCore, Aarch64InBothStates) {
  for (const bool is_32_bit : {false, true}) {
    Bytes body;
    for (uint32_t i = 0; i < 16; ++i) {
      body.u32(0x3200 + i);  // regs
    }
    for (uint64_t i = 0; i < 32; ++i) {
      body.u64(0x6400 + i);  // xregs
    }
    body.u64(0x8000).u32(is_32_bit ? 0x1d3 : 0x3c5).blob(Blob(50));  // pc, cpsr
    const auto head = [&] {
      StreamSummary arm;
      arm.machine_type = "virt-7.2";
      arm.target_page_bits = 12;
      arm.devices = {{"cpu", 0, 22, 0, body.done().size()}};
      BlobSource source(body.done());
      const std::vector<RamPiece> pieces = {{0, 0, 0x1000, 0}};
      return format_elf_head(pieces, read_cpus(source, arm).value()).value();
    }();
    ASSERT_EQ(head.size(), 64 + 2 * 56 + 12 + 8 + 392);
    const size_t prstatus = 64 + 2 * 56 + 20;
    EXPECT_EQ(le64(head, prstatus + 112), is_32_bit ? 0x3200 : 0x6400);           // x0
    EXPECT_EQ(le64(head, prstatus + 112 + 31 * 8), is_32_bit ? 0 : 0x641f);       // sp
    EXPECT_EQ(le64(head, prstatus + 112 + 32 * 8), is_32_bit ? 0x320f : 0x8000);  // pc
    EXPECT_EQ(le64(head, prstatus + 112 + 33 * 8), is_32_bit ? 0x1d3 : 0x3c5);    // pstate
  }
}

TEST(ElfCore, UnknownCpusAreRefused) {
  const Bytes body = x86_body();
  BlobSource source(body.done());
  StreamSummary stream;
  stream.machine_type = "pc-q35-7.2";
  EXPECT_FALSE(read_cpus(source, stream));  // none
  for (const auto &[machine, version, bytes] :
       {std::tuple{"sun4u", 12U, body.done().size()},
        std::tuple{"pc-q35-7.2", 13U, body.done().size()},
        std::tuple{"pc-q35-7.2", 12U, body.done().size() - 1},
        std::tuple{"pc-q35-7.2", 12U, size_t{2} << 20}}) {
    stream.machine_type = machine;
    stream.devices = {{"cpu", 0, version, 0, bytes}};
    EXPECT_FALSE(read_cpus(source, stream)) << machine << version << bytes;
  }
}

}  // namespace
}  // namespace qvmstate::vmstate::test
