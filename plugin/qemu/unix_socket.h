// Unix stream sockets that carry JSON lines: connecting, sending whole messages, receiving lines up
// to a bound before a deadline.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

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

/// So many descriptors at most go with one message or are kept by a LineReader.
constexpr size_t passed_descriptors_max = 2;

/// Sends all of `bytes` (with `passed` over SCM_RIGHTS; they stay open here) before the deadline.
Result<void> send_all(int socket, std::string_view bytes, Clock::time_point deadline,
                      std::span<const int> passed = {});

/// Takes lines out of a stream of bytes. Threads: one at a time.
class LineReader {
 public:
  enum class Descriptors { refused, taken };
  /// Descriptors that the peer passes are closed at once, unless they are to be taken.
  LineReader(int socket, size_t line_bytes_max, Descriptors passed = Descriptors::refused)
      : socket_(socket), max_(line_bytes_max), passed_(passed) {}
  /// The next line without its end. End of stream is ErrorCode::peer "closed the connection", a
  /// passed deadline ErrorCode::peer "gave no answer in time".
  Result<std::string> next(Clock::time_point deadline);
  /// Those that came with the bytes received so far, up to passed_descriptors_max, in the order
  /// of the sender.
  std::vector<Descriptor> take_descriptors() { return std::exchange(descriptors_, {}); }

 private:
  ssize_t receive(std::span<char> to);

  int socket_;
  size_t max_;
  std::string pending_;
  Descriptors passed_;
  std::vector<Descriptor> descriptors_;
  size_t searched_ = 0;
};

}  // namespace qvmstate::qemu
