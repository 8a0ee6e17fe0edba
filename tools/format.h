// Words for people: sizes, times, rates and names as the command prints and takes them.
//
// Sizes, dates and clocks look as `qemu-img snapshot -l` of QEMU 10 and later prints them.
// Pure functions; threads: any.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "qcow2/io/result.h"
#include "qcow2/snapshot_table.h"

namespace qvmstate::tools {

/// Three significant digits in the largest unit that needs fewer than four before the point:
/// "999 B", "0.977 KiB", "2 GiB".
std::string format_size(uint64_t bytes);
/// format_size() per second; "-" where no time has passed.
std::string format_rate(uint64_t bytes, double seconds);
/// "120 ms", "1.6 s", "2:05", "1:02:05".
std::string format_seconds(double seconds);
/// Local time, "2026-11-21 11:33:24".
std::string format_date(uint32_t unix_seconds);
/// "0001:02:03.004"
std::string format_clock(uint64_t nanos);

/// The same text without terminal control characters and bytes that are no UTF-8: each becomes
/// \xNN.
std::string printable(std::string_view text);

/// A rate as pv and QEMU take it: bytes, or with K, M, G, T in powers of 1024, a fraction allowed.
Result<uint64_t> parse_rate(std::string_view text);

/// The table of `qemu-img snapshot -l`; empty for no snapshots, as there.
std::string format_snapshot_list(std::span<const qcow2::Snapshot> snapshots);

}  // namespace qvmstate::tools
