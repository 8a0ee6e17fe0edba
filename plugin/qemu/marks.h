// The mark that an operation leaves in QEMU while the guest stands for it: a file without a name in
// an fd set, whose words say whether the guest ran. It outlives a saver that was killed, and
// `resume` reads it.
//
// While the operation lives it holds a writer's image lock (qcow2/locks.h) on that file. So others
// tell an operation that is going on, which is to be left alone, from one that was interrupted. An
// operation marks first and then looks for other marks: of two that begin together both may refuse,
// never both go on. Who may not look into QEMU's process, and so cannot ask for the lock, cannot
// tell the two apart; he is refused.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plugin/qemu/descriptor.h"
#include "plugin/qemu/qmp.h"
#include "qcow2/io/result.h"
#include "qcow2/locks.h"

namespace qvmstate::qemu {

/// The mark of this operation.
class Mark {
 public:
  /// `what` is for people who look at QEMU's fd sets. Refuses if another operation is going on, or
  /// may be: one of more marks than the `own` that this one has left.
  static Result<Mark> leave(Qmp &qmp, bool was_running, const std::string &what, unsigned own = 0);

  /// The file, empty at first, open for reading and writing here, for writing in QEMU.
  int file() const { return file_.get(); }
  /// The file as QEMU opens it.
  std::string qemu_path() const { return "/dev/fdset/" + std::to_string(fdset_); }
  /// The operation is over: the mark looks like an interrupted one's, until it is removed.
  void unlock() { lock_.release(); }

 private:
  Descriptor file_;
  qcow2::ImageLock lock_;
  uint64_t fdset_ = 0;
};

/// What the marks in this QEMU say.
struct Marks {
  std::vector<uint64_t> interrupted;  ///< fd sets
  bool was_running = false;           ///< before one of the interrupted operations
  unsigned going_on = 0;
  std::string cannot_tell;  ///< why not, of a mark that may be of either kind
};
Result<Marks> find_marks(Qmp &qmp);
/// Refuses while another operation is going on, or may be.
Result<void> check_none_going_on(Qmp &qmp);
/// Removes those of interrupted operations. To call when the guest is as it was.
void forget_marks(Qmp &qmp);

}  // namespace qvmstate::qemu
