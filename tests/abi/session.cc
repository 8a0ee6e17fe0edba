#include "abi/session.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstdio>

#include "abi/check.h"

namespace unicorn_host {
namespace {

void log_line(void *, int level, const char *line) {
  std::fprintf(stderr, "%s: %s\n", level == QVMSTATE_LOG_WARNING ? "warning" : "info", line);
}

int open_file(const std::string &path, int flags) {
  const int descriptor = ::open(path.c_str(), flags | O_CLOEXEC);
  if (descriptor < 0) {
    die(path + ": cannot be opened");
  }
  return descriptor;
}

}  // namespace

std::optional<Failure> Session::open(const ImageOptions &options) {
  qvmstate_session_options given = {};
  given.size = sizeof given;
  given.flags = options.writable ? QVMSTATE_SESSION_WRITE : 0;
  given.log = log_line;
  int descriptors[2] = {-1, -1};
  if (options.by_descriptors) {
    descriptors[0] = open_file(options.path, O_RDWR);
    descriptors[1] = open_file(options.path, O_RDWR | O_DIRECT);
    given.fds = descriptors;
    given.fd_count = 2;
  } else {
    given.path = options.path.c_str();
  }
  qvmstate_error error;
  const int code = api_.session_open(&given, &session_, &error);
  for (const int descriptor : descriptors) {
    if (descriptor >= 0) {
      ::close(descriptor);
    }
  }
  return code == QVMSTATE_OK ? std::nullopt : std::optional(Failure{code, error.message});
}

std::optional<Failure> Session::list(std::string &lines) {
  qvmstate_error error;
  uint64_t count = 0;
  int code = api_.snapshot_count(session_, &count, &error);
  for (uint64_t i = 0; code == QVMSTATE_OK && i < count; ++i) {
    qvmstate_snapshot_info info = {};
    info.size = sizeof info;
    code = api_.snapshot_info(session_, i, &info, &error);
    if (code == QVMSTATE_OK) {
      lines += std::string("snapshot ") + info.id + " " + info.name + " " +
               std::to_string(info.vmstate_bytes) + " " + std::to_string(info.vm_clock_ns) + "\n";
    }
  }
  return code == QVMSTATE_OK ? std::nullopt : std::optional(Failure{code, error.message});
}

std::optional<Failure> Session::remove(const std::string &snapshot) {
  qvmstate_error error;
  const int code = api_.snapshot_delete(session_, snapshot.c_str(), &error);
  return code == QVMSTATE_OK ? std::nullopt : std::optional(Failure{code, error.message});
}

}  // namespace unicorn_host
