#include "plugin/qemu/save_live.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>

#include "plugin/qemu/live_ram.h"
#include "plugin/qemu/marks.h"
#include "plugin/qemu/process_files.h"
#include "plugin/qemu/protectable_ram.h"
#include "plugin/qemu/stopped_vm.h"
#include "qcow2/header.h"
#include "qcow2/image_set.h"
#include "vmstate/device_sections.h"

namespace qvmstate::qemu {
namespace {

/// The way out of what --live needs and cannot have.
template <class T>
Result<T> or_without_live(Result<T> result) {
  if (!result) {
    result.error().message += "; or save without --live";
  }
  return result;
}

Result<void> check_kind(const std::vector<HostRamBlock> &blocks) {
  QV_ASSIGN(const MemoryMap map, MemoryMap::read(::getpid(), blocks));
  return or_without_live(check_protectable(blocks, map));
}

/// No stream of this RAM can be longer, in whatever order the pages come.
uint64_t stream_bytes_limit(std::span<const vmstate::RamBlock> blocks, uint64_t device_bytes,
                            size_t sections) {
  constexpr uint64_t page_record_bytes = 8 + 4096;
  constexpr uint64_t named_bytes = 256;         // more, in the first record after another block's
  constexpr uint64_t named_every = 64 * kib;    // at most
  constexpr uint64_t description_bytes = 1024;  // of a section
  uint64_t bytes = device_bytes + sections * description_bytes + 1 * mib;
  for (const vmstate::RamBlock &block : blocks) {
    bytes += block.used_bytes / 4096 * page_record_bytes +
             (block.used_bytes / named_every + 2) * named_bytes;
  }
  return bytes;
}

/// Whether the reserved clusters are still ours: a delvm of NAME.saving would give them to the
/// disk. It writes the header, flushes, and only then frees; so who looks before each write, and
/// has few in flight, stops in time.
class ReservationWatch {
 public:
  ReservationWatch(const std::vector<Disk> &disks, const qcow2::Reservation &reservation)
      : disks_(disks), reservation_(reservation) {}

  Result<void> open() {
    QV_ASSIGN(file_, io::File::open(own_descriptor_path(disk().image.get()),
                                    {.direct = io::DirectMode::off, .engine = io::Engine::threads},
                                    disk().file));
    return {};
  }

  Result<void> check() {
    Switch now;
    QV_TRY(file_->read_at(now, HostOffset(qcow2::switch_offset)));
    if (now == seen_) {
      return {};
    }
    QV_ASSIGN(const WatchedImages watched, WatchedImages::open(disks_));
    QV_TRY(qcow2::find_reserved(*watched.images()[reservation_.primary], reservation_,
                                reservation_.primary));
    seen_ = now;
    return {};
  }

 private:
  using Switch = std::array<std::byte, qcow2::switch_bytes>;

  const Disk &disk() const { return disks_[reservation_.primary]; }

  const std::vector<Disk> &disks_;
  const qcow2::Reservation &reservation_;
  std::unique_ptr<io::File> file_;
  Switch seen_ = {};  // of the header, when the snapshot was last seen
};

class LiveSave {
 public:
  explicit LiveSave(SaveContext &context) : context_(context) {}

  Result<void> run(WriteProtection protection) {
    auto done = handover(context_.observer, [&](std::span<const std::byte> device_bytes) {
      return begin(device_bytes, std::move(protection));
    });
    if (done) {
      done = copy();
    }
    ram_.clear();  // whatever happened, nobody waits for us any more
    if (done) {
      done = check_disks();
    }
    if (done) {
      done = handover(context_.observer, [&](auto) { return finish(); });
    }
    if (done || !reserved_) {
      return done;
    }
    Error first = std::move(done).error();
    Observer determined = context_.observer;
    determined.cancelled = nullptr;
    if (auto dropped = handover(determined, [&](auto) { return drop(); }); !dropped) {
      first.message += "; the snapshot '" + context_.options.name +
                       ".saving' is left, which the next save, delete or resume removes (" +
                       dropped.error().message + ")";
    }
    return tl::unexpected(std::move(first));
  }

 private:
  Result<void> handover(const Observer &observer, const StoppedWork &work) {
    QV_ASSIGN(context_.vm.running, check_state(*context_.vm.qmp));
    QV_ASSIGN(const double seconds,
              while_stopped(context_.vm, observer, context_.options.name, context_.seat,
                            HandoverKind::images, context_.begin, work));
    context_.report.pauses_seconds.push_back(seconds);
    return {};
  }

  const Disk &disk() const { return context_.vm.disks[context_.vmstate_disk]; }

  // ---- in the first handover

  Result<void> begin(std::span<const std::byte> device_bytes, WriteProtection protection) {
    device_bytes_.assign(device_bytes.begin(), device_bytes.end());
    QV_ASSIGN(sections_, vmstate::split_device_sections(device_bytes_));
    QV_ASSIGN(const uint64_t clock_nanos, vmstate::vm_clock_nanos(sections_));
    QV_ASSIGN(blocks_, ram_blocks_from_inside(*context_.vm.qmp));
    QV_TRY(check_kind(blocks_));  // once more: memory may have been plugged since
    QV_ASSIGN(OwnedImages owned, own_images(context_, metadata_options()));
    QV_ASSIGN(auto live, LiveRam::begin(blocks_, std::move(protection)));
    const qcow2::NewSnapshot snapshot = new_snapshot(context_.options, clock_nanos);
    QV_ASSIGN(reservation_,
              qcow2::reserve_set(
                  owned.images(), context_.vmstate_disk, snapshot, context_.options.replace,
                  stream_bytes_limit(live->blocks(), device_bytes.size(), sections_.size())));
    reserved_ = true;
    geometry_ = owned.images()[context_.vmstate_disk]->geometry();
    note_metadata(owned);
    live_ = live.get();
    ram_.push_back({std::move(live), nullptr});
    return {};
  }

  // ---- while the guest runs

  Result<void> copy() {
    const auto data_begin = Clock::now();
    io::OpenOptions options;
    options.writable = true;
    // As QEMU does: what it has in the page cache O_DIRECT would leave stale.
    options.direct = disk().page_cache ? io::DirectMode::off : context_.options.direct;
    // Not io_uring: threads of QEMU's process are gone before its locks are, so that no write of
    // ours comes after another program has got the image.
    options.engine = io::Engine::threads;
    options.depth = context_.options.depth;
    std::vector<io::BufferPool> pools;  // outlive the file
    QV_ASSIGN(auto file,
              io::File::open(own_descriptor_path(disk().image.get()), options, disk().file));
    ReservationWatch watch(context_.vm.disks, reservation_);
    QV_TRY(watch.open());
    qcow2::ReservedArea area(reservation_.runs, geometry_, disk().file,
                             [&] { return watch.check(); });
    StateTarget target;
    target.file = file.get();
    target.sequential = &area;
    target.checksum = true;
    auto written = write_state(target, context_.machine, ram_, pools, sections_, context_.options,
                               context_.observer, context_.begin);
    if (!written) {
      return tl::unexpected(with_context(written.error(), describe(disk())));
    }
    QV_TRY(file->sync());
    QV_TRY(or_without_live(check_not_merged(blocks_)));  // KSM may have been switched on
    QV_ASSIGN(const LiveRam::Statistics statistics, live_->finish());
    stats_ = *written;
    SaveReport &report = context_.report;
    report_stats(stats_, target, report);
    report.writes_served = statistics.writes_served;
    report.writes_delayed = statistics.writes_delayed;
    report.data_seconds = seconds_between(data_begin, Clock::now());
    report.written_bytes += file->bytes_written();
    return check_cancelled(context_.observer);
  }

  /// Disks that came or went would not have the snapshot.
  Result<void> check_disks() {
    QV_ASSIGN(const std::vector<Disk> now, find_disks(*context_.vm.qmp, context_.vm.pid));
    if (!std::ranges::equal(now, context_.vm.disks, {}, &Disk::node, &Disk::node)) {
      return fail(ErrorCode::bad_state,
                  "the VM's disks were changed while it was saved; save again");
    }
    return {};
  }

  // ---- in the second handover

  Result<void> finish() {
    report_progress(context_.observer,
                    {"committing", stats_.ram_bytes, stats_.ram_bytes,
                     context_.report.written_bytes, seconds_between(context_.begin, Clock::now())});
    QV_ASSIGN(OwnedImages owned, OwnedImages::open(context_.vm.disks, metadata_options()));
    QV_ASSIGN(const auto transaction,
              qcow2::SetSave::begin_finish(owned.images(), reservation_, context_.options.replace,
                                           stats_.stream_bytes));
    transaction->set_more_extra(vmstate::format_checksum(*stats_.checksum));
    QV_TRY(transaction->commit(stats_.stream_bytes));
    note_metadata(owned);
    return {};
  }

  Result<void> drop() {
    QV_ASSIGN(OwnedImages owned, OwnedImages::open(context_.vm.disks, metadata_options()));
    return qcow2::drop_reservation(owned.images(), context_.options.name);
  }

  io::OpenOptions metadata_options() const {
    io::OpenOptions options;
    options.direct = context_.options.direct;
    options.engine = io::Engine::threads;
    return options;
  }

  void note_metadata(OwnedImages &owned) {
    std::vector<DiskReport> &disks = context_.report.disks;
    for (size_t i = 0; i < context_.vm.disks.size(); ++i) {
      if (disks.size() == i) {
        disks.push_back({context_.vm.disks[i].node, context_.vm.disks[i].file,
                         reservation_.snapshots[i].id, i == context_.vmstate_disk, 0});
      }
      disks[i].metadata_bytes += owned.file(i).bytes_written();
      context_.report.written_bytes += owned.file(i).bytes_written();
    }
  }

  SaveContext &context_;
  std::vector<std::byte> device_bytes_;
  std::vector<vmstate::DeviceSection> sections_;  // of device_bytes_
  std::vector<HostRamBlock> blocks_;
  qcow2::Reservation reservation_;
  bool reserved_ = false;
  qcow2::Geometry geometry_;
  LiveRam *live_ = nullptr;  // of ram_
  std::vector<GuestRam> ram_;
  vmstate::StreamStats stats_;
};

}  // namespace

Result<WriteProtection> check_live(LiveVm &vm, const Disk &disk, io::DirectMode direct, Seat seat) {
  if (seat != Seat::plugin) {
    return fail(ErrorCode::bad_argument,
                "--live needs the plugin in QEMU (-plugin libqvmstate.so, then save --control)");
  }
  if (disk.page_cache && direct == io::DirectMode::on) {
    return fail(ErrorCode::bad_argument,
                describe(disk) +
                    ": QEMU uses the page cache for it, which O_DIRECT beside it would leave "
                    "stale; leave out --direct on, or give the drive cache=none");
  }
  QV_ASSIGN(const Json devices, vm.qmp->execute("query-memory-devices"));
  if (!devices.empty()) {
    return fail(ErrorCode::not_supported,
                "the VM has memory devices (" + text_at(at(devices.front(), "data"), "id", "dimm") +
                    "), which could be unplugged while they are read; save without --live");
  }
  QV_ASSIGN(const std::vector<HostRamBlock> blocks, ram_blocks_from_inside(*vm.qmp));
  QV_TRY(check_kind(blocks));
  QV_TRY(or_without_live(check_not_merged(blocks)));
  return or_without_live(WriteProtection::open());
}

Result<void> save_live(SaveContext &context, WriteProtection protection) {
  // Held between the handovers too, so that no other operation begins.
  QV_ASSIGN(Mark mark,
            Mark::leave(*context.vm.qmp, context.vm.running, "live " + context.options.name));
  context.vm.marks = 1;
  auto done = LiveSave(context).run(std::move(protection));
  mark.unlock();
  forget_marks(*context.vm.qmp);
  return done;
}

}  // namespace qvmstate::qemu
