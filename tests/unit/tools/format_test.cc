// Rates taken, and sizes, times, names and tables shown. Expectations are what qemu-img 10.0.13 and
// 11.1.3 print for the same numbers, or written by hand.
#include "tools/format.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <ctime>

namespace qvmstate::tools {
namespace {

TEST(ParseRate, TakesBytesAndPowersOf1024) {
  EXPECT_EQ(parse_rate("1").value(), 1U);
  EXPECT_EQ(parse_rate("500000").value(), 500000U);
  EXPECT_EQ(parse_rate("10k").value(), 10240U);
  EXPECT_EQ(parse_rate("10K").value(), 10240U);
  EXPECT_EQ(parse_rate("10M").value(), 10485760U);
  EXPECT_EQ(parse_rate("1G").value(), 1073741824U);
  EXPECT_EQ(parse_rate("1.5g").value(), 1610612736U);
  EXPECT_EQ(parse_rate("2T").value(), 2199023255552U);
  EXPECT_EQ(parse_rate("0.5K").value(), 512U);
}

TEST(ParseRate, RefusesEverythingElseAndNamesIt) {
  for (const char *text : {"", "0", "0.5", "-1", "+1", "M", "10MB", "10 M", " 10", "10Q", "1e3",
                           "inf", "nan", "0x10", "1..5", "10M\n", "9223372036854775808",
                           "99999999999999T", "9999999999999999999999999999999999999999999"}) {
    const Result<uint64_t> rate = parse_rate(text);
    ASSERT_FALSE(rate) << text << " gave " << *rate;
    EXPECT_EQ(rate.error().code, ErrorCode::bad_argument) << text;
    EXPECT_NE(rate.error().message.find("10M or 1.5G"), std::string::npos) << text;
  }
}

TEST(FormatSize, AsQemuImgPrintsIt) {
  EXPECT_EQ(format_size(0), "0 B");
  EXPECT_EQ(format_size(1), "1 B");
  EXPECT_EQ(format_size(999), "999 B");
  EXPECT_EQ(format_size(1000), "0.977 KiB");
  EXPECT_EQ(format_size(1023), "0.999 KiB");
  EXPECT_EQ(format_size(1024), "1 KiB");
  EXPECT_EQ(format_size(1995), "1.95 KiB");
  EXPECT_EQ(format_size(1024 * 999 + 600), "1e+03 KiB");
  EXPECT_EQ(format_size(1024 * 1000), "0.977 MiB");
  EXPECT_EQ(format_size(1024 * 1024 - 1), "1 MiB");
  EXPECT_EQ(format_size(268447801), "256 MiB");
  EXPECT_EQ(format_size(uint64_t{2} << 30), "2 GiB");
  EXPECT_EQ(format_size(uint64_t{1} << 40), "1 TiB");
  EXPECT_EQ(format_size(uint64_t{1} << 60), "1 EiB");
  EXPECT_EQ(format_size(UINT64_MAX), "16 EiB");
}

TEST(FormatRate, BytesOverSeconds) {
  EXPECT_EQ(format_rate(3 * 1048576, 2.0), "1.5 MiB/s");
  EXPECT_EQ(format_rate(1, 0), "-");
  EXPECT_EQ(format_rate(1, -1), "-");
}

TEST(FormatSeconds, GrowsFromMillisecondsToHours) {
  EXPECT_EQ(format_seconds(0), "0 ms");
  EXPECT_EQ(format_seconds(0.0123), "12 ms");
  EXPECT_EQ(format_seconds(0.9994), "999 ms");
  EXPECT_EQ(format_seconds(0.9996), "1.0 s");
  EXPECT_EQ(format_seconds(1.64), "1.6 s");
  EXPECT_EQ(format_seconds(59.94), "59.9 s");
  EXPECT_EQ(format_seconds(59.96), "1:00");
  EXPECT_EQ(format_seconds(125.4), "2:05");
  EXPECT_EQ(format_seconds(3599.6), "1:00:00");
  EXPECT_EQ(format_seconds(3725), "1:02:05");
}

TEST(FormatClock, AsQemuImgPrintsIt) {
  EXPECT_EQ(format_clock(0), "0000:00:00.000");
  EXPECT_EQ(format_clock(999999), "0000:00:00.000");
  EXPECT_EQ(format_clock(uint64_t{442800} * 1000000000 + 5000000), "0123:00:00.005");
  EXPECT_EQ(format_clock(uint64_t{444441600} * 1000000000), "123456:00:00.000");
  EXPECT_EQ(format_clock(UINT64_MAX), "5124095:34:33.709");
}

TEST(FormatDate, LocalTimeUpToTheLastSecond) {
  setenv("TZ", "UTC", 1);
  tzset();
  EXPECT_EQ(format_date(0), "1970-01-01 00:00:00");
  EXPECT_EQ(format_date(1795260804), "2026-11-21 11:33:24");
  EXPECT_EQ(format_date(UINT32_MAX), "2106-02-07 06:28:15");
  setenv("TZ", "Etc/GMT-2", 1);  // POSIX sign: two hours east
  tzset();
  EXPECT_EQ(format_date(1795260804), "2026-11-21 13:33:24");
}

TEST(Printable, LeavesTextAndEscapesControls) {
  EXPECT_EQ(printable("before upgrade"), "before upgrade");
  EXPECT_EQ(printable("\xc3\xa4\xe2\x82\xac"), "\xc3\xa4\xe2\x82\xac");
  EXPECT_EQ(printable("a\x1b[2J\n"), "a\\x1b[2J\\x0a");
  EXPECT_EQ(printable("\x7f"), "\\x7f");
  // U+009b is the one-character form of ESC [.
  EXPECT_EQ(printable("\xc2\x9b"
                      "2J"),
            "\\xc2\\x9b2J");
  // What is no UTF-8: cut short, a byte alone (one control character on a terminal of 8 bits), too
  // long, a surrogate, past U+10ffff.
  EXPECT_EQ(printable("\xc2"), "\\xc2");
  EXPECT_EQ(printable("\x9b"
                      "2J"),
            "\\x9b2J");
  EXPECT_EQ(printable("\xe2\x82"
                      "a"),
            "\\xe2\\x82"
            "a");
  EXPECT_EQ(printable("\xc0\xaf"), "\\xc0\\xaf");
  EXPECT_EQ(printable("\xe0\x80\xaf"), "\\xe0\\x80\\xaf");
  EXPECT_EQ(printable("\xed\xa0\x80"), "\\xed\\xa0\\x80");
  EXPECT_EQ(printable("\xf4\x90\x80\x80"), "\\xf4\\x90\\x80\\x80");
  EXPECT_EQ(printable("\xf4\x8f\xbf\xbf"), "\xf4\x8f\xbf\xbf");
  EXPECT_EQ(printable(std::string_view("a\0b", 3)), "a\\x00b");
}

TEST(FormatSnapshotList, ColumnsOfNewestQemuImg) {
  setenv("TZ", "UTC", 1);
  tzset();
  qcow2::Snapshot one;
  one.id = "1";
  one.name = "one";
  one.vmstate_bytes = 268447801;
  one.date_seconds = 1795260804;
  one.icount = 0;
  qcow2::Snapshot two;
  two.id = "12";
  two.name = "a long name with spaces, and more";
  two.date_seconds = 1795260804;
  two.clock_nanos = uint64_t{442800} * 1000000000 + 5000000;
  const std::vector<qcow2::Snapshot> both = {one, two};
  EXPECT_EQ(format_snapshot_list(both),
            "Snapshot list:\n"
            "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT\n"
            "1       one               256 MiB 2026-11-21 11:33:24  0000:00:00.000          0\n"
            "12      a long name with spaces, and more      0 B 2026-11-21 11:33:24  0123:00:00.005"
            "         --\n");
  EXPECT_EQ(format_snapshot_list({}), "");
}

}  // namespace
}  // namespace qvmstate::tools
