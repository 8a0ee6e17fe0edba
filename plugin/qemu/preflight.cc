#include "plugin/qemu/preflight.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <fstream>
#include <iterator>

namespace qvmstate::qemu {
namespace {

struct RefusedState {
  std::string_view name;
  std::string_view why;
};
constexpr RefusedState refused_states[] = {
    {"suspended", "the guest sleeps (S3); wake it first (system_wakeup)"},
    {"shutdown", "the guest has shut down; reset it first (system_reset)"},
    {"internal-error", "QEMU met an internal error; reset the guest first (system_reset)"},
    {"guest-panicked", "the guest panicked; reset it first (system_reset)"},
    {"io-error", "the guest stands because of a disk error; mend that and `cont` first"},
    {"watchdog", "the watchdog stopped the guest; `cont` or reset it first"},
    {"debug", "a debugger holds the guest; let it run first"},
    {"inmigrate", "QEMU waits for an incoming migration; let it finish first"},
    {"postmigrate", "the guest was migrated away; `cont` here first, if it shall run here"},
    {"finish-migrate", "a migration is being finished; wait for its end"},
    {"colo", "the VM takes part in COLO, which cannot be saved"},
    {"save-vm", "QEMU is saving a snapshot of its own; wait for its end"},
    {"restore-vm", "QEMU is loading, or failed to load, a snapshot; load one or `cont` first"},
};

Result<void> check_run_state(const std::string &status) {
  if (status == "running" || status == "paused" || status == "prelaunch") {
    return {};
  }
  for (const RefusedState &state : refused_states) {
    if (status == state.name) {
      return fail(ErrorCode::bad_state,
                  "the VM is in run state '" + status + "': " + std::string(state.why));
    }
  }
  return fail(ErrorCode::bad_state, "the VM is in run state '" + status +
                                        "'; only running, paused and prelaunch can be saved");
}

Result<void> check_migration(Qmp &qmp) {
  QV_ASSIGN(const Json migration, qmp.execute("query-migrate"));
  const std::string status = text_at(migration, "status", "none");
  constexpr std::array<std::string_view, 4> idle = {"none", "completed", "cancelled", "failed"};
  if (std::find(idle.begin(), idle.end(), status) == idle.end()) {
    return fail(ErrorCode::bad_state, "a migration of the VM is in state '" + status +
                                          "'; wait for its end or cancel it (migrate_cancel)");
  }
  const Json &reasons = at(migration, "blocked-reasons");
  if (reasons.is_array() && !reasons.empty()) {
    return fail(ErrorCode::not_supported,
                "the VM has a device or option whose state cannot be saved: " +
                    text(reasons.front(), "unknown") + "; remove it");
  }
  return {};
}

/// A job writes to disks while the guest stands.
Result<void> check_block_jobs(Qmp &qmp) {
  QV_ASSIGN(const Json jobs, qmp.execute("query-block-jobs"));
  if (jobs.is_array() && !jobs.empty()) {
    return fail(ErrorCode::bad_state, "block job '" + text_at(jobs.front(), "device") + "' (" +
                                          text_at(jobs.front(), "type") +
                                          ") is going on; wait for its end or cancel it");
  }
  return {};
}

/// What a capability that is on stands in the way of.
struct RefusedCapability {
  std::string_view name;
  bool legacy_snapshot;
  bool mapped_ram;  ///< in either container
  std::string_view why;
};
constexpr std::string_view mapped_ram_name = "mapped-ram";
constexpr std::string_view changes_loading = "which changes how loadvm reads a snapshot";
constexpr std::string_view not_with_mapped_ram = "which is incompatible with mapped-ram";
constexpr RefusedCapability refused_capabilities[] = {
    {"x-ignore-shared", true, true, changes_loading},
    {mapped_ram_name, true, false, changes_loading},
    {"multifd", true, false, changes_loading},
    {"postcopy-ram", true, true, changes_loading},
    {"x-colo", true, true, changes_loading},
    {"xbzrle", false, true, not_with_mapped_ram},
    {"compress", false, true, not_with_mapped_ram},
};

Result<void> check_capabilities(Qmp &qmp, Purpose purpose) {
  QV_ASSIGN(const Json capabilities, qmp.execute("query-migrate-capabilities"));
  const bool mapped_ram =
      purpose == Purpose::mapped_ram_snapshot || purpose == Purpose::mapped_ram_file;
  for (const Json &capability : capabilities) {
    const std::string name = text_at(capability, "capability");
    for (const RefusedCapability &refused : refused_capabilities) {
      if (refused.name != name || !flag_at(capability, "state") ||
          !((refused.legacy_snapshot && purpose == Purpose::legacy_snapshot) ||
            (refused.mapped_ram && mapped_ram))) {
        continue;
      }
      std::string message = "the migration capability '" + name + "' is on, " +
                            std::string(refused.why) + "; switch it off (migrate_set_capability " +
                            name + " off)";
      if (name == mapped_ram_name) {
        message += ", or save with --layout mapped-ram";
      }
      return fail(ErrorCode::not_supported, message);
    }
  }
  return {};
}

/// Devices that save in several steps; xen-save-devices-state leaves their state out.
Result<void> check_devices(Qmp &qmp) {
  constexpr std::string_view refused[] = {"vfio", "vhost-vdpa", "virtio-mem", "x-pci-proxy"};
  for (const char *container : {"/machine/peripheral", "/machine/peripheral-anon"}) {
    QV_ASSIGN(const Json members, qmp.execute("qom-list", {{"path", container}}));
    for (const Json &member : members) {
      const std::string type = text_at(member, "type");
      for (const std::string_view part : refused) {
        if (type.starts_with("child<") && type.find(part) != std::string::npos) {
          return fail(ErrorCode::not_supported,
                      "device '" + text_at(member, "name") + "' (" +
                          type.substr(6, type.size() - 7) +
                          "): its state would be missing from the snapshot; unplug it");
        }
      }
    }
  }
  QV_ASSIGN(const std::string network, qmp.human("info network"));
  if (network.find("type=vhost-vdpa") != std::string::npos) {
    return fail(ErrorCode::not_supported,
                "a network device uses vhost-vdpa: its state would be missing from the snapshot; "
                "use another network backend");
  }
  return {};
}

/// Under icount the VM clock follows from the instruction count and a shift, which only an adaptive
/// one puts into the device state; the count that record and replay need is not saved.
Result<void> check_icount(Qmp &qmp, pid_t pid) {
  QV_ASSIGN(const Json replay, qmp.execute("query-replay"));
  bool counts = number_at(replay, "icount") != 0;
  bool adaptive = false;
  // Before the guest's first instruction the count is still 0.
  std::ifstream arguments("/proc/" + std::to_string(pid) + "/cmdline", std::ios::binary);
  for (std::string word; std::getline(arguments, word, '\0');) {
    if ((word == "-icount" || word == "--icount") && std::getline(arguments, word, '\0')) {
      counts = true;
      adaptive = word.starts_with("auto") || word.find("shift=auto") != std::string::npos;
    }
  }
  if (text_at(replay, "mode", "none") != "none" || (counts && !adaptive)) {
    return fail(ErrorCode::not_supported,
                "the VM runs with -icount, whose clock cannot be saved unless its shift is "
                "adaptive; start QEMU without -icount, or with -icount shift=auto");
  }
  return {};
}

}  // namespace

Result<bool> check_state(Qmp &qmp) {
  QV_ASSIGN(const Json status, qmp.execute("query-status"));
  QV_TRY(check_run_state(text_at(status, "status")));
  QV_TRY(check_migration(qmp));
  QV_TRY(check_block_jobs(qmp));
  return flag_at(status, "running");
}

Result<Machine> check_machine_type(std::string_view type, std::string_view target) {
  constexpr std::string_view suffix = "-machine";
  if (type.ends_with(suffix)) {
    type.remove_suffix(suffix.size());
  }
  Machine machine;
  machine.type = type;
  const bool x86 = target == "x86_64" || target == "i386";
  for (const std::string_view family : {"pc-i440fx-", "pc-q35-"}) {
    if (!x86 || !type.starts_with(family)) {
      continue;
    }
    const std::string version(type.substr(family.size()));
    char *end = nullptr;
    const long major = std::strtol(version.c_str(), &end, 10);
    const long minor = *end == '.' ? std::strtol(end + 1, nullptr, 10) : 0;
    if (major < 2 || (major == 2 && minor < 4)) {
      return fail(ErrorCode::not_supported,
                  "machine type '" + machine.type +
                      "': types before 2.4 save without section footers; use a newer -machine");
    }
    return machine;
  }
  if (x86 && type == "microvm") {
    return machine;
  }
  if (target == "aarch64" && type.starts_with("virt-")) {
    machine.target_page_bits = 12;
    return machine;
  }
  return fail(ErrorCode::not_supported,
              "machine type '" + machine.type + "' (" + std::string(target) +
                  ") cannot be saved; pc, q35, microvm (x86) and virt (aarch64) can");
}

Result<Machine> check_machine(Qmp &qmp, pid_t pid, Purpose purpose) {
  QV_ASSIGN(const Json type, qmp.execute("qom-get", {{"path", "/machine"}, {"property", "type"}}));
  QV_ASSIGN(const Json target, qmp.execute("query-target"));
  QV_ASSIGN(Machine machine, check_machine_type(text(type), text_at(target, "arch")));
  QV_TRY(check_capabilities(qmp, purpose));
  QV_TRY(check_devices(qmp));
  QV_TRY(check_icount(qmp, pid));
  return machine;
}

}  // namespace qvmstate::qemu
