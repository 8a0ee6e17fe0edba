// See output.h.
#include "tools/output.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include "tools/format.h"

namespace qvmstate::tools {

namespace {

const char *code_name(ErrorCode code) {
  switch (code) {
    case ErrorCode::io:
      return "io";
    case ErrorCode::no_space:
      return "no-space";
    case ErrorCode::bad_image:
      return "bad-image";
    case ErrorCode::bad_stream:
      return "bad-stream";
    case ErrorCode::not_supported:
      return "not-supported";
    case ErrorCode::locked:
      return "locked";
    case ErrorCode::exists:
      return "exists";
    case ErrorCode::not_found:
      return "not-found";
    case ErrorCode::bad_argument:
      return "bad-argument";
    case ErrorCode::permission:
      return "permission";
    case ErrorCode::bad_state:
      return "bad-state";
    case ErrorCode::peer:
      return "peer";
    case ErrorCode::cancelled:
      return "cancelled";
  }
  return "unknown";
}

/// 0 or the errno.
int write_all(int descriptor, std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = ::write(descriptor, text.data(), text.size());
    if (written < 0 && errno == EINTR) {
      continue;
    }
    if (written < 0) {
      return errno;
    }
    text.remove_prefix(static_cast<size_t>(written));
  }
  return 0;
}

void say(std::string_view operation, std::string_view message) {
  write_stderr(fmt::format("qvmstate: {}: {}\n", operation, printable(message)));
}

}  // namespace

void guard_standard_descriptors() {
  for (int descriptor = 0; descriptor <= 2; ++descriptor) {
    if (fcntl(descriptor, F_GETFD) < 0 && errno == EBADF) {
      // open() takes the lowest free number, which is this one. The wrong direction on purpose.
      const int opened = open("/dev/null", descriptor == 0 ? O_WRONLY : O_RDONLY);
      if (opened != descriptor && opened >= 0) {
        close(opened);
      }
    }
  }
}

Result<void> write_stdout(std::string_view text) {
  const int error = write_all(STDOUT_FILENO, text);
  if (error != 0) {
    return fail_errno(error, "cannot write to standard output");
  }
  return {};
}

void write_stderr(std::string_view text) {
  (void)write_all(STDERR_FILENO, text);
}

std::string to_line(const Json &json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

int finish(std::string_view operation, std::string_view text) {
  const Result<void> written = write_stdout(text);
  if (!written) {
    say(operation, "the operation is done, but " + written.error().message);
    return exit_failed;
  }
  return exit_done;
}

int report_failure(std::string_view operation, const Error &error, Format format) {
  std::string message = error.message;
  if (error.code == ErrorCode::cancelled && message.find("cancelled") == std::string::npos) {
    message = "cancelled: " + message;
  }
  say(operation, message);
  if (format == Format::json) {
    Json event = {{"event", "failed"},
                  {"operation", operation},
                  {"code", code_name(error.code)},
                  {"message", message}};
    if (error.sys_errno != 0) {
      event["errno"] = error.sys_errno;
    }
    if (const Result<void> written = write_stdout(to_line(event)); !written) {
      say(operation, written.error().message);
    }
  }
  return exit_failed;
}

void report_warning(std::string_view operation, std::string_view message) {
  say(operation, fmt::format("warning: {}", message));
}

}  // namespace qvmstate::tools
