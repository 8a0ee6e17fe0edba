#include "abi/loading.h"

#include <cerrno>
#include <cstring>
#include <vector>

namespace unicorn_host {
namespace {

constexpr unsigned threads = 4;

struct Sections {
  Machine &machine;
  const LoadOptions &options;
};

int take_timer(Machine &machine, std::vector<uint8_t> bytes) {
  uint64_t executed = 0;
  if (bytes.size() < sizeof executed) {
    return EINVAL;
  }
  std::memcpy(&executed, &bytes[bytes.size() - sizeof executed], sizeof executed);
  bytes.resize(bytes.size() - sizeof executed);
  machine.set_executed(executed);
  return machine.device().set_registers(bytes) ? 0 : EINVAL;
}

int on_section(void *user, const qvmstate_section *section) {
  const auto &self = *static_cast<const Sections *>(user);
  const auto *const data = static_cast<const uint8_t *>(section->data);
  const std::vector<uint8_t> bytes(data, data + section->bytes);
  const std::string name = section->name;
  if (name == "cpu" && section->version == 1) {
    return self.machine.set_cpu(bytes) ? 0 : EINVAL;
  }
  if (name == "timer" && section->version == 3) {
    return take_timer(self.machine, bytes);
  }
  if (name == "console" && section->version == 1 && !self.options.without_console) {
    self.machine.device().set_console(std::string(bytes.begin(), bytes.end()));
    return 0;
  }
  return QVMSTATE_SECTION_UNKNOWN;
}

int load_all(const qvmstate_api &api, qvmstate_load *loading, Machine &machine,
             const LoadOptions &options, qvmstate_error *error) {
  for (const RamBlock &block : machine.ram()) {
    qvmstate_ram_block given = {};
    given.size = sizeof given;
    given.name = block.name().c_str();
    given.address = block.data();
    given.bytes = block.bytes();
    if (const int code = api.load_add_ram(loading, &given, error); code != QVMSTATE_OK) {
      return code;
    }
  }
  if (const int code = api.load_ram(loading, error); code != QVMSTATE_OK) {
    return code;
  }
  Sections sections = {machine, options};
  return api.load_sections(loading, on_section, &sections, error);
}

}  // namespace

std::optional<Failure> load(Session &session, Machine &machine, const LoadOptions &options) {
  const qvmstate_api &api = session.api();
  qvmstate_load_options given = {};
  given.size = sizeof given;
  given.flags = options.skip_unknown ? QVMSTATE_LOAD_SKIP_UNKNOWN : 0;
  given.name = options.name.c_str();
  given.machine = machine.kind().name.c_str();
  given.threads = threads;
  qvmstate_load *loading = nullptr;
  qvmstate_error error;
  int code = api.load_begin(session.handle(), &given, &loading, &error);
  if (code == QVMSTATE_OK) {
    code = load_all(api, loading, machine, options, &error);
  }
  api.load_close(loading);
  return code == QVMSTATE_OK ? std::nullopt : std::optional(Failure{code, error.message});
}

}  // namespace unicorn_host
