#include <sys/socket.h>
#include <cerrno>

#include "plugin/qemu/control.h"

namespace qvmstate::qemu {
namespace {

constexpr size_t answer_bytes_max = 16 << 20;
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

}  // namespace

Result<SaveReport> save_by_control(const std::string &control_path, const SaveOptions &options,
                                   const Observer &observer) {
  const std::string shown = "control socket '" + control_path + "'";
  QV_ASSIGN(const Descriptor socket, connect_unix(control_path, "control socket"));
  const Json request = {{"execute", "save"}, {"arguments", to_json(options)}};
  if (auto sent = send_all(socket.get(), to_line(request) + "\n", Clock::now() + silence_limit);
      !sent) {
    return tl::unexpected(with_context(sent.error(), shown + ": the plugin"));
  }
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
    const Json message = Json::parse(*line, nullptr, false);
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
