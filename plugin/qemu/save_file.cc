#include "plugin/qemu/save_file.h"

#include "plugin/qemu/preflight.h"
#include "plugin/qemu/save_state.h"
#include "plugin/qemu/stopped_vm.h"
#include "qcow2/io/file_placement.h"
#include "vmstate/device_sections.h"

namespace qvmstate::qemu {
namespace {

/// What the guest's RAM and devices are written to while it stands.
struct FileSave {
  LiveVm &vm;
  const SaveOptions &options;
  const Observer &observer;
  const Machine &machine;
  Seat seat;
  Clock::time_point begin;
  io::TargetFile &target;
  uint64_t legacy_bytes_max;
  std::vector<io::BufferPool> &pools;
  SaveReport &report;
};

Result<void> write_file(FileSave &save, std::span<const std::byte> device_bytes) {
  const auto data_begin = Clock::now();
  QV_ASSIGN(const auto sections, vmstate::split_device_sections(device_bytes));
  // Looked up again: memory may have been plugged since.
  QV_ASSIGN(std::vector<GuestRam> ram,
            open_ram(save.vm, save.seat, std::max(1U, save.target.channels())));
  io::FilePlacement placement(save.target.offset());
  // What is not written is what a loader's own fresh RAM is, as in QEMU's own files.
  StateTarget target = {.file = &save.target.file(),
                        .sequential = &placement,
                        .fixed = &placement,
                        .start_bytes = save.target.offset(),
                        .grows = !save.target.is_block_device(),
                        .legacy_bytes_max = save.legacy_bytes_max};
  for (unsigned i = 0; i < save.target.channels(); ++i) {
    target.channels.push_back(&save.target.channel(i));
  }
  auto written = write_state(target, save.machine, ram, save.pools, sections, save.options,
                             save.observer, save.begin);
  if (!written) {
    return tl::unexpected(with_context(written.error(), save.target.name()));
  }
  report_progress(save.observer,
                  {"committing", written->ram_bytes, written->ram_bytes,
                   save.target.bytes_written(), seconds_between(save.begin, Clock::now())});
  QV_TRY(check_cancelled(save.observer));
  QV_TRY(save.target.finish(save.target.offset() + written->stream_bytes));
  save.report.data_seconds = seconds_between(data_begin, Clock::now());
  save.report.written_bytes = save.target.bytes_written();
  save.report.target_bytes = written->stream_bytes;
  report_stats(*written, target, save.report);
  return {};
}

}  // namespace

Result<SaveReport> save_file(LiveVm &vm, const SaveOptions &options, GivenDescriptors &given,
                             const Observer &observer, Seat seat, Clock::time_point begin) {
  const bool mapped_ram = options.layout == SaveLayout::mapped_ram;
  SaveReport report = begin_report(vm, options, seat);
  QV_TRY(given.check());
  QV_ASSIGN(vm.running, check_state(*vm.qmp));
  QV_ASSIGN(
      const Machine machine,
      check_machine(*vm.qmp, vm.pid, mapped_ram ? Purpose::mapped_ram_file : Purpose::legacy_file));
  report.machine_type = machine.type;
  report.was_running = vm.running;
  if (mapped_ram && !vm.qmp->is_at_least(9, 0)) {
    report.warnings.push_back("QEMU " + report.qemu_version +
                              " cannot load a file in the mapped-ram layout; 9.0 or later can");
  }
  QV_ASSIGN(const RamEstimate ram, look_at_ram(vm, seat, report));
  const unsigned channels = channels_for(options, ram.total_bytes);
  SaveOptions target_options = options;
  target_options.depth = channels == 0 ? options.depth : channel_depth;
  std::vector<io::BufferPool> pools;  // outlives the files, which have registered its buffers
  QV_ASSIGN(auto target, open_save_target(*vm.qmp, vm.pid, target_options, channels, given));
  const uint64_t state_bytes_max = stream_bytes_max(ram) + device_bytes_expected;
  QV_TRY(target->check_room(state_bytes_max));
  report.target = target->name();
  if (observer.warning) {
    for (const std::string &warning : report.warnings) {
      observer.warning(warning);
    }
  }
  FileSave save = {vm,    options, observer,        machine, seat,
                   begin, *target, state_bytes_max, pools,   report};
  auto paused = while_stopped(
      vm, observer, "file", seat, HandoverKind::device_state, begin,
      [&](std::span<const std::byte> device_bytes) { return write_file(save, device_bytes); });
  if (!paused) {
    // A file that is already there stays: then only giving the VM back has failed.
    if (auto undone = target->abort(); !undone) {
      paused.error().message += "; and undoing it: " + undone.error().message;
    }
    return tl::unexpected(paused.error());
  }
  report.pause_seconds = *paused;
  report.pauses_seconds = {*paused};
  report.total_seconds = seconds_between(begin, Clock::now());
  return report;
}

}  // namespace qvmstate::qemu
