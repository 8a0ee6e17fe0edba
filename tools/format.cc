// See format.h.
#include "tools/format.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <ctime>

namespace qvmstate::tools {

std::string format_size(uint64_t bytes) {
  static constexpr const char *units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1000 && unit + 1 < std::size(units)) {
    value /= 1024;
    ++unit;
  }
  return fmt::format("{:.3g} {}", value, units[unit]);
}

std::string format_rate(uint64_t bytes, double seconds) {
  if (!(seconds > 0)) {
    return "-";
  }
  return format_size(static_cast<uint64_t>(static_cast<double>(bytes) / seconds)) + "/s";
}

std::string format_seconds(double seconds) {
  if (seconds < 0.9995) {
    return fmt::format("{:.0f} ms", seconds * 1000);
  }
  if (seconds < 59.95) {
    return fmt::format("{:.1f} s", seconds);
  }
  const uint64_t whole = static_cast<uint64_t>(std::llround(seconds));
  if (whole < 3600) {
    return fmt::format("{}:{:02}", whole / 60, whole % 60);
  }
  return fmt::format("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60);
}

std::string format_date(uint32_t unix_seconds) {
  const time_t time = unix_seconds;
  struct tm parts = {};
  localtime_r(&time, &parts);
  char text[64];
  const size_t length = strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S", &parts);
  return std::string(text, length);
}

std::string format_clock(uint64_t nanos) {
  const uint64_t seconds = nanos / 1000000000;
  return fmt::format("{:04}:{:02}:{:02}.{:03}", seconds / 3600, seconds / 60 % 60, seconds % 60,
                     nanos / 1000000 % 1000);
}

namespace {

/// Of the valid UTF-8 character that the text begins with; 0: there is none.
size_t character_bytes(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  const size_t bytes = first < 0x80                     ? 1
                       : first >= 0xc2 && first <= 0xdf ? 2
                       : first >= 0xe0 && first <= 0xef ? 3
                       : first >= 0xf0 && first <= 0xf4 ? 4
                                                        : 0;
  if (bytes > text.size()) {
    return 0;
  }
  for (size_t i = 1; i < bytes; ++i) {
    if ((byte(i) & 0xc0) != 0x80) {
      return 0;
    }
  }
  // Longer than needed, a surrogate, or past the last character.
  const bool out_of_range = (first == 0xe0 && byte(1) < 0xa0) ||
                            (first == 0xed && byte(1) >= 0xa0) ||
                            (first == 0xf0 && byte(1) < 0x90) || (first == 0xf4 && byte(1) >= 0x90);
  return out_of_range ? 0 : bytes;
}

}  // namespace

std::string printable(std::string_view text) {
  std::string shown;
  while (!text.empty()) {
    const size_t bytes = character_bytes(text);
    const unsigned char first = static_cast<unsigned char>(text[0]);
    // In UTF-8 the control characters U+0080 to U+009f are c2 80 to c2 9f.
    const bool control =
        first < 0x20 || first == 0x7f ||
        (bytes == 2 && first == 0xc2 && static_cast<unsigned char>(text[1]) < 0xa0);
    const std::string_view character = text.substr(0, bytes == 0 ? 1 : bytes);
    if (bytes != 0 && !control) {
      shown += character;
    } else {
      for (const char byte : character) {
        shown += fmt::format("\\x{:02x}", static_cast<unsigned char>(byte));
      }
    }
    text.remove_prefix(character.size());
  }
  return shown;
}

Result<uint64_t> parse_rate(std::string_view text) {
  const auto refuse = [&] {
    return fail(ErrorCode::bad_argument,
                fmt::format("'{}' is not a rate; write bytes per second such as 500000, 10M or "
                            "1.5G (K, M, G, T are powers of 1024)",
                            printable(text)));
  };
  // Also keeps out "inf", "nan" and signs, which from_chars takes.
  if (text.empty() || text.front() < '0' || text.front() > '9') {
    return refuse();
  }
  double number = 0;
  const auto [rest, error] =
      std::from_chars(text.data(), text.data() + text.size(), number, std::chars_format::fixed);
  if (error != std::errc()) {
    return refuse();
  }
  const std::string_view suffix = text.substr(static_cast<size_t>(rest - text.data()));
  if (suffix.size() == 1) {
    const size_t power = std::string_view("kmgt").find(static_cast<char>(suffix[0] | 0x20));
    if (power == std::string_view::npos) {
      return refuse();
    }
    number *= static_cast<double>(uint64_t{1} << (10 * (power + 1)));
  } else if (!suffix.empty()) {
    return refuse();
  }
  if (number < 1 || number >= 0x1p63) {
    return refuse();
  }
  return static_cast<uint64_t>(number);
}

std::string format_snapshot_list(std::span<const qcow2::Snapshot> snapshots) {
  if (snapshots.empty()) {
    return {};
  }
  constexpr const char *row = "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}\n";
  std::string text = "Snapshot list:\n";
  text += fmt::format(fmt::runtime(row), "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT");
  for (const qcow2::Snapshot &snapshot : snapshots) {
    const std::string icount = snapshot.icount == qcow2::icount_none
                                   ? "--"
                                   : std::to_string(static_cast<int64_t>(snapshot.icount));
    text += fmt::format(fmt::runtime(row), printable(snapshot.id), printable(snapshot.name),
                        format_size(snapshot.vmstate_bytes), format_date(snapshot.date_seconds),
                        format_clock(snapshot.clock_nanos), icount);
  }
  return text;
}

}  // namespace qvmstate::tools
