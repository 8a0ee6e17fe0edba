// The control socket of the plugin: JSON lines over a unix socket.
//
// Request:  {"execute":"save","arguments":{"name":"x",...}}
// Answers:  {"event":"progress",...}*  {"event":"warning",...}*  then one of
//           {"return":{...}}   {"error":{"class":"exists","desc":"..."}}
// With "descriptors":2 in the arguments of save, two descriptors come with the request over
// SCM_RIGHTS: SaveOptions::fd and direct_fd.
// Commands: save, delete, version. One operation at a time; a client that hangs up cancels its
// save. Only root and the user of this process are served.
//
// Threads: serve() runs on one thread; everything else here may be called from any.
#pragma once

#include <atomic>
#include <functional>
#include <string>
#include <vector>

#include "plugin/qemu/descriptor.h"
#include "plugin/qemu/json.h"
#include "plugin/qemu/operations.h"
#include "plugin/qemu/unix_socket.h"
#include "qcow2/io/result.h"

namespace qvmstate::qemu {

/// What a server does for its clients; the plugin's own operations, or a fake's in tests.
struct ControlOperations {
  std::function<Result<SaveReport>(const SaveOptions &, const Observer &)> save;
  std::function<Result<DeleteReport>(const std::string &name, const Observer &)> remove;
};

class ControlServer {
 public:
  /// Binds and listens, mode 0600. Replaces a socket file that nobody listens at; refuses one that
  /// somebody does, any other file, and a folder in which other users can rename files.
  static Result<ControlServer> listen(const std::string &path);

  /// Serves until `end` is set or `wake` becomes readable.
  void serve(const ControlOperations &operations, int wake, const std::atomic<bool> &end);

 private:
  explicit ControlServer(Descriptor socket) : socket_(std::move(socket)) {}
  void serve_client(const Descriptor &client, const ControlOperations &operations,
                    const std::atomic<bool> &end);

  Descriptor socket_;
};

Json to_json(const SaveOptions &options);
/// `received`: what came with the request. On success they belong to the options.
Result<SaveOptions> save_options_from(const Json &arguments, std::vector<Descriptor> received = {});
Json to_json(const SaveReport &report);
SaveReport save_report_from(const Json &value);
Json to_json(const Error &error);
Error error_from(const Json &value);

}  // namespace qvmstate::qemu
