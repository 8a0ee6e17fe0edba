#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "plugin/qemu/control.h"
#include "plugin/qemu/save_target.h"

namespace qvmstate::qemu {
namespace {

constexpr size_t answer_bytes_max = 1 << 20;  // a report has a line for each disk and warning
constexpr std::chrono::milliseconds look_interval{100};
/// The plugin reports several times a second while it writes; a flush may take long.
constexpr std::chrono::seconds silence_limit{120};

/// The phase names are constants, so that Progress can point at them.
const char *phase_name(const std::string &name) {
  for (const char *phase : {"looking", "stopped", "writing", "committing", "resuming"}) {
    if (name == phase) {
      return phase;
    }
  }
  return "";
}

/// A relative path means the client's folder, not the one that QEMU was started in.
Result<std::string> with_absolute_path(const std::string &to) {
  QV_ASSIGN(const SaveTarget target, parse_save_target(to));
  if (target.kind != SaveTarget::Kind::path || target.path.starts_with('/')) {
    return to;
  }
  const std::unique_ptr<char, void (*)(void *)> folder(::get_current_dir_name(), std::free);
  if (!folder) {
    return fail_errno(errno, "'" + to + "': asking for the working directory");
  }
  return "file:" + std::string(folder.get()) + "/" + to.substr(std::strlen("file:"));
}

Result<void> send_request(const Descriptor &socket, const SaveOptions &options,
                          const std::string &shown) {
  Json arguments = to_json(options);
  if (!options.to.empty()) {
    QV_ASSIGN(arguments["to"], with_absolute_path(options.to));
  }
  const Json request = {{"execute", "save"}, {"arguments", arguments}};
  std::vector<int> passed;
  if (options.fd >= 0 || options.direct_fd >= 0) {
    passed = {options.fd, options.direct_fd};
  }
  if (auto sent =
          send_all(socket.get(), to_line(request) + "\n", Clock::now() + silence_limit, passed);
      !sent) {
    return tl::unexpected(with_context(sent.error(), shown + ": the plugin"));
  }
  return {};
}

}  // namespace

Result<SaveReport> save_by_control(const std::string &control_path, const SaveOptions &options,
                                   const Observer &observer) {
  const std::string shown = "control socket '" + control_path + "'";
  const GivenDescriptors given(options);
  QV_TRY(given.check());
  QV_ASSIGN(const Descriptor socket, connect_unix(control_path, "control socket"));
  QV_TRY(send_request(socket, options, shown));
  LineReader reader(socket.get(), answer_bytes_max);
  auto heard = Clock::now();
  for (bool asked_to_stop = false;;) {
    auto line = reader.next(Clock::now() + look_interval);
    if (!line && line.error().sys_errno == ETIMEDOUT && Clock::now() - heard < silence_limit) {
      if (!asked_to_stop && observer.cancelled != nullptr && observer.cancelled->load()) {
        // Half closed: the plugin sees the hang-up, and its last words still arrive.
        ::shutdown(socket.get(), SHUT_WR);
        asked_to_stop = true;
      }
      continue;
    }
    if (!line) {
      return tl::unexpected(with_context(line.error(), shown + ": the plugin"));
    }
    heard = Clock::now();
    const Json message = parse_json(*line);
    if (text_at(message, "event") == "progress") {
      if (observer.progress) {
        observer.progress({phase_name(text_at(message, "phase")), number_at(message, "ram-done"),
                           number_at(message, "ram-total"), number_at(message, "written"),
                           real_at(message, "seconds")});
      }
      if (!asked_to_stop && observer.cancelled != nullptr && observer.cancelled->load()) {
        ::shutdown(socket.get(), SHUT_WR);
        asked_to_stop = true;
      }
    } else if (text_at(message, "event") == "warning") {
      if (observer.warning) {
        observer.warning(text_at(message, "message"));
      }
    } else if (const Json &value = at(message, "return"); value.is_object()) {
      return save_report_from(value);
    } else if (const Json &error = at(message, "error"); error.is_object()) {
      return tl::unexpected(error_from(error));
    } else {
      return fail(ErrorCode::peer,
                  shown + ": an answer that is none; is this the control= socket?");
    }
  }
}

}  // namespace qvmstate::qemu
