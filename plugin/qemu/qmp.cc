#include "plugin/qemu/qmp.h"

#include <cerrno>

namespace qvmstate::qemu {

Qmp::Qmp(Descriptor socket) : socket_(std::move(socket)), reader_(socket_.get(), reply_bytes_max) {}

Result<std::unique_ptr<Qmp>> Qmp::connect(const std::string &path, milliseconds greeting) {
  QV_ASSIGN(Descriptor socket, connect_unix(path, "QMP socket"));
  std::unique_ptr<Qmp> qmp(new Qmp(std::move(socket)));
  const std::string shown = "QMP socket '" + path + "'";
  auto line = qmp->reader_.next(Clock::now() + greeting);
  if (!line) {
    if (line.error().sys_errno == ETIMEDOUT) {
      return fail(ErrorCode::peer,
                  shown + ": no greeting in " + std::to_string(greeting.count()) +
                      " ms: another client holds it (QEMU serves one client per socket; give it a "
                      "second -qmp), or QEMU hangs");
    }
    return tl::unexpected(with_context(line.error(), shown));
  }
  const Json hello = parse_json(*line);
  const Json &version = at(at(at(hello, "QMP"), "version"), "qemu");
  if (!version.is_object()) {
    return fail(ErrorCode::peer,
                shown +
                    ": the greeting is not QMP's; is this the socket of -qmp? (not of -monitor, "
                    "not a guest agent)");
  }
  qmp->major_ = static_cast<unsigned>(number_at(version, "major"));
  qmp->minor_ = static_cast<unsigned>(number_at(version, "minor"));
  qmp->version_ = std::to_string(qmp->major_) + "." + std::to_string(qmp->minor_) + "." +
                  std::to_string(number_at(version, "micro"));
  if (auto answer = qmp->execute("qmp_capabilities"); !answer) {
    return tl::unexpected(with_context(answer.error(), shown));
  }
  return qmp;
}

std::unique_ptr<Qmp> Qmp::adopt(Descriptor socket, std::string id_prefix) {
  std::unique_ptr<Qmp> qmp(new Qmp(std::move(socket)));
  qmp->id_prefix_ = std::move(id_prefix);
  // 0xff is valid nowhere in JSON: it makes QEMU drop a half-sent command. The error it answers
  // with has no id and is skipped.
  if (!send_all(qmp->socket_.get(), "\xff\n", Clock::now() + command_limit)) {
    qmp->broken_ = true;
  }
  return qmp;
}

Result<Json> Qmp::execute(const std::string &command, const Json &arguments, milliseconds limit,
                          int passed_descriptor) {
  if (broken_) {
    return fail(ErrorCode::peer, "QMP command '" + command + "': the connection to QEMU is lost");
  }
  const auto deadline = Clock::now() + limit;
  const std::string id = id_prefix_ + std::to_string(next_id_++);
  Json request = {{"execute", command}, {"id", id}};
  if (!arguments.empty()) {
    request["arguments"] = arguments;
  }
  const std::span<const int> passed(&passed_descriptor, passed_descriptor >= 0 ? 1 : 0);
  if (auto sent = send_all(socket_.get(), to_line(request) + "\n", deadline, passed); !sent) {
    broken_ = true;
    return tl::unexpected(with_context(sent.error(), "QMP command '" + command + "': QEMU"));
  }
  for (;;) {
    auto line = reader_.next(deadline);
    if (!line) {
      broken_ = true;
      return tl::unexpected(with_context(line.error(), "QMP command '" + command + "': QEMU"));
    }
    const Json reply = parse_json(*line);
    if (!reply.is_object()) {
      broken_ = true;
      return fail(ErrorCode::peer,
                  "QMP command '" + command + "': QEMU sent a line that is no JSON");
    }
    if (text_at(reply, "id") != id) {
      continue;
    }
    if (const Json &value = at(reply, "return"); !value.is_discarded()) {
      return value;
    }
    return fail(ErrorCode::peer, "QEMU refused '" + command + "': " +
                                     text_at(at(reply, "error"), "desc", "no reason given"));
  }
}

Result<std::string> Qmp::human(const std::string &line, milliseconds limit) {
  QV_ASSIGN(const Json output, execute("human-monitor-command", {{"command-line", line}}, limit));
  if (!output.is_string()) {
    return fail(ErrorCode::peer, "QEMU's human monitor answered '" + line + "' with no text");
  }
  return text(output);
}

}  // namespace qvmstate::qemu
