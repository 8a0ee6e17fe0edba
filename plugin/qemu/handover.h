// Taking the disk images of a running QEMU, and giving them back.
//
// mark    says what was going on, should we die (marks.h)
// stop    the guest stands; QEMU keeps its locks
// take    xen-save-devices-state into the mark's file: the device state, and, as the VM is
//         stopped, every block node inactive and its write locks dropped. Its return value does not
//         prove that; the lock bytes (and from 10.0 on the nodes) do. Never called twice while
//         inactive: 7.2 aborts.
// give_back   `cont`, or for a VM that was paused: activation without running. QEMU reads the qcow2
//             metadata anew and takes its locks back. Also done by the destructor.
//
// Threads: one at a time.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "plugin/qemu/block_nodes.h"
#include "plugin/qemu/marks.h"
#include "plugin/qemu/qmp.h"
#include "qcow2/image.h"
#include "qcow2/io/file.h"
#include "qcow2/io/result.h"
#include "qcow2/locks.h"

namespace qvmstate::qemu {

/// Makes the images QEMU's again and lets the guest run, or not. Tries again for `patience` while
/// somebody (the I/O of a killed saver) still holds a lock.
Result<void> bring_back(Qmp &qmp, const std::vector<Disk> &disks, bool run, bool can_set_active,
                        milliseconds patience);

/// Whether this QEMU has blockdev-set-active (10.0).
bool can_set_active(const Qmp &qmp);

/// What becomes of the images between stop and give_back.
enum class HandoverKind {
  images,        ///< they are ours
  device_state,  ///< QEMU keeps them; only the device state is taken
};

class Handover {
 public:
  Handover(Qmp &qmp, const std::vector<Disk> &disks, bool was_running, HandoverKind kind)
      : qmp_(qmp), disks_(disks), was_running_(was_running), kind_(kind) {}
  ~Handover();
  Handover(const Handover &) = delete;
  Handover &operator=(const Handover &) = delete;

  /// `own_marks`: that this operation has left already.
  Result<void> mark(const std::string &what, unsigned own_marks = 0);
  Result<void> stop();
  Result<void> take();
  Result<void> give_back();

  /// Device state, after take().
  std::span<const std::byte> device_bytes() const { return device_bytes_; }

 private:
  Result<void> map_device_bytes();

  Qmp &qmp_;
  const std::vector<Disk> &disks_;
  bool was_running_;
  HandoverKind kind_;
  std::optional<Mark> mark_;
  bool stopped_ = false;
  bool taken_ = false;
  std::span<const std::byte> device_bytes_;
};

/// Further Files over one image, each for a thread of its own.
struct ImageChannels {
  size_t disk = 0;
  unsigned count = 0;
  unsigned depth = 0;
};

/// The images while they are ours: open for writing, locked, read.
class OwnedImages {
 public:
  static Result<OwnedImages> open(const std::vector<Disk> &disks, const io::OpenOptions &options,
                                  const ImageChannels &channels = {});
  const std::vector<qcow2::Image *> &images() const { return pointers_; }
  io::File &file(size_t index) { return *files_[index]; }
  const std::vector<std::unique_ptr<io::File>> &channels() const { return channels_; }

 private:
  std::vector<std::unique_ptr<io::File>> files_;
  std::vector<std::unique_ptr<io::File>> channels_;
  std::vector<qcow2::ImageLock> locks_;
  std::vector<std::unique_ptr<qcow2::Image>> images_;
  std::vector<qcow2::Image *> pointers_;
};

/// The images while they are QEMU's: open for reading, without locks. What is read may be torn;
/// good enough to refuse early.
class WatchedImages {
 public:
  /// `direct`: on, to refuse early where it cannot be had.
  static Result<WatchedImages> open(const std::vector<Disk> &disks,
                                    io::DirectMode direct = io::DirectMode::off);
  const std::vector<qcow2::Image *> &images() const { return pointers_; }

 private:
  std::vector<std::unique_ptr<io::File>> files_;
  std::vector<std::unique_ptr<qcow2::Image>> images_;
  std::vector<qcow2::Image *> pointers_;
};

}  // namespace qvmstate::qemu
