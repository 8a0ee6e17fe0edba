// A client of QEMU's machine protocol (QMP) on a unix socket.
//
// One connection serves one client at a time: QEMU answers a second one only when the first hangs
// up, so the greeting has a time limit. Commands are answered in order; events in between are
// skipped; answers whose id is not ours (of a dead process that shared the connection) too.
// Once a command got no answer in time the connection is of no use: later commands fail at once.
//
// Protocol: QEMU docs/interop/qmp-spec. Threads: one at a time.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "plugin/qemu/json.h"
#include "plugin/qemu/unix_socket.h"
#include "qcow2/io/result.h"

namespace qvmstate::qemu {

using std::chrono::milliseconds;

constexpr milliseconds greeting_limit{3000};
constexpr milliseconds command_limit{60'000};  ///< `cont` may wait for slow storage
/// QEMU's longest answer, on all block nodes, has some KiB for each.
constexpr size_t reply_bytes_max = 16 << 20;

class Qmp {
 public:
  /// Connects and negotiates.
  static Result<std::unique_ptr<Qmp>> connect(const std::string &path,
                                              milliseconds greeting = greeting_limit);
  /// Takes over a connection that another process negotiated and may have left in the middle of a
  /// command. `id_prefix` keeps its answers apart from ours.
  static std::unique_ptr<Qmp> adopt(Descriptor socket, std::string id_prefix);

  /// The value of "return". QEMU's refusal is ErrorCode::peer: "QEMU refused 'cont': <its words>".
  Result<Json> execute(const std::string &command, const Json &arguments = Json::object(),
                       milliseconds limit = command_limit, int passed_descriptor = -1);
  /// A command of the human monitor; its output.
  Result<std::string> human(const std::string &line, milliseconds limit = command_limit);

  int socket() const { return socket_.get(); }
  /// Whether the last failure was QEMU's own answer, and not a lost or silent connection.
  bool alive() const { return !broken_; }
  unsigned version_major() const { return major_; }
  unsigned version_minor() const { return minor_; }
  bool is_at_least(unsigned major, unsigned minor) const {
    return major_ > major || (major_ == major && minor_ >= minor);
  }
  const std::string &version() const { return version_; }

 private:
  explicit Qmp(Descriptor socket);

  Descriptor socket_;
  LineReader reader_;
  std::string id_prefix_ = "qvmstate-";
  uint64_t next_id_ = 1;
  bool broken_ = false;
  unsigned major_ = 0;
  unsigned minor_ = 0;
  std::string version_;
};

}  // namespace qvmstate::qemu
