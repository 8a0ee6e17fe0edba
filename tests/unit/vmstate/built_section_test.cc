// Sections put together here: golden bytes, and bodies that look like their end.

#include "vmstate/built_section.h"

#include "stream_fixture.h"

namespace qvmstate::vmstate::test {
namespace {

TEST(BuiltSection, Golden) {
  BuiltSection built("uart", 2, 7);
  const Blob first = Bytes().text("he").done();
  const Blob second = Bytes().text("llo").done();
  built.add(first);
  built.add(second);
  EXPECT_EQ(built.body_bytes(), 5U);
  built.close(0x01020304);
  const DeviceSection section = built.section();
  const Blob expected = Bytes()
                            .u8(0x04)         // FULL
                            .u32(0x01020304)  // id
                            .u8(4)            // length of
                            .text("uart")     // the name
                            .u32(2)           // instance
                            .u32(7)           // version
                            .text("hello")    // body
                            .u8(0x7e)         // footer
                            .u32(0x01020304)
                            .done();
  EXPECT_EQ(Blob(section.whole.begin(), section.whole.end()), expected);
  EXPECT_EQ(Blob(section.body.begin(), section.body.end()), Bytes().text("hello").done());
  EXPECT_EQ(section.id, 0x01020304U);
  EXPECT_EQ(section.idstr, "uart");
  EXPECT_EQ(section.instance, 2U);
  EXPECT_EQ(section.version, 7U);
}

TEST(BuiltSection, SeesFootersInItsBody) {
  BuiltSection built("uart", 0, 1);
  built.add(Bytes().u8(1).u8(0x7e).u32(5).u8(0x7e).u32(0x7e000000).done());
  EXPECT_TRUE(built.has_footer_of(5));
  EXPECT_TRUE(built.has_footer_of(0x7e000000));
  EXPECT_FALSE(built.has_footer_of(0));
  EXPECT_FALSE(built.has_footer_of(0x057e7e00));
}

}  // namespace
}  // namespace qvmstate::vmstate::test
