// check: whether an image and the VM states in it are whole. Nothing is changed.
//
// With --independent each state and its disk are read a second time by libqcow and compared.
// libqcow takes clusters with the zero flag for data, so those are left out; it has no extended L2
// entries and no zstd.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <utility>
#include <vector>

#include "qcow2/cluster_reader.h"
#include "qcow2/image_check.h"
#include "tools/commands.h"
#include "tools/format.h"
#include "tools/libqcow_reader.h"
#include "tools/state_source.h"
#include "vmstate/snapshot_source.h"
#include "vmstate/state_check.h"

namespace qvmstate::tools {

namespace {

using qcow2::FindingKind;

constexpr uint64_t compare_bytes = 1 * mib;

struct CheckedState {
  const qcow2::Snapshot *snapshot;
  vmstate::StateCheck check;
  uint64_t compared_bytes = 0;  ///< with libqcow
};

struct Checked {
  OpenImage opened;
  qcow2::Findings findings;
  qcow2::ImageCheck image;
  std::vector<CheckedState> states;
};

const char *kind_name(FindingKind kind) {
  switch (kind) {
    case FindingKind::leak:
      return "leak";
    case FindingKind::damage:
      return "damage";
    case FindingKind::refusal:
      return "refusal";
    case FindingKind::note:
      return "note";
  }
  return "unknown";
}

const char *checksum_name(vmstate::ChecksumResult checksum) {
  switch (checksum) {
    case vmstate::ChecksumResult::none:
      return "none";
    case vmstate::ChecksumResult::right:
      return "right";
    case vmstate::ChecksumResult::wrong:
      return "wrong";
  }
  return "unknown";
}

/// Everything that the snapshot's L1 table maps, through libqcow and through our reader; how many
/// bytes that were.
Result<uint64_t> compare_with_libqcow(const qcow2::Image &image, const qcow2::Snapshot &snapshot,
                                      const std::string &what, qcow2::Findings &findings) {
  const qcow2::Header &header = image.header();
  if (header.geometry.extended_l2 || header.compression_type != 0 || header.crypt_method != 0) {
    findings.add(FindingKind::note, what +
                                        ": not compared with libqcow, which does not read images "
                                        "with extended L2 entries, zstd or encryption");
    return 0;
  }
  // The file that is locked, whatever its name leads to by now.
  const std::string path = "/proc/self/fd/" + std::to_string(image.file().descriptors().front());
  QV_ASSIGN(auto theirs,
            LibqcowReader::open(path, snapshot.l1_offset, snapshot.l1_entries, image.name()));
  qcow2::ClusterReader ours(image, snapshot.l1_offset, snapshot.l1_entries);
  const uint64_t end = snapshot.l1_entries * header.geometry.span_bytes();
  std::vector<std::byte> our_bytes;
  std::vector<std::byte> their_bytes;
  uint64_t compared_bytes = 0;
  for (GuestOffset at(0); at.value < end;) {
    QV_ASSIGN(const qcow2::ClusterReader::Extent extent, ours.extent_at(at));
    if (extent.kind != qcow2::ClusterKind::data && extent.kind != qcow2::ClusterKind::compressed) {
      at += extent.bytes;
      continue;
    }
    const uint64_t bytes = std::min({extent.bytes, compare_bytes, end - at.value});
    our_bytes.resize(bytes);
    their_bytes.resize(bytes);
    QV_TRY(ours.read(at, our_bytes));
    QV_TRY(theirs.read(at, their_bytes));
    if (our_bytes != their_bytes) {
      findings.add(FindingKind::damage, fmt::format("{}: libqcow reads other bytes at offset {} of "
                                                    "its disk and VM state",
                                                    what, at.value));
    }
    compared_bytes += bytes;
    at += bytes;
  }
  return compared_bytes;
}

Result<CheckedState> check_snapshot(const qcow2::Image &image, const qcow2::Snapshot &snapshot,
                                    const CheckCommand &command, qcow2::Findings &findings) {
  CheckedState state = {&snapshot, {}};
  const std::string what = fmt::format("snapshot '{}'", snapshot.name);
  io::OpenOptions options;
  options.direct = command.direct;
  const auto opener = [&]() -> Result<std::unique_ptr<vmstate::StreamSource>> {
    QV_ASSIGN(auto source, vmstate::SnapshotSource::reopen(image, snapshot, options));
    return std::unique_ptr<vmstate::StreamSource>(std::move(source));
  };
  if (snapshot.vmstate_bytes != 0) {
    QV_ASSIGN(
        state.check,
        vmstate::check_state(opener, vmstate::parse_checksum(snapshot.more_extra), what, findings));
  }
  if (state.check.stream && state.check.stream->layout == vmstate::Layout::mapped_ram) {
    findings.add(FindingKind::note, what +
                                        ": is in the mapped-ram layout, which QEMU 10.2 and later "
                                        "load, with that migration capability on");
  }
  if (command.independent) {
    auto compared = compare_with_libqcow(image, snapshot, what, findings);
    if (!compared && compared.error().code != ErrorCode::bad_image) {
      return tl::unexpected(std::move(compared).error());
    }
    if (!compared) {
      findings.add(FindingKind::damage, what + ": " + compared.error().message);
    }
    state.compared_bytes = compared.value_or(0);
  }
  return state;
}

Result<Checked> check(const CheckCommand &command) {
  Checked checked;
  QV_ASSIGN(checked.opened, open_image(command.image, false, !command.force_share));
  const qcow2::Image &image = checked.opened.image;
  std::vector<const qcow2::Snapshot *> snapshots;
  if (!command.name.empty()) {
    QV_ASSIGN(const qcow2::Snapshot *snapshot, named_snapshot(image, command.name));
    snapshots.push_back(snapshot);
  } else {
    for (const qcow2::Snapshot &snapshot : image.snapshots()) {
      snapshots.push_back(&snapshot);
    }
  }
  QV_ASSIGN(checked.image, qcow2::check_image(image, checked.findings));
  for (const qcow2::Snapshot *snapshot : snapshots) {
    if (snapshot->vmstate_bytes == 0 && !command.independent) {
      continue;
    }
    QV_ASSIGN(CheckedState state, check_snapshot(image, *snapshot, command, checked.findings));
    checked.states.push_back(std::move(state));
  }
  return checked;
}

const char *result_name(const qcow2::Findings &findings) {
  return findings.count(FindingKind::damage) > 0    ? "damaged"
         : findings.count(FindingKind::refusal) > 0 ? "refused"
         : findings.count(FindingKind::leak) > 0    ? "leaks"
                                                    : "clean";
}

Json to_json(const CheckCommand &command, const Checked &checked, double seconds) {
  const qcow2::Findings &findings = checked.findings;
  Json list = Json::array();
  for (const qcow2::Finding &finding : findings.list()) {
    list.push_back({{"kind", kind_name(finding.kind)}, {"message", finding.message}});
  }
  Json states = Json::array();
  for (const CheckedState &state : checked.states) {
    Json json = {{"name", state.snapshot->name},
                 {"id", state.snapshot->id},
                 {"vm-state-size", state.snapshot->vmstate_bytes},
                 {"checksum", checksum_name(state.check.checksum)}};
    if (const auto &stream = state.check.stream) {
      json["layout"] = vmstate::layout_name(stream->layout);
      json["data-pages"] = stream->data_pages;
      json["zero-pages"] = stream->zero_pages;
      json["device-sections"] = stream->devices.size();
    }
    if (command.independent) {
      json["compared-bytes"] = state.compared_bytes;
    }
    states.push_back(std::move(json));
  }
  return {{"event", "completed"},
          {"operation", "check"},
          {"filename", command.image},
          {"result", result_name(findings)},
          {"corruptions", findings.count(FindingKind::damage)},
          {"leaks", findings.count(FindingKind::leak)},
          {"refusals", findings.count(FindingKind::refusal)},
          {"image-end-offset", checked.image.end_offset},
          {"total-clusters", checked.image.total_clusters},
          {"allocated-clusters", checked.image.allocated_clusters},
          {"compressed-clusters", checked.image.compressed_clusters},
          {"findings", std::move(list)},
          {"states", std::move(states)},
          {"total-seconds", seconds}};
}

std::string to_text(const CheckCommand &command, const Checked &checked) {
  const qcow2::Findings &findings = checked.findings;
  std::string text;
  for (const qcow2::Finding &finding : findings.list()) {
    text += finding.kind == FindingKind::refusal
                ? fmt::format("QEMU will refuse this because {}\n", printable(finding.message))
                : fmt::format("{}: {}\n", kind_name(finding.kind), printable(finding.message));
  }
  for (const FindingKind kind : {FindingKind::damage, FindingKind::refusal, FindingKind::leak}) {
    if (findings.left_out(kind) > 0) {
      text += fmt::format("{}: {} more\n", kind_name(kind), findings.left_out(kind));
    }
  }
  for (const CheckedState &state : checked.states) {
    text += fmt::format("snapshot '{}':", printable(state.snapshot->name));
    if (const auto &stream = state.check.stream) {
      text += fmt::format(" {} stream, {}, {} pages with data, {} zero, {} device sections;",
                          vmstate::layout_name(stream->layout), format_size(stream->stream_bytes),
                          stream->data_pages, stream->zero_pages, stream->devices.size());
    }
    if (state.snapshot->vmstate_bytes != 0) {
      text += fmt::format(" checksum: {};", checksum_name(state.check.checksum));
    }
    if (command.independent) {
      text += fmt::format(" {} compared with libqcow;", format_size(state.compared_bytes));
    }
    text.back() = '\n';
  }
  const uint64_t damage = findings.count(FindingKind::damage);
  const uint64_t leaks = findings.count(FindingKind::leak);
  const uint64_t refusals = findings.count(FindingKind::refusal);
  if (damage + leaks + refusals == 0) {
    return text + "No errors were found on the image.\n";
  }
  return text + fmt::format("{} errors, {} reasons for QEMU to refuse, {} leaked clusters.\n",
                            damage, refusals, leaks);
}

}  // namespace

int run_check(const CheckCommand &command) {
  const auto begin = std::chrono::steady_clock::now();
  const Result<Checked> checked = check(command);
  if (!checked) {
    return report_failure("check", checked.error(), command.format);
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const int written =
      finish("check", command.format == Format::json ? to_line(to_json(command, *checked, seconds))
                                                     : to_text(command, *checked));
  const bool clean = std::string_view(result_name(checked->findings)) == "clean";
  return clean ? written : exit_failed;
}

}  // namespace qvmstate::tools
