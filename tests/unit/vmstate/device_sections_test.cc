// Splitting what xen-save-devices-state writes.

#include "vmstate/device_sections.h"

#include <chrono>

#include "stream_fixture.h"
#include "vmstate/section_scan.h"

namespace qvmstate::vmstate::test {
namespace {

Bytes file_header() {
  return Bytes().text("QEVM").u32(3);
}

std::string text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char *>(bytes.data()), bytes.size()};
}

Blob body_of(std::string_view text) {
  return Bytes().text(text).done();
}

TEST(DeviceSections, golden) {
  const Blob bytes = Bytes()
                         .u32(0x5145564d)  // "QEVM"
                         .u32(3)           // stream version
                         .u8(0x04)         // FULL
                         .u32(0)           // section id
                         .u8(5)            // idstr length
                         .text("timer")
                         .u32(0)      // instance
                         .u32(2)      // version
                         .u64(1234)   // cpu_ticks_offset
                         .u64(0)      // unused
                         .u64(98765)  // cpu_clock_offset
                         .u8(0x7e)    // footer
                         .u32(0)      // its section id
                         .u8(0x04)    // FULL
                         .u32(9)      // section id
                         .u8(3)       // idstr length
                         .text("cpu")
                         .u32(7)    // instance
                         .u32(12)   // version
                         .u8(0x7e)  // footer of a section without a body
                         .u32(9)    // its section id
                         .u8(0x00)  // EOF
                         .done();
  const auto sections = split_device_sections(bytes);
  ASSERT_TRUE(sections) << sections.error().message;
  ASSERT_EQ(sections->size(), 2U);
  const DeviceSection &timer = (*sections)[0];
  EXPECT_EQ(timer.id, 0U);
  EXPECT_EQ(timer.idstr, "timer");
  EXPECT_EQ(timer.instance, 0U);
  EXPECT_EQ(timer.version, 2U);
  EXPECT_EQ(timer.body.data(), bytes.data() + 8 + 19);
  EXPECT_EQ(timer.body.size(), 24U);
  EXPECT_EQ(timer.whole.data(), bytes.data() + 8);
  EXPECT_EQ(timer.whole.size(), 19U + 24U + 5U);
  const DeviceSection &cpu = (*sections)[1];
  EXPECT_EQ(cpu.id, 9U);
  EXPECT_EQ(cpu.idstr, "cpu");
  EXPECT_EQ(cpu.instance, 7U);
  EXPECT_EQ(cpu.version, 12U);
  EXPECT_TRUE(cpu.body.empty());
  EXPECT_EQ(cpu.whole.data() + cpu.whole.size() + 1, bytes.data() + bytes.size());

  const auto clock = vm_clock_nanos(*sections);
  ASSERT_TRUE(clock);
  EXPECT_EQ(*clock, 98765U);
}

TEST(DeviceSections, footer_bytes_inside_a_body_do_not_end_it) {
  // The section's own footer twice in its body: alone, and before something that looks almost like
  // a header (an idstr that is not printable).
  const Blob body = Bytes()
                        .text("aa")
                        .u8(0x7e)
                        .u32(3)
                        .text("bb")
                        .u8(0x7e)
                        .u32(3)
                        .u8(0x04)
                        .u32(4)
                        .u8(2)
                        .u8(0x01)
                        .u8(0xff)
                        .u32(0)
                        .u32(1)
                        .text("cc")
                        .done();
  Bytes bytes = file_header();
  add_section(bytes, 3, "tricky", 0, 1, body);
  add_section(bytes, 4, "next", 0, 1, body_of("x"));
  const Blob done = bytes.u8(0).done();
  const auto sections = split_device_sections(done);
  ASSERT_TRUE(sections) << sections.error().message;
  ASSERT_EQ(sections->size(), 2U);
  EXPECT_EQ(text_of((*sections)[0].body), text_of(body));
  EXPECT_EQ((*sections)[1].idstr, "next");
}

TEST(DeviceSections, goes_back_when_a_later_section_cannot_be_closed) {
  // A whole valid header of an invented section 77 after a footer inside the body: nothing closes
  // section 77, so the split must come back and find the true end.
  const Blob body = Bytes()
                        .text("guest")
                        .u8(0x7e)
                        .u32(3)
                        .u8(0x04)
                        .u32(77)
                        .u8(4)
                        .text("fake")
                        .u32(0)
                        .u32(1)
                        .text("more")
                        .done();
  Bytes bytes = file_header();
  add_section(bytes, 3, "tricky", 0, 1, body);
  add_section(bytes, 4, "next", 0, 1, body_of("x"));
  const Blob done = bytes.u8(0).done();
  const auto sections = split_device_sections(done);
  ASSERT_TRUE(sections) << sections.error().message;
  ASSERT_EQ(sections->size(), 2U);
  EXPECT_EQ(text_of((*sections)[0].body), text_of(body));
  EXPECT_EQ((*sections)[1].idstr, "next");
}

TEST(DeviceSections, end_mark_inside_the_last_body) {
  Bytes bytes = file_header();
  add_section(bytes, 5, "last", 0, 1, Bytes().u8(0x7e).u32(5).u8(0).text("tail").done());
  const Blob done = bytes.u8(0).done();
  const auto sections = split_device_sections(done);
  ASSERT_TRUE(sections) << sections.error().message;
  ASSERT_EQ(sections->size(), 1U);
  EXPECT_EQ((*sections)[0].body.size(), 10U);
}

TEST(DeviceSections, refused) {
  const auto code = [](const Blob &bytes) {
    const auto sections = split_device_sections(bytes);
    EXPECT_FALSE(sections);
    EXPECT_FALSE(sections.error().message.empty());
    return sections ? ErrorCode::io : sections.error().code;
  };
  EXPECT_EQ(code({}), ErrorCode::bad_stream);
  EXPECT_EQ(code(file_header().done()), ErrorCode::bad_stream);
  EXPECT_EQ(code(file_header().u8(0).done()), ErrorCode::bad_stream);  // no section at all
  EXPECT_EQ(code(Bytes().text("QEVM").u32(2).u8(0).done()), ErrorCode::bad_stream);

  Bytes trailing = file_header();
  add_section(trailing, 1, "a", 0, 1, body_of("x")).u8(0).u8(0);
  EXPECT_EQ(code(trailing.done()), ErrorCode::bad_stream);

  Bytes no_end = file_header();
  add_section(no_end, 1, "a", 0, 1, body_of("x"));
  EXPECT_EQ(code(no_end.done()), ErrorCode::bad_stream);

  Bytes twice = file_header();  // one id cannot be two sections
  add_section(twice, 1, "a", 0, 1, body_of("x"));
  add_section(twice, 1, "b", 0, 1, body_of("y")).u8(0);
  const auto merged = split_device_sections(twice.done());
  ASSERT_TRUE(merged);
  EXPECT_EQ(merged->size(), 1U);

  const Blob no_footer =
      file_header().u8(4).u32(1).u8(1).text("a").u32(0).u32(1).text("body").u8(0).done();
  const auto old = split_device_sections(no_footer);
  ASSERT_FALSE(old);
  EXPECT_NE(old.error().message.find("up to 2.3"), std::string::npos) << old.error().message;
}

TEST(DeviceSections, too_many_sections) {
  Bytes bytes = file_header();
  for (uint32_t i = 0; i <= device_sections_max; ++i) {
    add_section(bytes, i, "s", i, 1, {});
  }
  EXPECT_FALSE(split_device_sections(bytes.u8(0).done()));
}

TEST(DeviceSections, hostile_bytes_take_bounded_time) {
  // Every footer of section 1 is followed by a header of another section that nothing closes.
  Bytes bytes = file_header();
  bytes.u8(4).u32(0).u8(1).text("a").u32(0).u32(1);
  for (uint32_t i = 1; i < 100000; ++i) {
    bytes.u8(0x7e).u32(0).u8(4).u32(i).u8(1).text("b").u32(0).u32(1);
  }
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_FALSE(split_device_sections(bytes.done()));
  // Looking at everything behind each of 100000 headers would be 10^11 bytes.
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(10));
}

Result<uint64_t> clock_of(std::string_view idstr, uint32_t version, const Blob &body) {
  const DeviceSection section{0, std::string(idstr), 0, version, body, body};
  return vm_clock_nanos({&section, 1});
}

TEST(VmClock, icount) {
  // 24 bytes of fields, then subsection timer/icount with its subsection shift.
  const auto timer = [](bool has_shift) {
    Bytes body;
    body.u64(1).u64(0).u64(5000);
    body.u8(5).u8(12).text("timer/icount").u32(1).u64(100).u64(40);  // bias, count
    if (has_shift) {
      body.u8(5).u8(18).text("timer/icount/shift").u32(2).u16(3).u64(0);  // shift, last delta
    }
    return body.done();
  };
  const auto adaptive = clock_of("timer", 2, timer(true));
  ASSERT_TRUE(adaptive);
  EXPECT_EQ(*adaptive, 100U + 40U * 8U);
  const auto fixed = clock_of("timer", 2, timer(false));
  ASSERT_FALSE(fixed);
  EXPECT_EQ(fixed.error().code, ErrorCode::not_supported);
}

TEST(VmClock, refused) {
  EXPECT_FALSE(clock_of("rtc", 2, Bytes().u64(0).u64(0).u64(1).done()));
  EXPECT_FALSE(clock_of("timer", 1, Bytes().u64(0).u64(0).u64(1).done()));
  EXPECT_FALSE(clock_of("timer", 2, Bytes().u64(0).u64(0).done()));
  EXPECT_FALSE(clock_of("timer", 2, Bytes().u64(0).u64(0).u64(UINT64_MAX).done()));
}

TEST(VmDescription, golden) {
  const Blob body = Bytes().fill(5, 0).done();
  const std::vector<DeviceSection> sections = {{0, "timer", 0, 2, body, body},
                                               {1, "a\"b\\", 3, 1, {}, {}}};
  EXPECT_EQ(format_vmdescription("pc", {}, 4096, sections),
            R"({"configuration": {"vmsd_name": "configuration", "version": 1, "fields": [)"
            R"({"name": "len", "type": "uint32", "size": 4}, )"
            R"({"name": "name", "type": "buffer", "size": 2}]}, "page_size": 4096, "devices": [)"
            R"({"name": "timer", "instance_id": 0, "version": 2, "size": 5, "fields": [)"
            R"({"name": "data", "type": "buffer", "size": 5}]}, )"
            R"({"name": "a\"b\\", "instance_id": 3, "version": 1, "size": 0, "fields": [)"
            R"({"name": "data", "type": "buffer", "size": 0}]}]})");
  const std::string arm = format_vmdescription("virt", 12, 4096, {});
  EXPECT_NE(arm.find(R"("subsections": [{"vmsd_name": "configuration/target-page-bits", )"
                     R"("version": 1, "fields": [)"
                     R"({"name": "target_page_bits", "type": "uint32", "size": 4}]}]})"),
            std::string::npos);
}

TEST(VmDescription, no_brace_in_its_length) {
  for (size_t extra = 0; extra < 300; ++extra) {
    const std::string json = format_vmdescription(std::string(extra, 'm'), {}, 4096, {});
    EXPECT_NE(json.size() & 0xff, 0x7bU);
    EXPECT_NE(json.size() >> 8 & 0xff, 0x7bU);
  }
}

}  // namespace
}  // namespace qvmstate::vmstate::test
