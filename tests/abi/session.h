// An image that the host has open through the library.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "plugin/qvmstate.h"

namespace unicorn_host {

/// What a call of the library said when it failed.
struct Failure {
  int code;
  std::string message;
};

struct ImageOptions {
  std::string path;
  bool writable = false;
  bool by_descriptors = false;  ///< the library gets two open files instead of the path
};

class Session {
 public:
  explicit Session(const qvmstate_api &api) : api_(api) {}
  ~Session() { api_.session_close(session_); }
  Session(const Session &) = delete;
  Session &operator=(const Session &) = delete;

  std::optional<Failure> open(const ImageOptions &options);
  /// A line for each snapshot: id, name, bytes of its VM state, clock.
  std::optional<Failure> list(std::string &lines);
  std::optional<Failure> remove(const std::string &snapshot);

  const qvmstate_api &api() const { return api_; }
  qvmstate_session *handle() const { return session_; }

 private:
  const qvmstate_api &api_;
  qvmstate_session *session_ = nullptr;
};

}  // namespace unicorn_host
