// A scripted QMP server on a unix socket, on a thread of its own.
#pragma once

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "plugin/qemu/json.h"

namespace qvmstate::qemu::testing {

constexpr const char *greeting =
    "{\"QMP\":{\"version\":{\"qemu\":{\"micro\":3,\"minor\":1,\"major\":11}},"
    "\"capabilities\":[]}}\r\n";

class TemporaryFolder {
 public:
  TemporaryFolder() {
    char name[] = "/tmp/qvmstate-test-XXXXXX";
    path_ = ::mkdtemp(name);
  }
  ~TemporaryFolder() { std::system(("rm -rf '" + path_ + "'").c_str()); }
  std::string file(const std::string &name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

class FakeQmp {
 public:
  /// Raw bytes to send for a request line; "\x04" at the end closes the connection afterwards.
  using Answer = std::function<std::string(const Json &request)>;

  FakeQmp(std::string path, std::string hello, Answer answer)
      : path_(std::move(path)), hello_(std::move(hello)), answer_(std::move(answer)) {
    listener_ = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path_.c_str(), sizeof address.sun_path - 1);
    if (::bind(listener_, reinterpret_cast<sockaddr *>(&address), sizeof address) != 0 ||
        ::listen(listener_, 4) != 0) {
      std::abort();
    }
    thread_ = std::thread([this] { run(); });
  }
  ~FakeQmp() {
    ::shutdown(listener_, SHUT_RDWR);
    {
      const std::lock_guard lock(mutex_);
      if (client_ >= 0) {
        ::shutdown(client_, SHUT_RDWR);
      }
    }
    thread_.join();
    ::close(listener_);
  }
  std::vector<std::string> commands() {
    const std::lock_guard lock(mutex_);
    return commands_;
  }
  bool saw(const std::string &command, std::chrono::milliseconds limit) {
    const auto end = std::chrono::steady_clock::now() + limit;
    do {
      for (const std::string &seen : commands()) {
        if (seen == command) {
          return true;
        }
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    } while (std::chrono::steady_clock::now() < end);
    return false;
  }

 private:
  void run() {
    for (;;) {
      const int client = ::accept(listener_, nullptr, nullptr);
      if (client < 0) {
        return;
      }
      {
        const std::lock_guard lock(mutex_);
        client_ = client;
      }
      serve(client);
      const std::lock_guard lock(mutex_);
      client_ = -1;
      ::close(client);
    }
  }
  void serve(int client) {
    ::send(client, hello_.data(), hello_.size(), MSG_NOSIGNAL);
    std::string pending;
    char buffer[4096];
    for (ssize_t bytes; (bytes = ::recv(client, buffer, sizeof buffer, 0)) > 0;) {
      pending.append(buffer, static_cast<size_t>(bytes));
      for (size_t end; (end = pending.find('\n')) != std::string::npos;) {
        const Json request = Json::parse(pending.substr(0, end), nullptr, false);
        pending.erase(0, end + 1);
        {
          const std::lock_guard lock(mutex_);
          commands_.push_back(text_at(request, "execute"));
        }
        std::string reply = answer_(request);
        const bool close = reply.ends_with('\x04');
        if (close) {
          reply.pop_back();
        }
        for (size_t sent = 0; sent < reply.size();) {
          const ssize_t part =
              ::send(client, reply.data() + sent, reply.size() - sent, MSG_NOSIGNAL);
          if (part <= 0) {
            return;
          }
          sent += static_cast<size_t>(part);
        }
        if (close) {
          return;
        }
      }
    }
  }

  std::string path_;
  std::string hello_;
  Answer answer_;
  int listener_ = -1;
  int client_ = -1;
  std::mutex mutex_;
  std::vector<std::string> commands_;
  std::thread thread_;
};

inline std::string returns(const Json &request, const Json &value) {
  return Json({{"return", value}, {"id", at(request, "id")}}).dump() + "\r\n";
}
/// Agrees to everything.
inline std::string agree(const Json &request) {
  return request.is_object() ? returns(request, Json::object()) : "";
}

}  // namespace qvmstate::qemu::testing
