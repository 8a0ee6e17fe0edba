// Write protection of memory of this process: who writes to a protected page, QEMU's vCPUs or the
// kernel for it, waits until the page is released.
//
// By userfaultfd, which Linux offers for private anonymous memory since 5.7, and with pages that
// were never touched since 6.4 (man 2 ioctl_userfaultfd). It tells as well of memory that is taken
// away (madvise MADV_DONTNEED, as a balloon does), which does not wait.
//
// Threads: release() from any; the others one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "plugin/qemu/descriptor.h"
#include "plugin/qemu/userfaultfd.h"
#include "qcow2/io/result.h"

namespace qvmstate::qemu {

class WriteProtection {
 public:
  /// Refuses where the kernel does not allow it.
  static Result<WriteProtection> open();

  /// All of the ranges, by several threads, while another one reads the events.
  Result<void> protect(std::span<const MemoryRange> ranges);
  /// Writes go on, those that wait included. False: not before the events so far are read.
  Result<bool> release(const MemoryRange &range);

  struct Event {
    enum class Kind { write, removal } kind;
    MemoryRange range;  ///< of a write the page
  };
  /// Becomes readable when there is an event.
  int descriptor() const { return descriptor_.get(); }
  /// nullopt: none now.
  Result<std::optional<Event>> next_event();

  /// Releases everything.
  void end() { descriptor_.reset(); }

 private:
  explicit WriteProtection(Descriptor descriptor) : descriptor_(std::move(descriptor)) {}

  Descriptor descriptor_;
};

}  // namespace qvmstate::qemu
