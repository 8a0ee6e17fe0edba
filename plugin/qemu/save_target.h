// Where a save goes when it does not go into the VM's qcow2: the words for it, and opening it.
//
// file:PATH            a plain file, replaced as a whole
// file:PATH,offset=N   a plain file or block device, written in place from N on
// file:/dev/fdset/N    the descriptors that were given to QEMU by add-fd (fd_sets.h); also with
//                      an offset
// fd                   the two descriptors in SaveOptions; also with an offset ("fd,offset=N")
//
// As in QEMU's `migrate file:`, PATH ends at the first ",offset=", other commas are part of it, and
// N is bytes, or with k, M, G, T in powers of 1024 (a fraction allowed), or hexadecimal with 0x.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "plugin/qemu/descriptor.h"
#include "plugin/qemu/operations.h"
#include "plugin/qemu/qmp.h"
#include "qcow2/io/result.h"
#include "qcow2/io/target_file.h"

namespace qvmstate::qemu {

struct SaveTarget {
  enum class Kind { path, fd_set, passed };
  Kind kind = Kind::path;
  std::string path;  ///< of `path`, not empty
  uint64_t fd_set = 0;
  std::optional<uint64_t> offset;
};

/// ErrorCode::bad_argument for words that are none of those above. exec:, tcp: and the other
/// targets of QEMU are refused by name: they cannot seek.
Result<SaveTarget> parse_save_target(const std::string &text);

/// The descriptors in the options, from here on owned: closed when this ends, unless released.
/// Whoever is given SaveOptions makes one first of all: a number that is not open now belongs to
/// whatever this process opens next.
class GivenDescriptors {
 public:
  explicit GivenDescriptors(const SaveOptions &options);
  /// ErrorCode::bad_argument if one was not open.
  Result<void> check() const;
  /// The numbers, which their next owner closes.
  Result<std::vector<int>> release();

 private:
  std::vector<Descriptor> owned_;
  std::optional<int> missing_;
};

/// Opens the target that `options.to` names, with that many channels beside file(). Descriptors of
/// QEMU's fd sets are fetched from process `pid`. Before the guest is stopped: where it works in
/// place (target_file.h), what lies behind the offset is gone from here on.
Result<std::unique_ptr<io::TargetFile>> open_save_target(Qmp &qmp, pid_t pid,
                                                         const SaveOptions &options,
                                                         unsigned channels,
                                                         GivenDescriptors &given);

}  // namespace qvmstate::qemu
