// The state of a stopped VM, written to wherever it goes, in the layout that was asked for.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "plugin/qemu/guest_ram.h"
#include "plugin/qemu/operations.h"
#include "plugin/qemu/preflight.h"
#include "plugin/qemu/qmp.h"
#include "qcow2/io/buffer_pool.h"
#include "qcow2/io/file.h"
#include "qcow2/io/placement.h"
#include "vmstate/aligned_group.h"
#include "vmstate/base_state.h"
#include "vmstate/device_sections.h"
#include "vmstate/stream_parts.h"

namespace qvmstate::qemu {

/// Of each channel: small writes between zero pages need many at a time.
constexpr unsigned channel_depth = 32;

/// As asked for, or what that means.
SaveLayout layout_of(const SaveOptions &options);
const char *layout_name(SaveLayout layout);

/// Threads that write RAM: as the user said, or as many as the CPUs and the RAM are good for; 0 for
/// a stream, which has one writer.
unsigned channels_for(const SaveOptions &options, uint64_t ram_bytes);

/// What devices may take, when room for them is estimated.
constexpr uint64_t device_bytes_expected = 16 * mib;

struct StateTarget {
  io::File *file = nullptr;                ///< for all but the channels
  std::vector<io::File *> channels = {};   ///< none: a stream from its begin to its end
  io::Placement *sequential = nullptr;     ///< for that
  uint64_t group_bytes = 0;                ///< the stream is stream-aligned, in groups of these
  vmstate::BaseState *base = nullptr;      ///< what it can share, if anything
  vmstate::KnownGroups *groups = nullptr;  ///< see AlignedOptions
  io::FixedPlacement *fixed = nullptr;     ///< for mapped-ram
  uint64_t start_bytes = 0;                ///< of the stream in a plain file
  bool all_pages_present = false;          ///< see MappedWriteOptions
  bool checksum = false;                   ///< of the stream, for StreamStats::checksum
  /// A plain file is made as long as it will be first: writes past a file's end wait for each
  /// other.
  bool grows = false;
  uint64_t legacy_bytes_max = 0;  ///< how long a legacy stream can become, for that
};

struct RamEstimate {
  uint64_t touched_bytes = 0;  ///< so far
  uint64_t total_bytes = 0;
};
/// While the guest runs. Opens its RAM once, which can be refused; warnings go into the report.
Result<RamEstimate> look_at_ram(LiveVm &vm, Seat seat, SaveReport &report);

/// An upper bound of the stream's bytes that are written: touched pages with their headers, a ZERO
/// record for each other one.
uint64_t stream_bytes_max(const RamEstimate &ram);
/// About as many as groups of the layout stream-aligned take, where touched pages lie together.
uint64_t aligned_bytes_expected(const RamEstimate &ram, uint64_t group_bytes);

/// What is known at the begin.
SaveReport begin_report(const LiveVm &vm, const SaveOptions &options, Seat seat);
void report_stats(const vmstate::StreamStats &stats, const StateTarget &target, SaveReport &report);

/// Returns what was written once it all is; nothing is in flight then, nor after an error. RAM is
/// one source for each channel, or one. `pools` gets the buffers, which must outlive the files.
Result<vmstate::StreamStats> write_state(const StateTarget &target, const Machine &machine,
                                         std::vector<GuestRam> &ram,
                                         std::vector<io::BufferPool> &pools,
                                         std::span<const vmstate::DeviceSection> devices,
                                         const SaveOptions &options, const Observer &observer,
                                         Clock::time_point begin);

}  // namespace qvmstate::qemu
