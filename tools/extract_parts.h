// What the kinds of extract share: where bytes go, how far it is, what came out.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "qcow2/io/file.h"
#include "qcow2/io/result.h"
#include "tools/commands.h"
#include "tools/progress.h"
#include "tools/state_source.h"

namespace qvmstate::tools {

struct Extracted {
  const char *layout = "";  ///< of RAM in the state; empty: of a disk
  uint64_t bytes = 0;
  uint64_t data_bytes = 0;  ///< the rest is zeros
};

/// Whether to go on, and the line on the terminal that says how far it is.
///
/// Threads: one.
class Advance {
 public:
  /// `cancelled` may be null.
  Advance(ProgressStyle style, const std::atomic<bool> *cancelled)
      : progress_(style), cancelled_(cancelled) {}
  ~Advance() { progress_.clear(); }
  Advance(const Advance &) = delete;
  Advance &operator=(const Advance &) = delete;

  void expect(uint64_t bytes) { total_bytes_ = bytes; }
  /// `cancelled` if somebody said so.
  Result<void> tell(uint64_t bytes_done, uint64_t bytes_written);
  const std::atomic<bool> *cancelled() const { return cancelled_; }

 private:
  ProgressReporter progress_;
  const std::atomic<bool> *cancelled_;
  uint64_t total_bytes_ = 0;
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

io::OpenOptions open_options(const ExtractCommand &command);

/// The kinds that are RAM: block, raw, elf.
Result<Extracted> extract_ram(const ExtractCommand &command, StateSource &state, Advance &advance);
/// The bytes of the stream itself.
Result<Extracted> extract_stream(const ExtractCommand &command, StateSource &state,
                                 Advance &advance);
/// The device sections as JSON.
Result<Extracted> extract_devices(const ExtractCommand &command, StateSource &state,
                                  Advance &advance);
/// The disk of the snapshot, which need not have a VM state.
Result<Extracted> extract_disk(const ExtractCommand &command, Advance &advance);

}  // namespace qvmstate::tools
