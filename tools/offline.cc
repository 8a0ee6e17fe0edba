// Commands on images without QEMU: list, info, and delete of images that no VM uses.
//
// info also tells about migration files. list and info hold the lock of a reader; delete holds the
// lock of a writer.
#include <fmt/format.h>
#include <sys/stat.h>

#include <memory>
#include <set>
#include <utility>

#include "qcow2/image.h"
#include "qcow2/image_set.h"
#include "qcow2/io/file.h"
#include "qcow2/locks.h"
#include "qcow2/suitability.h"
#include "tools/commands.h"
#include "tools/format.h"
#include "tools/state_source.h"
#include "vmstate/snapshot_source.h"
#include "vmstate/stream_reader.h"

namespace qvmstate::tools {

namespace {

/// Field names as in `qemu-img info --output=json`.
Json snapshot_json(const qcow2::Snapshot &snapshot) {
  Json json = {{"id", snapshot.id},
               {"name", snapshot.name},
               {"vm-state-size", snapshot.vmstate_bytes},
               {"date-sec", snapshot.date_seconds},
               {"date-nsec", snapshot.date_nanos},
               {"vm-clock-sec", snapshot.clock_nanos / 1000000000},
               {"vm-clock-nsec", snapshot.clock_nanos % 1000000000}};
  if (snapshot.icount != qcow2::icount_none) {
    json["icount"] = static_cast<int64_t>(snapshot.icount);
  }
  json["disk-size"] = snapshot.disk_bytes;
  return json;
}

std::string size_and_bytes(uint64_t bytes) {
  return fmt::format("{} ({} bytes)", format_size(bytes), bytes);
}

std::vector<std::string> features(const qcow2::Header &header) {
  std::vector<std::string> names;
  const auto add = [&names](bool present, const char *name) {
    if (present) {
      names.emplace_back(name);
    }
  };
  const uint64_t incompatible = header.incompatible_features;
  add(incompatible & qcow2::incompatible::dirty, "dirty");
  add(incompatible & qcow2::incompatible::corrupt, "corrupt");
  add(incompatible & qcow2::incompatible::data_file, "external data file");
  add(header.compression_type == 1, "zstd compression");
  add(incompatible & qcow2::incompatible::extended_l2, "extended L2");
  add(header.compatible_features & qcow2::compatible::lazy_refcounts, "lazy refcounts");
  add(header.autoclear_features & qcow2::autoclear::bitmaps, "persistent bitmaps");
  add(header.autoclear_features & qcow2::autoclear::raw_data_file, "raw data file");
  add(header.crypt_method == 1, "AES encryption");
  add(header.crypt_method == 2, "LUKS encryption");
  return names;
}

std::string image_info(const qcow2::Image &image, Format format, qcow2::ImageUse use) {
  const qcow2::Header &header = image.header();
  const Result<void> suits =
      qcow2::check_image_suits(image, qcow2::ImageRole::vmstate, qcow2::Bitmaps::refuse, use);
  const bool disk_suits =
      qcow2::check_image_suits(image, qcow2::ImageRole::disk_only, qcow2::Bitmaps::refuse, use)
          .has_value();
  const std::vector<std::string> feature_names = features(header);
  if (format == Format::json) {
    Json json = {{"filename", image.name()},
                 {"format", "qcow2"},
                 {"version", header.version},
                 {"virtual-size", header.disk_bytes},
                 {"cluster-size", header.geometry.cluster_bytes()},
                 {"refcount-bits", header.geometry.refcount_bits()},
                 {"features", feature_names},
                 {"persistent-bitmaps", header.persistent_bitmaps()},
                 {"snapshots", image.snapshots().size()},
                 {"can-take-vmstate", suits.has_value()},
                 {"can-take-disk-snapshot", disk_suits}};
    if (!header.backing_name.empty()) {
      json["backing-filename"] = header.backing_name;
    }
    if (!suits) {
      json["reason"] = suits.error().message;
    }
    return to_line(json);
  }
  std::string text = fmt::format(
      "image: {}\nformat: qcow2 version {}\nvirtual size: {}\ncluster size: {}\n"
      "refcount bits: {}\nfeatures: {}\n",
      printable(image.name()), header.version, size_and_bytes(header.disk_bytes),
      size_and_bytes(header.geometry.cluster_bytes()), header.geometry.refcount_bits(),
      feature_names.empty() ? "none" : fmt::format("{}", fmt::join(feature_names, ", ")));
  if (!header.backing_name.empty()) {
    text += "backing file: " + printable(header.backing_name) + "\n";
  }
  text += fmt::format("snapshots: {}\n", image.snapshots().size());
  if (suits) {
    text += "can take a VM state: yes\n";
  } else {
    text += fmt::format("can take a VM state: no{}: {}\n",
                        disk_suits ? ", but the snapshot of its disk" : "",
                        printable(suits.error().message));
  }
  return text;
}

std::string stream_text(const vmstate::StreamSummary &stream) {
  std::string text =
      fmt::format("stream: {} layout, {}\nmachine type: {}\n", vmstate::layout_name(stream.layout),
                  size_and_bytes(stream.stream_bytes), printable(stream.machine_type));
  if (!stream.capabilities.empty()) {
    text += printable(fmt::format("capabilities: {}", fmt::join(stream.capabilities, ", "))) + "\n";
  }
  text += fmt::format("pages of {}: {} with data, {} zero", format_size(stream.page_bytes),
                      stream.data_pages, stream.zero_pages);
  if (stream.compressed_pages > 0) {
    text += fmt::format(", {} compressed", stream.compressed_pages);
  }
  if (stream.xbzrle_pages > 0) {
    text += fmt::format(", {} as differences (XBZRLE)", stream.xbzrle_pages);
  }
  text += "\nRAM blocks:\n";
  for (const vmstate::StreamBlock &block : stream.blocks) {
    text += fmt::format("  {:<32} {:>10}\n", printable(block.idstr), format_size(block.used_bytes));
  }
  text += "devices (instance, version, size):\n";
  for (const vmstate::StreamSection &device : stream.devices) {
    text += fmt::format("  {:<32} {:>3} {:>3} {:>10}\n", printable(device.idstr), device.instance,
                        device.version, format_size(device.bytes));
  }
  return text;
}

Json stream_json(const vmstate::StreamSummary &stream) {
  Json blocks = Json::array();
  for (const vmstate::StreamBlock &block : stream.blocks) {
    blocks.push_back({{"name", block.idstr}, {"size", block.used_bytes}});
  }
  Json devices = Json::array();
  for (const vmstate::StreamSection &device : stream.devices) {
    devices.push_back({{"name", device.idstr},
                       {"instance", device.instance},
                       {"version", device.version},
                       {"size", device.bytes}});
  }
  Json json = {{"layout", vmstate::layout_name(stream.layout)},
               {"size", stream.stream_bytes},
               {"machine-type", stream.machine_type},
               {"capabilities", stream.capabilities},
               {"page-size", stream.page_bytes},
               {"data-pages", stream.data_pages},
               {"zero-pages", stream.zero_pages},
               {"compressed-pages", stream.compressed_pages},
               {"xbzrle-pages", stream.xbzrle_pages},
               {"ram-blocks", std::move(blocks)},
               {"devices", std::move(devices)}};
  if (stream.target_page_bits) {
    json["target-page-bits"] = *stream.target_page_bits;
  }
  return json;
}

int file_info(const ReadCommand &command) {
  auto stream = [&]() -> Result<vmstate::StreamSummary> {
    QV_ASSIGN(StateSource state, StateSource::open({command.image, command.name, command.offset,
                                                    command.force_share}));
    auto read = vmstate::read_stream(state.stream(), {}, state.start());
    if (!read) {
      return tl::unexpected(with_context(std::move(read).error(), state.name()));
    }
    return read;
  }();
  if (!stream) {
    return report_failure("info", stream.error(), command.format);
  }
  if (command.format == Format::json) {
    Json json = {{"filename", command.image}, {"format", "migration"}};
    json["offset"] = command.offset.value_or(0);
    json["stream"] = stream_json(*stream);
    return finish("info", to_line(json));
  }
  return finish("info", fmt::format("migration file: {}, stream at byte {}\n",
                                    printable(command.image), command.offset.value_or(0)) +
                            stream_text(*stream));
}

/// What the VM state takes in the file; clusters that it shares with other snapshots count too.
Result<uint64_t> vmstate_bytes_on_disk(const qcow2::Image &image, const qcow2::Snapshot &snapshot) {
  qcow2::VmstateReader reader(image, snapshot);
  const uint64_t cluster_bytes = image.geometry().cluster_bytes();
  uint64_t bytes = 0;
  for (uint64_t at = 0; at < reader.mapped_bytes();) {
    QV_ASSIGN(const qcow2::ClusterReader::Run run,
              reader.run_at(StreamOffset(at), reader.mapped_bytes() - at));
    switch (run.kind) {
      case qcow2::ClusterKind::data:
      case qcow2::ClusterKind::zero_allocated:
        bytes += run.bytes;
        break;
      case qcow2::ClusterKind::compressed:
        bytes += run.bytes == cluster_bytes
                     ? qcow2::compressed_range(run.entry, image.geometry()).bytes
                     : 0;
        break;
      case qcow2::ClusterKind::unallocated:
      case qcow2::ClusterKind::zero:
        break;
    }
    at += run.bytes;
  }
  return bytes;
}

int snapshot_info(const qcow2::Image &image, const qcow2::Snapshot &snapshot, Format format) {
  if (snapshot.vmstate_bytes == 0) {
    if (format == Format::json) {
      return finish("info", to_line(snapshot_json(snapshot)));
    }
    return finish("info", format_snapshot_list({&snapshot, 1}) +
                              fmt::format("disk size: {}\nno VM state: disk only\n",
                                          size_and_bytes(snapshot.disk_bytes)));
  }
  uint64_t on_disk_bytes = 0;
  const auto stream = [&]() -> Result<vmstate::StreamSummary> {
    QV_ASSIGN(on_disk_bytes, vmstate_bytes_on_disk(image, snapshot));
    QV_ASSIGN(const auto source, vmstate::SnapshotSource::create(image, snapshot));
    return vmstate::read_stream(*source);
  }();
  if (!stream) {
    return report_failure("info",
                          with_context(stream.error(), fmt::format("{}: VM state of snapshot '{}'",
                                                                   image.name(), snapshot.name)),
                          format);
  }
  if (format == Format::json) {
    Json json = snapshot_json(snapshot);
    json["vm-state-size-on-disk"] = on_disk_bytes;
    json["stream"] = stream_json(*stream);
    return finish("info", to_line(json));
  }
  return finish(
      "info", format_snapshot_list({&snapshot, 1}) +
                  fmt::format("disk size: {}\nVM state on disk: {}\n",
                              size_and_bytes(snapshot.disk_bytes), size_and_bytes(on_disk_bytes)) +
                  stream_text(*stream));
}

/// Two names of one file would look like a lock held by somebody else.
Result<void> check_all_differ(const std::vector<std::string> &paths) {
  std::set<std::pair<dev_t, ino_t>> seen;
  for (const std::string &path : paths) {
    struct stat status = {};
    // What cannot be looked at is refused, with its reason, when it is opened.
    if (stat(path.c_str(), &status) == 0 && !seen.insert({status.st_dev, status.st_ino}).second) {
      return fail(ErrorCode::bad_argument, path + ": is given twice; name each image once");
    }
  }
  return {};
}

Result<std::vector<std::string>> delete_offline(const DeleteCommand &command) {
  QV_TRY(check_all_differ(command.images));
  std::vector<OpenImage> opened;
  std::vector<qcow2::Image *> images;
  opened.reserve(command.images.size());
  for (const std::string &path : command.images) {
    QV_ASSIGN(OpenImage image, open_image(path, true, true));
    opened.push_back(std::move(image));
    images.push_back(&opened.back().image);
    QV_TRY(qcow2::check_image_suits(*images.back(), qcow2::ImageRole::disk_only,
                                    qcow2::Bitmaps::allow));
  }
  std::vector<std::string> notes;
  // Settling it takes all images of the VM, and nobody says that these are all.
  if (qcow2::needs_recovery(images)) {
    notes.push_back(
        "the images seem to hold a part of a save over several disks that was interrupted; if so, "
        "`qvmstate resume` on the running VM settles it");
  }
  QV_TRY(qcow2::delete_from_set(images, command.name, true));
  return notes;
}

}  // namespace

int run_list(const ReadCommand &command) {
  const Result<OpenImage> opened = open_image(command.image, false, !command.force_share);
  if (!opened) {
    return report_failure("list", opened.error(), command.format);
  }
  const std::vector<qcow2::Snapshot> &snapshots = opened->image.snapshots();
  if (command.format == Format::human) {
    return finish("list", format_snapshot_list(snapshots));
  }
  Json array = Json::array();
  for (const qcow2::Snapshot &snapshot : snapshots) {
    array.push_back(snapshot_json(snapshot));
  }
  return finish("list", to_line(array));
}

int run_info(const ReadCommand &command) {
  const Result<bool> is_file =
      is_migration_file({command.image, command.name, command.offset, command.force_share});
  if (!is_file) {
    return report_failure("info", is_file.error(), command.format);
  }
  if (*is_file) {
    return file_info(command);
  }
  const Result<OpenImage> opened = open_image(command.image, false, !command.force_share);
  if (!opened) {
    return report_failure("info", opened.error(), command.format);
  }
  const qcow2::Image &image = opened->image;
  if (command.name.empty()) {
    const qcow2::ImageUse use =
        command.force_share ? qcow2::ImageUse::held_by_qemu : qcow2::ImageUse::ours;
    return finish("info", image_info(image, command.format, use));
  }
  const Result<const qcow2::Snapshot *> snapshot = named_snapshot(image, command.name);
  if (!snapshot) {
    return report_failure("info", snapshot.error(), command.format);
  }
  return snapshot_info(image, **snapshot, command.format);
}

int run_delete_offline(const DeleteCommand &command) {
  const Result<std::vector<std::string>> notes = delete_offline(command);
  if (!notes) {
    return report_failure("delete", notes.error(), command.format);
  }
  for (const std::string &note : *notes) {
    report_warning("delete", note);
  }
  if (command.format == Format::json) {
    return finish("delete", to_line({{"event", "completed"},
                                     {"operation", "delete"},
                                     {"name", command.name},
                                     {"images", command.images},
                                     {"warnings", *notes}}));
  }
  return finish("delete",
                fmt::format("deleted '{}' from {}\n", printable(command.name),
                            printable(fmt::format("{}", fmt::join(command.images, ", ")))));
}

}  // namespace qvmstate::tools
