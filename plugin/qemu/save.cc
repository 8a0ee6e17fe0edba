#include "plugin/qemu/save.h"

#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <optional>

#include "plugin/qemu/handover.h"
#include "plugin/qemu/live_vm.h"
#include "plugin/qemu/preflight.h"
#include "plugin/qemu/save_context.h"
#include "plugin/qemu/save_file.h"
#include "plugin/qemu/save_live.h"
#include "plugin/qemu/save_state.h"
#include "plugin/qemu/save_target.h"
#include "plugin/qemu/stopped_vm.h"
#include "qcow2/allocator.h"
#include "qcow2/image_set.h"
#include "qcow2/suitability.h"
#include "vmstate/aligned_group.h"
#include "vmstate/base_state.h"
#include "vmstate/channel_count.h"
#include "vmstate/device_sections.h"

namespace qvmstate::qemu {
namespace {

/// Index of the disk that gets the vmstate.
Result<size_t> choose_vmstate_disk(const LiveVm &vm, const std::string &node,
                                   std::vector<std::string> &warnings) {
  if (node.empty()) {
    return 0;
  }
  std::string known;
  for (size_t i = 0; i < vm.disks.size(); ++i) {
    const Disk &disk = vm.disks[i];
    if (disk.node == node || disk.device == node) {
      if (i != 0) {
        warnings.push_back("the vmstate goes to '" + node + "', but loadvm looks at '" +
                           vm.disks.front().node +
                           "' first and will refuse; load it with the QMP command snapshot-load");
      }
      return i;
    }
    known += (known.empty() ? "'" : ", '") + disk.node + "'";
  }
  return fail(ErrorCode::not_found,
              "no writable qcow2 disk has the node name '" + node + "'; there are " + known);
}

struct Room {
  uint64_t bytes = UINT64_MAX;
  const char *where = "";
};

/// How much an image can take up yet, as far as that can be told.
Result<Room> room_for(const Disk &disk, const qcow2::Image &image) {
  struct stat status;
  struct statvfs space;
  if (::fstat(disk.image.get(), &status) != 0) {
    return Room();
  }
  if (S_ISBLK(status.st_mode)) {
    QV_ASSIGN(const uint64_t bytes, qcow2::Allocator::room_on_device(image));
    return Room{bytes, "block device"};
  }
  if (::fstatvfs(disk.image.get(), &space) != 0 || space.f_blocks == 0) {
    return Room();  // some file systems (ramfs) do not tell
  }
  const uint64_t blocks = ::geteuid() == 0 ? space.f_bfree : space.f_bavail;
  return Room{blocks * space.f_frsize, "file system"};
}

uint64_t group_bytes_of(const qcow2::Image &image) {
  return std::max(vmstate::group_bytes_min, image.geometry().cluster_bytes());
}

/// How much the state may take. With a base that cannot be told; an image that becomes full is as
/// it was, as after any failure.
uint64_t bytes_needed(const SaveOptions &options, const qcow2::Image &image,
                      const RamEstimate &ram) {
  if (!options.base.empty()) {
    return 0;
  }
  return layout_of(options) == SaveLayout::stream_aligned
             ? aligned_bytes_expected(ram, group_bytes_of(image))
             : stream_bytes_max(ram);
}

Result<void> check_space(const Disk &disk, const qcow2::Image &image, uint64_t state_bytes) {
  QV_ASSIGN(const Room room, room_for(disk, image));
  const uint64_t needed_bytes = state_bytes + device_bytes_expected;
  if (needed_bytes > room.bytes) {
    return fail(ErrorCode::no_space, describe(disk) + ": the snapshot may need " +
                                         std::to_string(needed_bytes / mib) + " MiB, and its " +
                                         room.where + " has " + std::to_string(room.bytes / mib) +
                                         " MiB; make room or choose another --vmstate-node");
  }
  return {};
}

/// QEMU's loadvm refuses a disk that has any. Those only in memory may be gone by then.
Result<void> check_bitmaps(const Disk &disk, const SaveOptions &options, SaveReport &report) {
  if (!disk.persistent_bitmap.empty() && !options.allow_bitmaps) {
    return fail(ErrorCode::not_supported,
                describe(disk) + ": has the persistent dirty bitmap '" + disk.persistent_bitmap +
                    "', with which loadvm refuses; remove it (block-dirty-bitmap-remove), or go "
                    "on with --allow-bitmaps and remove it before the load");
  }
  if (disk.has_bitmaps) {
    report.warnings.push_back(
        describe(disk) +
        (disk.persistent_bitmap.empty()
             ? ": has a dirty bitmap in memory; loadvm in this QEMU fails until it is removed"
             : ": has the persistent dirty bitmap '" + disk.persistent_bitmap +
                   "'; loadvm fails until it is removed"));
  }
  return {};
}

/// The snapshot that is to be the base, if one is, in the image that gets the vmstate.
Result<const qcow2::Snapshot *> find_base(const SaveOptions &options, const qcow2::Image &image) {
  if (options.base.empty()) {
    return nullptr;
  }
  const int index = qcow2::find_snapshot(image.snapshots(), options.base);
  if (index < 0) {
    return fail(ErrorCode::not_found, image.name() + ": has no snapshot named '" + options.base +
                                          "' to be the base; leave out --base for the first save");
  }
  return &image.snapshots()[static_cast<size_t>(index)];
}

/// What is known of the base.
struct Base {
  vmstate::StateChecksum checksum;
  std::vector<vmstate::Digest> digests;
};

Result<std::optional<Base>> read_base(const SaveOptions &options, const qcow2::Image &image) {
  QV_ASSIGN(const qcow2::Snapshot *snapshot, find_base(options, image));
  if (snapshot == nullptr) {
    return std::optional<Base>();
  }
  Base base;
  QV_ASSIGN(base.checksum, vmstate::check_base(image, *snapshot));
  QV_ASSIGN(base.digests, vmstate::read_kept_digests(image, *snapshot, base.checksum));
  return std::optional(std::move(base));
}

/// Everything that can be refused while the guest still runs.
Result<RamEstimate> check_before_stop(LiveVm &vm, const SaveOptions &options, size_t vmstate_disk,
                                      Seat seat, SaveReport &report) {
  const auto direct =
      options.direct == io::DirectMode::on ? io::DirectMode::on : io::DirectMode::off;
  QV_ASSIGN(const WatchedImages watched, WatchedImages::open(vm.disks, direct));
  for (size_t i = 0; i < vm.disks.size(); ++i) {
    const auto role = i == vmstate_disk ? qcow2::ImageRole::vmstate : qcow2::ImageRole::disk_only;
    QV_TRY(check_bitmaps(vm.disks[i], options, report));
    QV_TRY(qcow2::check_image_suits(*watched.images()[i], role, bitmaps_of(options),
                                    qcow2::ImageUse::held_by_qemu));
  }
  if (!qcow2::needs_recovery(watched.images())) {
    QV_TRY(qcow2::check_save_name(watched.images(), options.name, options.replace,
                                  options.live ? qcow2::SaveSteps::two : qcow2::SaveSteps::one));
  }
  QV_ASSIGN(const RamEstimate ram, look_at_ram(vm, seat, report));
  const qcow2::Image &image = *watched.images()[vmstate_disk];
  QV_ASSIGN(const qcow2::Snapshot *base, find_base(options, image));
  if (base != nullptr) {
    QV_TRY(vmstate::check_base(image, *base));
  }
  QV_TRY(check_space(vm.disks[vmstate_disk], image, bytes_needed(options, image, ram)));
  return ram;
}

/// How many threads read RAM: of a base, all that look for what has changed.
unsigned sources_for(const SaveContext &context) {
  if (context.options.base.empty()) {
    return std::max(1U, context.channels);
  }
  return context.options.channels != 0 ? context.options.channels
                                       : vmstate::default_channels(context.ram.total_bytes);
}

/// The guest stands.
vmstate::KnownGroups known_groups(SaveContext &context, const GuestRam &ram, uint64_t group_bytes) {
  if (context.known_ram != nullptr) {
    auto known = context.known_ram->begin_save(ram, group_bytes);
    if (known) {
      return *std::move(known);
    }
    context.report.untracked = known.error().message;
  }
  return vmstate::nothing_known(ram.source->blocks(), group_bytes);
}

/// The guest stands and the images are ours until this returns.
Result<void> write_snapshot(SaveContext &context, std::span<const std::byte> device_bytes) {
  SaveReport &report = context.report;
  const SaveOptions &options = context.options;
  const auto data_begin = Clock::now();
  QV_ASSIGN(const auto sections, vmstate::split_device_sections(device_bytes));
  QV_ASSIGN(const uint64_t clock_nanos, vmstate::vm_clock_nanos(sections));
  // Looked up again: memory may have been plugged since.
  QV_ASSIGN(std::vector<GuestRam> ram, open_ram(context.vm, context.seat, sources_for(context)));

  std::vector<io::BufferPool> pools;
  io::OpenOptions open_options;
  open_options.direct = options.direct;
  open_options.engine = options.engine;
  open_options.depth = options.depth;
  QV_ASSIGN(OwnedImages owned, own_images(context, open_options,
                                          {context.vmstate_disk, context.channels, channel_depth}));
  const std::vector<qcow2::Image *> &images = owned.images();
  QV_ASSIGN(const std::optional<Base> base, read_base(options, *images[context.vmstate_disk]));
  const qcow2::NewSnapshot snapshot = new_snapshot(options, clock_nanos);
  QV_ASSIGN(auto transaction,
            qcow2::SetSave::begin(
                images, context.vmstate_disk, snapshot, options.replace,
                base ? std::optional(qcow2::SetBase{options.base, base->checksum.stream_bytes})
                     : std::nullopt));
  // Whatever fails from here on is reported after the transaction was undone.
  auto undo = [&](Error error) -> Result<void> {
    if (auto undone = transaction->abort(); !undone) {
      error.message += "; and undoing it: " + undone.error().message;
    }
    return tl::unexpected(std::move(error));
  };
  qcow2::VmstateArea &area = transaction->vmstate();
  if (context.channels == 0) {
    transaction->expect_stream_bytes(
        bytes_needed(options, *images[context.vmstate_disk], context.ram) + device_bytes.size());
  } else {
    area.expect_fixed_bytes(context.ram.touched_bytes);
  }
  io::File &file = owned.file(context.vmstate_disk);
  StateTarget target = {.file = &file,
                        .sequential = &area,
                        .fixed = &area,
                        .all_pages_present = !options.sparse_bitmap,
                        .checksum = true};
  vmstate::KnownGroups groups;
  if (layout_of(options) == SaveLayout::stream_aligned) {
    target.group_bytes = group_bytes_of(*images[context.vmstate_disk]);
    groups = known_groups(context, ram.front(), target.group_bytes);
    target.groups = &groups;
  }
  std::optional<vmstate::BaseState> shared;
  if (base) {
    target.base = &shared.emplace(base->checksum, base->digests, area);
  }
  auto written_bytes = [&] {
    uint64_t bytes = file.bytes_written();
    for (const auto &channel : owned.channels()) {
      bytes += channel->bytes_written();
    }
    return bytes;
  };
  for (const auto &channel : owned.channels()) {
    target.channels.push_back(channel.get());
  }
  const uint64_t bytes_before = written_bytes();
  auto written = write_state(target, context.machine, ram, pools, sections, options,
                             context.observer, context.begin);
  if (!written) {
    return undo(with_context(written.error(), describe(context.vm.disks[context.vmstate_disk])));
  }
  const vmstate::StreamStats stats = *written;
  const uint64_t state_bytes = written_bytes() - bytes_before;
  if (context.channels != 0) {
    if (auto finished = area.finish_fixed(stats.stream_bytes); !finished) {
      return undo(finished.error());
    }
  }
  if (stats.checksum) {
    transaction->set_more_extra(vmstate::format_checksum(*stats.checksum));
  }
  if (auto synced = file.sync(); !synced) {
    return undo(synced.error());
  }
  report.data_seconds = seconds_between(data_begin, Clock::now());
  if (auto proceed = check_cancelled(context.observer); !proceed) {
    return undo(proceed.error());
  }
  report_progress(context.observer,
                  {"committing", stats.ram_bytes, stats.ram_bytes, written_bytes(),
                   seconds_between(context.begin, Clock::now())});
  QV_TRY(transaction->commit(stats.stream_bytes));
  if (context.known_ram != nullptr && target.groups != nullptr) {
    context.known_ram->end_save(std::move(groups));
  }

  report_stats(stats, target, report);
  for (size_t i = 0; i < images.size(); ++i) {
    const bool has_vmstate = i == context.vmstate_disk;
    const uint64_t bytes = has_vmstate ? written_bytes() : owned.file(i).bytes_written();
    report.written_bytes += bytes;
    report.disks.push_back({context.vm.disks[i].node, context.vm.disks[i].file, transaction->id(i),
                            has_vmstate, bytes - (has_vmstate ? state_bytes : 0)});
  }
  return {};
}

Result<SaveReport> save_snapshot(LiveVm &vm, const SaveOptions &options, const Observer &observer,
                                 Seat seat, Clock::time_point begin, KnownRam *known_ram) {
  const bool mapped_ram = options.layout == SaveLayout::mapped_ram;
  SaveReport report = begin_report(vm, options, seat);
  QV_TRY(look_at(vm));
  QV_ASSIGN(const Machine machine,
            check_machine(*vm.qmp, vm.pid,
                          mapped_ram ? Purpose::mapped_ram_snapshot : Purpose::legacy_snapshot));
  report.machine_type = machine.type;
  report.was_running = vm.running;
  if (mapped_ram && !vm.qmp->is_at_least(10, 2)) {
    report.warnings.push_back("QEMU " + report.qemu_version +
                              " cannot load a snapshot in the mapped-ram layout; 10.2 or later "
                              "can, with the migration capability mapped-ram");
  }
  QV_ASSIGN(const size_t vmstate_disk,
            choose_vmstate_disk(vm, options.vmstate_node, report.warnings));
  QV_ASSIGN(const RamEstimate ram, check_before_stop(vm, options, vmstate_disk, seat, report));
  if (observer.warning) {
    for (const std::string &warning : report.warnings) {
      observer.warning(warning);
    }
  }
  std::optional<WriteProtection> protection;
  if (options.live) {
    QV_ASSIGN(protection, check_live(vm, vm.disks[vmstate_disk], options.direct, seat));
    known_ram->forget();  // RAM can be protected by one only
  }
  const unsigned channels = channels_for(options, ram.total_bytes);
  SaveContext context = {vm,    options, observer, machine, vmstate_disk, seat,
                         begin, ram,     channels, report,  known_ram};
  if (protection) {
    QV_TRY(save_live(context, *std::move(protection)));
  } else {
    QV_ASSIGN(const double seconds,
              while_stopped(vm, observer, options.name, seat, HandoverKind::images, begin,
                            [&](std::span<const std::byte> device_bytes) {
                              return write_snapshot(context, device_bytes);
                            }));
    report.pauses_seconds.push_back(seconds);
  }
  report.pause_seconds = *std::ranges::max_element(report.pauses_seconds);
  report.total_seconds = seconds_between(begin, Clock::now());
  return report;
}

}  // namespace

Result<SaveReport> save(const std::string &qmp_path, const SaveOptions &options,
                        const Observer &observer, Seat seat, KnownRam *known_ram) {
  const auto begin = Clock::now();
  GivenDescriptors given(options);  // first of all: its numbers would be used again
  QV_TRY(check_save_options(options));
  report_progress(observer, {"looking", 0, 0, 0, 0});
  QV_ASSIGN(LiveVm vm, connect_vm(qmp_path));
  QV_TRY(check_seat(vm, seat));
  return options.to.empty() ? save_snapshot(vm, options, observer, seat, begin, known_ram)
                            : save_file(vm, options, given, observer, seat, begin);
}

Result<DeleteReport> delete_snapshot(const std::string &qmp_path, const std::string &name,
                                     const Observer &observer, Seat seat) {
  const auto begin = Clock::now();
  DeleteReport report;
  report.name = name;
  QV_ASSIGN(LiveVm vm, connect_vm(qmp_path));
  QV_TRY(check_seat(vm, seat));
  QV_TRY(look_at(vm));
  QV_TRY(check_machine(*vm.qmp, vm.pid, Purpose::deletion));
  {
    QV_ASSIGN(const WatchedImages watched, WatchedImages::open(vm.disks));
    bool found = qcow2::needs_recovery(watched.images());
    for (const qcow2::Image *image : watched.images()) {
      found = found || qcow2::find_snapshot(image->snapshots(), name) >= 0;
    }
    if (!found) {
      return fail(ErrorCode::not_found, "no disk of the VM has a snapshot named '" + name + "'");
    }
  }
  auto work = [&](std::span<const std::byte>) -> Result<void> {
    QV_ASSIGN(OwnedImages owned, OwnedImages::open(vm.disks, {}));
    const std::vector<qcow2::Image *> &images = owned.images();
    QV_ASSIGN(report.warnings, qcow2::recover_set(images));
    for (size_t i = 0; i < images.size(); ++i) {
      const int index = qcow2::find_snapshot(images[i]->snapshots(), name);
      if (index >= 0) {
        const qcow2::Snapshot &snapshot = images[i]->snapshots()[static_cast<size_t>(index)];
        report.disks.push_back(
            {vm.disks[i].node, vm.disks[i].file, snapshot.id, snapshot.vmstate_bytes != 0, 0});
      }
    }
    QV_TRY(qcow2::delete_from_set(images, name, true));
    for (DiskReport &disk : report.disks) {
      for (size_t i = 0; i < images.size(); ++i) {
        disk.metadata_bytes =
            vm.disks[i].node == disk.node ? owned.file(i).bytes_written() : disk.metadata_bytes;
      }
    }
    return {};
  };
  QV_ASSIGN(report.pause_seconds,
            while_stopped(vm, observer, "delete " + name, seat, HandoverKind::images, begin, work));
  return report;
}

Result<SaveReport> save_by_attach(const std::string &qmp_path, const SaveOptions &options,
                                  const Observer &observer) {
  return save(qmp_path, options, observer, Seat::attached, nullptr);
}

Result<DeleteReport> delete_live(const std::string &qmp_path, const std::string &name,
                                 const Observer &observer) {
  return delete_snapshot(qmp_path, name, observer, Seat::attached);
}

}  // namespace qvmstate::qemu
