// Which disks of a running QEMU take part in a snapshot, in the order in which loadvm visits them,
// and the file behind each.
//
// loadvm visits the block backends in creation order, then nodes that nothing uses; of these it
// takes what is inserted and writable. Each must be a qcow2 node directly on a file or block
// device. The first is the one that must hold the vmstate.
//
// The file is found among QEMU's own descriptors, by device and inode of its name in QEMU's view.
// A name that does not resolve any more (a relative one after -daemonize) is refused: dropping its
// write permission makes QEMU open the name again, which fails, and leaves images half released
// (seen in 7.2, 10.0 and 11.1).
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "plugin/qemu/descriptor.h"
#include "plugin/qemu/qmp.h"
#include "qcow2/io/result.h"

namespace qvmstate::qemu {

struct Disk {
  std::string node;         ///< of the qcow2 layer
  std::string device;       ///< what the guest has it as, for messages
  std::string file;         ///< QEMU's name
  Descriptor image;         ///< our own, read-write, without locks
  bool active = true;       ///< always true before 10.0, which does not tell
  bool page_cache = false;  ///< QEMU reads and writes through it
  bool has_bitmaps = false;
  std::string persistent_bitmap;  ///< the name of one; empty: there is none
};

/// "disk 'NODE' (DEVICE, FILE)"
std::string describe(const Disk &disk);

/// Refuses, by name, what cannot take part. Never empty.
Result<std::vector<Disk>> find_disks(Qmp &qmp, pid_t pid);

/// What a qcow2 protocol name of QEMU says as a path: without "file:" or "host_device:", out of
/// "json:{...}". Empty if it names no path.
std::string path_of_node_name(const std::string &name);

enum class Holder {
  running,   ///< QEMU holds bytes 100, 101 and 201 at least
  inactive,  ///< none of 101, 103, 201, 203 is held
  other,     ///< something in between
};
Result<Holder> holder_of(const Disk &disk);

}  // namespace qvmstate::qemu
