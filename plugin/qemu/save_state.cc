#include "plugin/qemu/save_state.h"

#include <algorithm>
#include <optional>
#include <thread>

#include "plugin/qemu/stopped_vm.h"
#include "qcow2/io/stream_buffer.h"
#include "vmstate/aligned_group.h"
#include "vmstate/aligned_writer.h"
#include "vmstate/channel_count.h"
#include "vmstate/legacy_writer.h"
#include "vmstate/mapped_ram_writer.h"

namespace qvmstate::qemu {
namespace {

constexpr milliseconds progress_interval{50};
constexpr milliseconds rate_slice{50};

/// Follows the stream: progress, cancelling, rate.
class Pace {
 public:
  Pace(const Observer &observer, uint64_t rate_bytes_per_second, uint64_t ram_bytes,
       Clock::time_point begin)
      : observer_(observer), rate_(rate_bytes_per_second), begin_(begin) {
    progress_.phase = "writing";
    progress_.ram_bytes_total = ram_bytes;
  }

  Result<void> ram_done(uint64_t bytes) {
    progress_.ram_bytes_done = bytes;
    return tell();
  }
  Result<void> flushed(uint64_t bytes) {
    progress_.bytes_written = bytes;
    QV_TRY(tell());
    if (rate_ == 0) {
      return {};
    }
    if (!rate_begin_) {
      rate_begin_ = Clock::now();
    }
    const auto due =
        *rate_begin_ + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(
                           static_cast<double>(bytes) / static_cast<double>(rate_)));
    while (Clock::now() < due) {
      std::this_thread::sleep_for(std::min<Clock::duration>(due - Clock::now(), rate_slice));
      QV_TRY(tell());
    }
    return {};
  }

 private:
  Result<void> tell() {
    QV_TRY(check_cancelled(observer_));
    const auto now = Clock::now();
    if (now - told_ >= progress_interval) {
      told_ = now;
      progress_.seconds = seconds_between(begin_, now);
      report_progress(observer_, progress_);
    }
    return {};
  }

  const Observer &observer_;
  uint64_t rate_;
  Clock::time_point begin_;
  std::optional<Clock::time_point> rate_begin_;
  Clock::time_point told_{};
  Progress progress_;
};

Result<vmstate::StreamStats> write_sequential(const StateTarget &target,
                                              const vmstate::StreamConfiguration &configuration,
                                              std::vector<GuestRam> &ram,
                                              std::vector<io::BufferPool> &pools,
                                              std::span<const vmstate::DeviceSection> devices,
                                              const SaveOptions &options, Pace &pace) {
  QV_ASSIGN(io::BufferPool pool, io::BufferPool::create(options.buffers));
  pools.push_back(std::move(pool));
  target.file->backend().register_buffers(pools.back().memory());
  if (target.grows) {
    QV_TRY(target.file->resize(target.start_bytes + target.legacy_bytes_max));
  }
  vmstate::StreamDigest digest;
  io::DataHook hash;
  const bool is_aligned = target.group_bytes != 0;
  if (target.checksum && !is_aligned) {
    hash = [&](std::span<const std::byte> data) { digest.add(data); };
  }
  io::StreamBuffer stream(
      *target.file, pools.back(), *target.sequential,
      [&](uint64_t bytes) { return pace.flushed(bytes); }, std::move(hash));
  const vmstate::LoadOrder order = vmstate::qemu_load_order(devices);
  const vmstate::RamHook ram_done = [&](uint64_t bytes) { return pace.ram_done(bytes); };
  if (is_aligned) {
    vmstate::AlignedOptions aligned = {
        .group_bytes = target.group_bytes, .base = target.base, .groups = target.groups};
    for (size_t i = 1; i < ram.size(); ++i) {
      aligned.ram_again.push_back(ram[i].source.get());
    }
    return vmstate::write_aligned_stream(stream, configuration, *ram.front().source, order, aligned,
                                         ram_done);
  }
  QV_ASSIGN(
      vmstate::StreamStats stats,
      vmstate::write_legacy_stream(stream, configuration, *ram.front().source, order, ram_done));
  if (target.checksum) {
    stats.checksum = digest.finish();
  }
  return stats;
}

Result<vmstate::StreamStats> write_mapped_ram(const StateTarget &target,
                                              const vmstate::StreamConfiguration &configuration,
                                              std::vector<GuestRam> &ram,
                                              std::vector<io::BufferPool> &pools,
                                              std::span<const vmstate::DeviceSection> devices,
                                              const SaveOptions &options, Pace &pace) {
  vmstate::MappedWriteOptions mapped;
  mapped.start_bytes = target.start_bytes;
  mapped.all_pages_present = target.all_pages_present;
  mapped.checksum = target.checksum;
  mapped.depth = channel_depth;
  const vmstate::LoadOrder order = vmstate::qemu_load_order(devices);
  QV_ASSIGN(auto writer, vmstate::MappedRamWriter::plan(configuration, ram.front().source->blocks(),
                                                        order.before_ram, mapped));
  if (target.grows) {
    QV_TRY(target.file->resize(writer.pages_end_bytes()));
  }
  const size_t count = target.channels.size();
  const size_t buffers = std::max<size_t>(io::buffer_count_min, options.buffers / count);
  std::vector<vmstate::RamChannel> channels;
  for (size_t i = 0; i < count; ++i) {
    QV_ASSIGN(
        io::BufferPool pool,
        io::BufferPool::create(buffers, vmstate::MappedRamWriter::chunk_bytes(*target.fixed)));
    pools.push_back(std::move(pool));
  }
  for (size_t i = 0; i < count; ++i) {
    target.channels[i]->backend().register_buffers(pools[i].memory());
    channels.push_back({target.channels[i], ram[i].source.get(), &pools[i]});
  }
  auto follow = [&](uint64_t ram_bytes, uint64_t queued_bytes) -> Result<void> {
    QV_TRY(pace.ram_done(ram_bytes));
    return pace.flushed(queued_bytes);
  };
  QV_TRY(writer.write_pages(channels, *target.fixed, follow));
  return writer.finish(*target.file, *target.fixed, order.after_ram);
}

}  // namespace

SaveLayout layout_of(const SaveOptions &options) {
  if (options.layout != SaveLayout::automatic) {
    return options.layout;
  }
  return options.base.empty() ? SaveLayout::legacy : SaveLayout::stream_aligned;
}

const char *layout_name(SaveLayout layout) {
  switch (layout) {
    case SaveLayout::automatic:
    case SaveLayout::legacy:
      return "legacy";
    case SaveLayout::mapped_ram:
      return "mapped-ram";
    case SaveLayout::stream_aligned:
      return "stream-aligned";
  }
  return "unknown";
}

unsigned channels_for(const SaveOptions &options, uint64_t ram_bytes) {
  if (options.layout != SaveLayout::mapped_ram) {
    return 0;
  }
  return options.channels != 0 ? options.channels : vmstate::default_channels(ram_bytes);
}

Result<RamEstimate> look_at_ram(LiveVm &vm, Seat seat, SaveReport &report) {
  QV_ASSIGN(const std::vector<GuestRam> ram, open_ram(vm, seat));
  for (const std::string &warning : ram.front().map->warnings()) {
    report.warnings.push_back(warning);
  }
  RamEstimate estimate;
  QV_ASSIGN(estimate.touched_bytes, ram.front().map->touched_bytes());
  estimate.total_bytes = vmstate::total_bytes(ram.front().source->blocks());
  return estimate;
}

uint64_t stream_bytes_max(const RamEstimate &ram) {
  return ram.touched_bytes + ram.total_bytes / 4096 * 9;
}

uint64_t aligned_bytes_expected(const RamEstimate &ram, uint64_t group_bytes) {
  constexpr uint64_t blocks_expected = 32;  // each begins a group
  const uint64_t data_bytes = vmstate::pages_per_group(group_bytes) * vmstate::aligned_page_bytes;
  return (divide_up(ram.touched_bytes, data_bytes) + blocks_expected) * group_bytes +
         ram.total_bytes / vmstate::aligned_page_bytes * 9;
}

SaveReport begin_report(const LiveVm &vm, const SaveOptions &options, Seat seat) {
  SaveReport report;
  report.name = options.name;
  report.source = seat == Seat::plugin ? "plugin" : "attach";
  report.layout = layout_name(layout_of(options));
  report.base = options.base;
  report.qemu_version = vm.qmp->version();
  return report;
}

void report_stats(const vmstate::StreamStats &stats, const StateTarget &target,
                  SaveReport &report) {
  report.ram_bytes = stats.ram_bytes;
  report.data_pages = stats.data_pages;
  report.zero_pages = stats.zero_pages;
  report.untouched_pages = stats.untouched_pages;
  report.vmstate_bytes = stats.stream_bytes;
  report.copied_bytes = stats.copied_bytes;
  report.group_bytes = target.group_bytes;
  report.written_groups = stats.written_groups;
  report.shared_groups = stats.shared_groups;
  report.read_groups = stats.read_groups;
  report.tracked_groups = stats.known_groups;
  report.channels = std::max<unsigned>(1, target.channels.size());
  const io::Backend &backend =
      (target.channels.empty() ? *target.file : *target.channels.front()).backend();
  report.io_engine = backend.name() + (backend.direct() ? " direct" : "");
}

Result<vmstate::StreamStats> write_state(const StateTarget &target, const Machine &machine,
                                         std::vector<GuestRam> &ram,
                                         std::vector<io::BufferPool> &pools,
                                         std::span<const vmstate::DeviceSection> devices,
                                         const SaveOptions &options, const Observer &observer,
                                         Clock::time_point begin) {
  const vmstate::StreamConfiguration configuration = {machine.type, machine.target_page_bits,
                                                      machine.page_bytes};
  Pace pace(observer, options.rate_limit_bytes_per_second,
            vmstate::total_bytes(ram.front().source->blocks()), begin);
  return target.channels.empty()
             ? write_sequential(target, configuration, ram, pools, devices, options, pace)
             : write_mapped_ram(target, configuration, ram, pools, devices, options, pace);
}

}  // namespace qvmstate::qemu
