// See progress.h.
#include "tools/progress.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <string_view>

#include "tools/format.h"
#include "tools/output.h"

namespace qvmstate::tools {

namespace {

constexpr std::chrono::milliseconds interval(100);
constexpr size_t bar_width_max = 40;
constexpr size_t bar_width_min = 5;
constexpr size_t columns_default = 80;

size_t terminal_columns() {
  struct winsize size = {};
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) {
    return columns_default;
  }
  return size.ws_col;
}

/// Whether a write of less than PIPE_BUF bytes would be taken at once.
bool takes_now(int descriptor) {
  struct pollfd poll_one = {descriptor, POLLOUT, 0};
  return poll(&poll_one, 1, 0) == 1 && (poll_one.revents & POLLOUT) != 0;
}

}  // namespace

std::string format_progress(const qemu::Progress &now, const qemu::Progress &since,
                            size_t columns) {
  std::string line = now.phase;
  if (now.ram_bytes_total != 0) {
    const double part = std::min(
        1.0, static_cast<double>(now.ram_bytes_done) / static_cast<double>(now.ram_bytes_total));
    const double seconds = now.seconds - since.seconds;
    std::string tail = fmt::format(" {:3.0f}%", std::floor(part * 100));
    if (seconds > 0 && now.bytes_written > since.bytes_written) {
      tail += "  " + format_rate(now.bytes_written - since.bytes_written, seconds);
    }
    if (seconds > 0 && now.ram_bytes_done > since.ram_bytes_done &&
        now.ram_bytes_done < now.ram_bytes_total) {
      const double left = seconds * static_cast<double>(now.ram_bytes_total - now.ram_bytes_done) /
                          static_cast<double>(now.ram_bytes_done - since.ram_bytes_done);
      tail += "  " + format_seconds(left) + " left";
    }
    const size_t taken = line.size() + 3 + tail.size();  // 3: " [" and "]"
    if (columns >= taken + bar_width_min) {
      const size_t width = std::min(bar_width_max, columns - taken);
      const size_t filled = static_cast<size_t>(part * static_cast<double>(width));
      line += " [" + std::string(filled, '=') + std::string(width - filled, ' ') + "]";
    }
    line += tail;
  }
  return line.substr(0, columns);
}

void ProgressReporter::update(const qemu::Progress &now) {
  if (style_ == ProgressStyle::none) {
    return;
  }
  const bool new_phase = !since_ || std::string_view(since_->phase) != now.phase;
  const auto time = std::chrono::steady_clock::now();
  if (!new_phase && time - last_ < interval) {
    return;
  }
  last_ = time;
  if (new_phase) {
    since_ = now;
  }
  if (style_ == ProgressStyle::json) {
    if (takes_now(STDOUT_FILENO)) {
      // A reader that went away is noticed when the last event is written.
      (void)write_stdout(to_line({{"event", "progress"},
                                  {"phase", now.phase},
                                  {"ram-bytes-done", now.ram_bytes_done},
                                  {"ram-bytes-total", now.ram_bytes_total},
                                  {"bytes-written", now.bytes_written},
                                  {"seconds", now.seconds}}));
    }
  } else if (takes_now(STDERR_FILENO)) {
    // One column stays free: some terminals wrap when the last one is filled.
    write_stderr("\r" + format_progress(now, *since_, terminal_columns() - 1) + "\x1b[K");
    shown_ = true;
  }
}

void ProgressReporter::clear() {
  if (shown_) {
    write_stderr("\r\x1b[K");
    shown_ = false;
  }
}

}  // namespace qvmstate::tools
