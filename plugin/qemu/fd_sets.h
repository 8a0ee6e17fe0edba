// QEMU's fd sets: descriptors that a client gave it with the QMP command add-fd, and that QEMU
// calls /dev/fdset/N.
//
// What comes from here are further descriptors of the same open file descriptions, not files opened
// anew: whoever passed them may have had rights that neither QEMU nor this process has.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <vector>

#include "plugin/qemu/descriptor.h"
#include "plugin/qemu/qmp.h"
#include "qcow2/io/result.h"

namespace qvmstate::qemu {

/// For writing a set must hold two descriptors (io::Descriptors::adopt says which); for reading one
/// is enough.
enum class FdSetUse { writing, reading };

/// The descriptors of set `number` of the QEMU at the other end, which is process `pid` (this
/// process, for the plugin; another one gives them by pidfd_getfd, which needs the right to trace
/// it). Errors: not_found (names the sets there are), bad_argument (a wrong number of descriptors),
/// permission, peer.
Result<std::vector<Descriptor>> descriptors_of_fd_set(Qmp &qmp, pid_t pid, uint64_t number,
                                                      FdSetUse use);

}  // namespace qvmstate::qemu
