// loadvm of QEMU's own, with its traps refused first.
//
// loadvm stops the guest before it looks for the snapshot, and leaves it stopped when it fails. So
// what can be seen beforehand is refused here: a name that a disk does not have, one that is
// another snapshot's id (QEMU looks for ids first), dirty bitmaps. And the migration capability
// mapped-ram, which must be on exactly for snapshots in that layout, is set for the time of the
// load.
#include <algorithm>
#include <optional>
#include <utility>

#include "plugin/qemu/block_nodes.h"
#include "plugin/qemu/handover.h"
#include "plugin/qemu/marks.h"
#include "plugin/qemu/operations.h"
#include "plugin/qemu/qmp.h"
#include "plugin/qemu/unix_socket.h"
#include "vmstate/snapshot_source.h"
#include "vmstate/stream_format.h"
#include "vmstate/stream_reader.h"

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

/// Of the snapshot that loadvm would take; nothing if that cannot be seen from here (another
/// program's disks, no permission): then loadvm itself says what it thinks of it.
Result<std::optional<vmstate::Layout>> layout_of(Qmp &qmp, const std::string &name) {
  QV_ASSIGN(const Peer peer, peer_of(qmp.socket()));
  const auto disks = find_disks(qmp, peer.pid);
  if (!disks) {
    return std::nullopt;
  }
  const auto watched = WatchedImages::open(*disks);
  if (!watched) {
    return std::nullopt;
  }
  const qcow2::Image &image = *watched->images().front();
  const int index = qcow2::find_snapshot(image.snapshots(), name);
  if (index < 0) {
    return std::nullopt;
  }
  const auto source =
      vmstate::SnapshotSource::create(image, image.snapshots()[static_cast<size_t>(index)]);
  if (!source) {
    return std::nullopt;
  }
  std::optional<vmstate::Layout> layout;
  // The head says it; the pages need not be read.
  (void)vmstate::read_stream(**source, {}, {}, [&](const vmstate::StreamSummary &head) {
    layout = head.layout;
    return Result<void>(fail(ErrorCode::cancelled, "the head is enough"));
  });
  return layout;
}

/// QEMU's migration capabilities as a snapshot needs them, for as long as it is loaded.
class Capabilities {
 public:
  explicit Capabilities(Qmp &qmp) : qmp_(qmp) {}
  ~Capabilities() { (void)put_back(); }
  Capabilities(const Capabilities &) = delete;
  Capabilities &operator=(const Capabilities &) = delete;

  Result<void> suit(bool mapped_ram) {
    if (mapped_ram && !qmp_.is_at_least(10, 2)) {
      return fail(ErrorCode::not_supported, "the snapshot is in the mapped-ram layout, and QEMU " +
                                                qmp_.version() +
                                                " cannot load that; QEMU 10.2 or later can");
    }
    QV_ASSIGN(const Json states, qmp_.execute("query-migrate-capabilities"));
    Json wanted = Json::array();
    for (const Json &state : states) {
      const std::string name = text_at(state, "capability");
      const bool is_on = flag_at(state, "state");
      // multifd is refused in both layouts.
      const bool shall_be_on = name == vmstate::mapped_ram_capability && mapped_ram;
      if ((name == vmstate::mapped_ram_capability || name == "multifd") && is_on != shall_be_on) {
        wanted.push_back({{"capability", name}, {"state", shall_be_on}});
        before_.push_back({{"capability", name}, {"state", is_on}});
      }
    }
    if (!wanted.empty()) {
      QV_TRY(qmp_.execute("migrate-set-capabilities", {{"capabilities", wanted}}));
    }
    return {};
  }

  Result<void> put_back() {
    if (before_.empty()) {
      return {};
    }
    const Json before = std::exchange(before_, Json::array());
    QV_TRY(qmp_.execute("migrate-set-capabilities", {{"capabilities", before}}));
    return {};
  }

 private:
  Qmp &qmp_;
  Json before_ = Json::array();
};

}  // namespace

Result<LoadReport> load(const std::string &qmp_path, const std::string &name) {
  const auto begin = Clock::now();
  QV_ASSIGN(const std::string word, quoted(name));
  QV_ASSIGN(auto qmp, Qmp::connect(qmp_path));
  QV_TRY(check_none_going_on(*qmp));
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
  LoadReport report;
  report.name = name;
  QV_ASSIGN(const std::optional<vmstate::Layout> layout, layout_of(*qmp, name));
  Capabilities capabilities(*qmp);
  if (layout) {
    report.layout = vmstate::layout_name(*layout);
    QV_TRY(capabilities.suit(*layout == vmstate::Layout::mapped_ram));
  }
  QV_ASSIGN(std::string output, qmp->human("loadvm " + word, load_limit));
  QV_TRY(capabilities.put_back());
  QV_ASSIGN(const Json after, qmp->execute("query-status"));
  while (!output.empty() && (output.back() == '\n' || output.back() == '\r')) {
    output.pop_back();
  }
  if (!output.empty()) {
    std::erase(output, '\r');
    std::replace(output.begin(), output.end(), '\n', ' ');
    return fail(ErrorCode::peer, "loadvm '" + name + "': " + output + " (the VM is now in state '" +
                                     text_at(after, "status") +
                                     "'; load another snapshot or reset it)");
  }
  report.running = flag_at(after, "running");
  report.seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  return report;
}

}  // namespace qvmstate::qemu
