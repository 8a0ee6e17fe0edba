// What QEMU sees when it loads libqvmstate.so as a TCG plugin:
//   -plugin libqvmstate.so,qmp=QMP_SOCKET,control=CONTROL_SOCKET
//
// QEMU reads qemu_plugin_version after loading the file, and the range it accepts differs between
// releases (7.2: 0 to 1; 10.0: 2 to 4; 11.1: 7). No callback is registered, so nothing else depends
// on it, and a constructor sets the number that this QEMU takes, told by functions it exports.
//
// qemu_plugin_install runs before the board exists, and, with -daemonize, in the process that
// stays. It opens the control socket and starts one thread, which connects to QMP when it is asked
// for something.
#include <dlfcn.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <string_view>
#include <thread>

#define QVMSTATE_EXPORT __attribute__((visibility("default")))

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include "plugin/qemu/control.h"
#include "plugin/qemu/save.h"
#include "qcow2/io/signals.h"

extern "C" {
QVMSTATE_EXPORT int qemu_plugin_version = 1;
// `info` is QEMU's qemu_info_t; nothing of it is needed here.
QVMSTATE_EXPORT int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv);
}

namespace qvmstate::qemu {
namespace {

__attribute__((constructor)) void choose_version() {
  if (::dlsym(RTLD_DEFAULT, "qemu_plugin_set_pc") != nullptr) {
    qemu_plugin_version = 7;
  } else if (::dlsym(RTLD_DEFAULT, "qemu_plugin_scoreboard_new") != nullptr) {
    qemu_plugin_version = 2;
  }
}

spdlog::logger &log() {
  static spdlog::logger logger("qvmstate", std::make_shared<spdlog::sinks::stderr_sink_mt>());
  return logger;
}

/// Lives as long as the process: QEMU never unloads a plugin that has not asked for it.
struct Plugin {
  ControlServer server;
  std::string qmp_path;
  int wake = -1;
  std::atomic<bool> end = false;
  KnownRam known_ram = {};  // of the thread that serves
};

void run(Plugin &plugin) {
  ControlOperations operations;
  operations.save = [&](const SaveOptions &options, const Observer &observer) {
    auto report = save(plugin.qmp_path, options, observer, Seat::plugin, &plugin.known_ram);
    if (!report) {
      log().warn("save '{}': {}", options.name, report.error().message);
    }
    return report;
  };
  operations.remove = [&](const std::string &name, const Observer &observer) {
    auto report = delete_snapshot(plugin.qmp_path, name, observer, Seat::plugin);
    if (!report) {
      log().warn("delete '{}': {}", name, report.error().message);
    }
    return report;
  };
  try {
    plugin.server.serve(operations, plugin.wake, plugin.end);
  } catch (const std::exception &error) {
    log().error("the control socket is closed: {}", error.what());
  }
}

int refuse(const std::string &line) {
  std::fprintf(stderr, "qvmstate: %s\n", line.c_str());
  return 1;
}

int install(int argc, char **argv) {
  std::string qmp_path;
  std::string control_path;
  for (int i = 0; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument.starts_with("qmp=")) {
      qmp_path = argument.substr(4);
    } else if (argument.starts_with("control=")) {
      control_path = argument.substr(8);
    } else {
      return refuse("unknown argument '" + std::string(argument) +
                    "'; usage: -plugin libqvmstate.so,qmp=SOCKET,control=SOCKET");
    }
  }
  if (qmp_path.empty() || control_path.empty()) {
    return refuse(std::string(qmp_path.empty() ? "qmp=" : "control=") +
                  " is missing; usage: -plugin libqvmstate.so,qmp=SOCKET,control=SOCKET");
  }
  auto server = ControlServer::listen(control_path);
  if (!server) {
    return refuse(server.error().message);
  }
  const int wake = ::eventfd(0, EFD_CLOEXEC);
  if (wake < 0) {
    return refuse("creating an eventfd failed");
  }
  auto *plugin = new Plugin{std::move(*server), std::move(qmp_path)};
  plugin->wake = wake;
  const io::SignalsBlocked blocked;
  std::thread([plugin] { run(*plugin); }).detach();
  return 0;
}

}  // namespace
}  // namespace qvmstate::qemu

int qemu_plugin_install(uint64_t, const void *, int argc, char **argv) {
  try {
    return qvmstate::qemu::install(argc, argv);
  } catch (const std::exception &error) {
    return qvmstate::qemu::refuse(error.what());
  }
}
