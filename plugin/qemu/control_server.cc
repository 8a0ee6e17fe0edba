#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>
#include <functional>

#include "plugin/qemu/control.h"

namespace qvmstate::qemu {
namespace {

constexpr size_t request_bytes_max = 64 * 1024;  // a name and a path, at most 4 KiB, and words
constexpr std::chrono::seconds request_limit{10};
constexpr std::chrono::seconds answer_limit{5};

/// Whether the client hung up: end of file, or an error, on a socket it should send no more on.
bool has_hung_up(int client) {
  pollfd waiting = {client, POLLIN | POLLRDHUP, 0};
  if (::poll(&waiting, 1, 0) <= 0) {
    return false;
  }
  char byte;
  return (waiting.revents & (POLLHUP | POLLERR | POLLRDHUP)) != 0 ||
         ::recv(client, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0;
}

/// Whoever can rename files in the socket's folder can put a socket of his own into its place.
Result<void> check_folder(const std::string &path, const std::string &shown) {
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  struct stat status;
  if (::stat(folder.c_str(), &status) != 0) {
    return fail_errno(errno, shown + ": its folder");
  }
  const bool others_write = (status.st_mode & (S_IWGRP | S_IWOTH)) != 0;
  if ((status.st_uid != 0 && status.st_uid != ::geteuid()) ||
      (others_write && (status.st_mode & S_ISVTX) == 0)) {
    return fail(ErrorCode::permission, shown +
                                           ": other users can replace files in that folder; put it "
                                           "into one that belongs to QEMU's user and that only he "
                                           "can write");
  }
  return {};
}

/// One answer; false if the client cannot be reached any more.
bool answer(int client, const Json &message) {
  return send_all(client, to_line(message) + "\n", Clock::now() + answer_limit).has_value();
}

}  // namespace

Result<ControlServer> ControlServer::listen(const std::string &path) {
  const std::string shown = "control socket '" + path + "'";
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path) {
    return fail(ErrorCode::bad_argument,
                shown + ": a socket path has 1 to 107 bytes; use a shorter one");
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  QV_TRY(check_folder(path, shown));
  struct stat status;
  if (::lstat(path.c_str(), &status) == 0) {
    if (!S_ISSOCK(status.st_mode)) {
      return fail(ErrorCode::exists, shown + ": a file that is no socket is there; remove it");
    }
    const auto other = connect_unix(path, "control socket");
    if (other || other.error().sys_errno != ECONNREFUSED) {
      return fail(ErrorCode::exists,
                  shown + ": another process listens there; choose another path");
    }
    if (::unlink(path.c_str()) != 0) {
      return fail_errno(errno, shown + ": removing the stale socket");
    }
  }
  Descriptor socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!socket) {
    return fail_errno(errno, shown + ": creating it");
  }
  // bind() gives the file the mode of the socket's inode less the umask; set before, nobody can
  // connect in between, and the umask, which belongs to all threads, stays as it is.
  if (::fchmod(socket.get(), S_IRUSR | S_IWUSR) != 0 ||
      ::bind(socket.get(), reinterpret_cast<sockaddr *>(&address), sizeof address) != 0 ||
      ::chmod(path.c_str(), S_IRUSR | S_IWUSR) != 0 || ::listen(socket.get(), 4) != 0) {
    return fail_errno(errno, shown + ": listening");
  }
  return ControlServer(std::move(socket));
}

void ControlServer::serve(const ControlOperations &operations, int wake,
                          const std::atomic<bool> &end) {
  while (!end) {
    pollfd waiting[2] = {{socket_.get(), POLLIN, 0}, {wake, POLLIN, 0}};
    if (::poll(waiting, 2, -1) < 0 && errno != EINTR) {
      return;
    }
    if ((waiting[0].revents & POLLIN) == 0) {
      continue;
    }
    const Descriptor client(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (client) {
      serve_client(client, operations, end);
    }
  }
}

void ControlServer::serve_client(const Descriptor &client, const ControlOperations &operations,
                                 const std::atomic<bool> &end) {
  auto refuse = [&](const Error &error) { answer(client.get(), {{"error", to_json(error)}}); };
  const auto peer = peer_of(client.get());
  if (!peer || (peer->uid != 0 && peer->uid != ::geteuid())) {
    refuse({ErrorCode::permission, 0, "only root and QEMU's own user may use the control socket"});
    return;
  }
  LineReader reader(client.get(), request_bytes_max, LineReader::Descriptors::taken);
  while (!end) {
    const auto line = reader.next(Clock::now() + request_limit);
    if (!line) {
      return;
    }
    const Json request = parse_json(*line);
    const Json &arguments = at(request, "arguments");
    if (!request.is_object() || !at(request, "execute").is_string() ||
        !(arguments.is_object() || arguments.is_discarded())) {
      refuse({ErrorCode::bad_argument, 0, "a request is {\"execute\":...,\"arguments\":{...}}"});
      return;
    }
    std::atomic<bool> cancelled = false;
    Observer observer;
    observer.cancelled = &cancelled;
    observer.progress = [&](const Progress &progress) {
      const bool there = answer(client.get(), {{"event", "progress"},
                                               {"phase", progress.phase},
                                               {"ram-done", progress.ram_bytes_done},
                                               {"ram-total", progress.ram_bytes_total},
                                               {"written", progress.bytes_written},
                                               {"seconds", progress.seconds}});
      if (!there || end || has_hung_up(client.get())) {
        cancelled = true;
      }
    };
    observer.warning = [&](const std::string &warning) {
      answer(client.get(), {{"event", "warning"}, {"message", warning}});
    };
    const std::string command = text_at(request, "execute");
    if (command == "version") {
      answer(client.get(), {{"return", {{"version", QVMSTATE_VERSION}}}});
    } else if (command == "save") {
      auto options = save_options_from(arguments.is_object() ? arguments : Json::object(),
                                       reader.take_descriptors());
      auto report = options ? operations.save(*options, observer)
                            : Result<SaveReport>(tl::unexpected(options.error()));
      report ? (void)answer(client.get(), {{"return", to_json(*report)}}) : refuse(report.error());
    } else if (command == "delete") {
      auto report = operations.remove(text_at(arguments, "name"), observer);
      report ? (void)answer(client.get(), {{"return",
                                            {{"name", report->name},
                                             {"pause-seconds", report->pause_seconds},
                                             {"warnings", report->warnings}}}})
             : refuse(report.error());
    } else {
      refuse({ErrorCode::bad_argument, 0,
              "no command '" + command + "'; there are save, delete and version"});
    }
  }
}

}  // namespace qvmstate::qemu
