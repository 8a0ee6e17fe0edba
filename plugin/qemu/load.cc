// loadvm of QEMU's own, with its traps refused first.
//
// loadvm stops the guest before it looks for the snapshot, and leaves it stopped when it fails. So
// what can be seen beforehand is refused here: a name that a disk does not have, one that is
// another snapshot's id (QEMU looks for ids first), dirty bitmaps.
#include <algorithm>

#include "plugin/qemu/operations.h"
#include "plugin/qemu/qmp.h"

namespace qvmstate::qemu {
namespace {

constexpr milliseconds load_limit{3'600'000};

/// A word for the human monitor, which knows quotes and backslashes.
Result<std::string> quoted(const std::string &name) {
  std::string word = "\"";
  for (const char c : name) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      return fail(ErrorCode::bad_argument, "a snapshot name cannot have control characters");
    }
    if (c == '"' || c == '\\') {
      word += '\\';
    }
    word += c;
  }
  return word + '"';
}

Result<void> check_snapshot_there(Qmp &qmp, const std::string &name) {
  QV_ASSIGN(const Json backends, qmp.execute("query-block"));
  bool first = true;
  for (const Json &backend : backends) {
    const Json &inserted = at(backend, "inserted");
    if (!inserted.is_object() || flag_at(inserted, "ro", true)) {
      continue;
    }
    const std::string disk =
        "disk '" + text_at(inserted, "node-name") + "' (" + text_at(inserted, "file") + ")";
    if (const Json &bitmaps = at(inserted, "dirty-bitmaps");
        bitmaps.is_array() && !bitmaps.empty()) {
      return fail(ErrorCode::bad_state, disk + ": has the dirty bitmap '" +
                                            text_at(bitmaps.front(), "name") +
                                            "', with which loadvm refuses; remove it "
                                            "(block-dirty-bitmap-remove)");
    }
    bool found = false;
    for (const Json &snapshot : at(at(inserted, "image"), "snapshots")) {
      if (text_at(snapshot, "name") == name) {
        if (first && !found && number_at(snapshot, "vm-state-size") == 0) {
          return fail(ErrorCode::not_supported,
                      disk + ": loadvm looks here first, and snapshot '" + name +
                          "' has no VM state here; load it with the QMP command snapshot-load");
        }
        found = true;
      } else if (text_at(snapshot, "id") == name) {
        return fail(ErrorCode::bad_argument,
                    disk + ": '" + name + "' is also the id of snapshot '" +
                        text_at(snapshot, "name") + "', which loadvm would take instead");
      }
    }
    if (!found) {
      return fail(ErrorCode::not_found, disk + ": has no snapshot named '" + name + "'");
    }
    first = false;
  }
  if (first) {
    return fail(ErrorCode::not_found, "the VM has no writable disk, so no snapshot '" + name + "'");
  }
  return {};
}

}  // namespace

Result<LoadReport> load(const std::string &qmp_path, const std::string &name) {
  const auto begin = Clock::now();
  QV_ASSIGN(const std::string word, quoted(name));
  QV_ASSIGN(auto qmp, Qmp::connect(qmp_path));
  QV_ASSIGN(const Json before, qmp->execute("query-status"));
  const std::string state = text_at(before, "status");
  if (state != "running" && state != "paused" && state != "prelaunch" && state != "restore-vm") {
    return fail(ErrorCode::bad_state,
                "the VM is in run state '" + state + "', in which a snapshot cannot be loaded");
  }
  QV_ASSIGN(const Json nodes, qmp->execute("query-named-block-nodes", {{"flat", true}}));
  for (const Json &node : nodes) {
    if (!flag_at(node, "active", true)) {
      return fail(ErrorCode::bad_state,
                  "QEMU has let go of its disks, as an interrupted save or migration leaves them; "
                  "run `qvmstate resume` first");
    }
  }
  QV_TRY(check_snapshot_there(*qmp, name));
  QV_ASSIGN(std::string output, qmp->human("loadvm " + word, load_limit));
  QV_ASSIGN(const Json after, qmp->execute("query-status"));
  while (!output.empty() && (output.back() == '\n' || output.back() == '\r')) {
    output.pop_back();
  }
  if (!output.empty()) {
    std::replace(output.begin(), output.end(), '\n', ' ');
    return fail(ErrorCode::peer, "loadvm '" + name + "': " + output + " (the VM is now in state '" +
                                     text_at(after, "status") +
                                     "'; load another snapshot or reset it)");
  }
  LoadReport report;
  report.name = name;
  report.running = flag_at(after, "running");
  report.seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  return report;
}

}  // namespace qvmstate::qemu
