#include "plugin/qemu/unix_socket.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstring>

namespace qvmstate::qemu {
namespace {

constexpr size_t control_bytes_max = CMSG_SPACE(passed_descriptors_max * sizeof(int));

/// False: the deadline passed.
Result<bool> wait_for(int socket, short events, Clock::time_point deadline) {
  for (;;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
    pollfd waiting = {socket, events, 0};
    const int ready =
        ::poll(&waiting, 1, static_cast<int>(std::clamp<int64_t>(left, 0, 1'000'000)));
    if (ready > 0) {
      return true;
    }
    if (ready == 0) {
      return false;
    }
    if (errno != EINTR) {
      return fail_errno(errno, "waiting for a socket");
    }
  }
}

}  // namespace

Result<Descriptor> connect_unix(const std::string &path, std::string_view what) {
  const std::string shown = std::string(what) + " '" + path + "'";
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path) {
    return fail(ErrorCode::bad_argument,
                shown + ": a socket path has 1 to 107 bytes; use a shorter one (a symlink works)");
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  Descriptor socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!socket) {
    return fail_errno(errno, "creating a socket");
  }
  if (::connect(socket.get(), reinterpret_cast<sockaddr *>(&address), sizeof address) != 0) {
    const int error = errno;
    if (error == ECONNREFUSED) {
      return fail(ErrorCode::peer, shown + ": nobody listens there (has QEMU ended?)", error);
    }
    return fail_errno(error, shown + ": connecting");
  }
  return socket;
}

Result<Peer> peer_of(int socket) {
  ucred credentials = {};
  socklen_t bytes = sizeof credentials;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &bytes) != 0) {
    return fail_errno(errno, "asking who is at the other end of a socket");
  }
  return Peer{credentials.pid, credentials.uid};
}

Result<void> send_all(int socket, std::string_view bytes, Clock::time_point deadline,
                      std::span<const int> passed) {
  assert(passed.size() <= passed_descriptors_max);
  while (!bytes.empty()) {
    iovec data = {const_cast<char *>(bytes.data()), bytes.size()};
    msghdr message = {};
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    alignas(cmsghdr) char control[control_bytes_max] = {};
    if (!passed.empty()) {
      message.msg_control = control;
      message.msg_controllen = CMSG_SPACE(passed.size_bytes());
      cmsghdr *header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(passed.size_bytes());
      std::memcpy(CMSG_DATA(header), passed.data(), passed.size_bytes());
    }
    const ssize_t sent = ::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent > 0) {
      bytes.remove_prefix(static_cast<size_t>(sent));
      passed = {};
    } else if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      QV_ASSIGN(const bool ready, wait_for(socket, POLLOUT, deadline));
      if (!ready) {
        return fail(ErrorCode::peer, "takes no more data");
      }
    } else if (sent < 0 && errno != EINTR) {
      return fail(ErrorCode::peer, std::string("closed the connection: ") + std::strerror(errno),
                  errno);
    }
  }
  return {};
}

/// recv() that keeps the descriptors that come along.
ssize_t LineReader::receive(std::span<char> to) {
  if (passed_ == Descriptors::refused) {
    return ::recv(socket_, to.data(), to.size(), MSG_DONTWAIT);
  }
  iovec data = {to.data(), to.size()};
  alignas(cmsghdr) char control[control_bytes_max] = {};
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t received = ::recvmsg(socket_, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  for (cmsghdr *header = received < 0 ? nullptr : CMSG_FIRSTHDR(&message); header != nullptr;
       header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) {
      continue;
    }
    const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int number = -1;
      std::memcpy(&number, CMSG_DATA(header) + i * sizeof(int), sizeof number);
      Descriptor descriptor(number);
      if (descriptors_.size() < passed_descriptors_max) {
        descriptors_.push_back(std::move(descriptor));
      }
    }
  }
  return received;
}

Result<std::string> LineReader::next(Clock::time_point deadline) {
  for (;;) {
    const size_t end = pending_.find('\n', searched_);
    if (end != std::string::npos) {
      std::string line = pending_.substr(0, end);
      pending_.erase(0, end + 1);
      searched_ = 0;
      if (!line.empty() && line.back() == '\r') {
        line.pop_back();
      }
      return line;
    }
    searched_ = pending_.size();
    if (pending_.size() > max_) {
      return fail(ErrorCode::peer,
                  "sent a message of more than " + std::to_string(max_) + " bytes");
    }
    QV_ASSIGN(const bool ready, wait_for(socket_, POLLIN, deadline));
    if (!ready) {
      return fail(ErrorCode::peer, "gave no answer in time", ETIMEDOUT);
    }
    char buffer[16384];
    const ssize_t received = receive(buffer);
    if (received > 0) {
      pending_.append(buffer, static_cast<size_t>(received));
    } else if (received == 0) {
      return fail(ErrorCode::peer, "closed the connection", ECONNRESET);
    } else if (errno != EINTR && errno != EAGAIN) {
      return fail(ErrorCode::peer, std::string("closed the connection: ") + std::strerror(errno),
                  errno);
    }
  }
}

}  // namespace qvmstate::qemu
