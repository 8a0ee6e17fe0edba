// The progress line: what it says and that it keeps to its width.
#include "tools/progress.h"

#include <gtest/gtest.h>

namespace qvmstate::tools {
namespace {

qemu::Progress at(uint64_t done, uint64_t written, double seconds) {
  qemu::Progress progress;
  progress.phase = "writing";
  progress.ram_bytes_done = done;
  progress.ram_bytes_total = 1000 * mib;
  progress.bytes_written = written;
  progress.seconds = seconds;
  return progress;
}

TEST(ProgressLine, BarPercentRateAndTimeLeft) {
  // A quarter of the RAM in 2 s of this phase: 6 s for the rest. 200 MiB written in them.
  EXPECT_EQ(format_progress(at(250 * mib, 210 * mib, 3.0), at(0, 10 * mib, 1.0), 60),
            "writing [=====                 ]  25%  100 MiB/s  6.0 s left");
}

TEST(ProgressLine, BeginAndEndOfAPhase) {
  EXPECT_EQ(format_progress(at(0, 0, 1.0), at(0, 0, 1.0), 30), "writing [               ]   0%");
  EXPECT_EQ(format_progress(at(1000 * mib, 0, 1.0), at(0, 0, 1.0), 30),
            "writing [===============] 100%");
}

TEST(ProgressLine, NearlyDoneIsNot100) {
  const std::string line = format_progress(at(1000 * mib - 1, 0, 1.0), at(0, 0, 1.0), 30);
  EXPECT_NE(line.find(" 99%"), std::string::npos) << line;
}

TEST(ProgressLine, PhaseAloneWithoutATotal) {
  qemu::Progress looking;
  looking.phase = "looking";
  EXPECT_EQ(format_progress(looking, looking, 80), "looking");
}

TEST(ProgressLine, MoreDoneThanTotalStaysInTheBar) {
  EXPECT_EQ(format_progress(at(2000 * mib, 0, 1.0), at(0, 0, 1.0), 30),
            "writing [===============] 100%");
}

TEST(ProgressLine, NeverWiderThanTheTerminal) {
  for (size_t columns = 0; columns <= 200; ++columns) {
    const std::string line =
        format_progress(at(250 * mib, 210 * mib, 3.0), at(0, 10 * mib, 1.0), columns);
    EXPECT_LE(line.size(), columns);
  }
}

}  // namespace
}  // namespace qvmstate::tools
