// Unix stream sockets that carry JSON lines: connecting, sending whole messages, receiving lines up
// to a bound before a deadline.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <string>
#include <string_view>

#include "plugin/qemu/descriptor.h"
#include "qcow2/io/result.h"

namespace qvmstate::qemu {

using Clock = std::chrono::steady_clock;

/// Connects to the socket at `path`. `what` names the peer in errors ("QMP socket").
Result<Descriptor> connect_unix(const std::string &path, std::string_view what);

struct Peer {
  pid_t pid = 0;  ///< 0 if it lives in a PID namespace that we do not see
  uid_t uid = 0;
};
Result<Peer> peer_of(int socket);

/// Sends all of `bytes` (with `passed_descriptor` over SCM_RIGHTS, unless -1) before the deadline.
Result<void> send_all(int socket, std::string_view bytes, Clock::time_point deadline,
                      int passed_descriptor = -1);

/// Takes lines out of a stream of bytes. Threads: one at a time.
class LineReader {
 public:
  LineReader(int socket, size_t line_bytes_max) : socket_(socket), max_(line_bytes_max) {}
  /// The next line without its end. End of stream is ErrorCode::peer "closed the connection", a
  /// passed deadline ErrorCode::peer "gave no answer in time".
  Result<std::string> next(Clock::time_point deadline);

 private:
  int socket_;
  size_t max_;
  std::string pending_;
  size_t searched_ = 0;
};

}  // namespace qvmstate::qemu
