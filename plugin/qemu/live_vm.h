// A running VM as an operation meets it: connected, looked at, nothing changed yet.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "plugin/qemu/block_nodes.h"
#include "plugin/qemu/operations.h"
#include "plugin/qemu/qmp.h"
#include "qcow2/io/result.h"

namespace qvmstate::qemu {

struct LiveVm {
  std::unique_ptr<Qmp> qmp;
  std::string qmp_path;
  pid_t pid = 0;
  bool running = false;
  std::vector<Disk> disks;
  unsigned marks = 0;  ///< that the operation holds itself, besides that of a handover
};

/// Connects, and finds the process behind the socket; refuses while another operation is going on.
Result<LiveVm> connect_vm(const std::string &qmp_path);

/// State, disks and who holds them; refuses what an earlier interrupted save left ("qvmstate
/// resume").
Result<void> look_at(LiveVm &vm);

inline void report_progress(const Observer &observer, const Progress &progress) {
  if (observer.progress) {
    observer.progress(progress);
  }
}

/// ErrorCode::cancelled, if the user said so.
Result<void> check_cancelled(const Observer &observer);

}  // namespace qvmstate::qemu
