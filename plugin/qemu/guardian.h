// The process that brings the guest back when the saver dies.
//
// Forked before the guest is stopped. It holds a duplicate of the QMP connection and the read end
// of a socket pair; while armed, end of file there means that the saver is gone. It then lets the
// guest run (or be paused, if it was) over that same connection, or over a new one if that is lost,
// again and again while the killed saver's last transfers hold the image locks. It keeps out of the
// saver's session and ignores the signals that end it.
//
// Call from a process with one thread.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "plugin/qemu/block_nodes.h"
#include "plugin/qemu/descriptor.h"
#include "plugin/qemu/qmp.h"
#include "qcow2/io/result.h"

namespace qvmstate::qemu {

class Guardian {
 public:
  static Result<Guardian> start(const Qmp &qmp, const std::string &qmp_path,
                                const std::vector<Disk> &disks, bool was_running);
  Guardian(Guardian &&other) noexcept;
  Guardian &operator=(Guardian &&) = delete;
  /// Disarms.
  ~Guardian();
  /// Lets it go; the guest is back, or was never stopped.
  void disarm();
  /// The saver could not bring the guest back: the guardian goes on trying by itself.
  void hand_over();

 private:
  Guardian(pid_t pid, Descriptor pipe) : pid_(pid), pipe_(std::move(pipe)) {}

  pid_t pid_;
  Descriptor pipe_;
};

}  // namespace qvmstate::qemu
