// Shows how far a save is: one line redrawn on a terminal (stderr), or JSON lines on stdout.
//
// The guest may be standing still while this is called, so nothing here waits: when the terminal is
// held (Ctrl-S) or the reader of the pipe is slow, that step is left out.
//
// Threads: one.
#pragma once

#include <chrono>
#include <optional>
#include <string>

#include "plugin/qemu/operations.h"

namespace qvmstate::tools {

enum class ProgressStyle { none, line, json };

/// At most `columns` wide: phase, bar, percent, rate, time left. `since` is the first report of the
/// same phase: rate and time left are averages from there on.
std::string format_progress(const qemu::Progress &now, const qemu::Progress &since, size_t columns);

class ProgressReporter {
 public:
  explicit ProgressReporter(ProgressStyle style) : style_(style) {}
  void update(const qemu::Progress &now);
  /// Takes the line off the terminal.
  void clear();

 private:
  ProgressStyle style_;
  bool shown_ = false;
  std::optional<qemu::Progress> since_;
  std::chrono::steady_clock::time_point last_;
};

}  // namespace qvmstate::tools
