// The VM state of a host, written into the vmstate area of an image in one of the two layouts.
//
// Threads: one at a time; write_ram() may start others, which have ended when it returns.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "plugin/abi/host_ram.h"
#include "plugin/abi/page_release.h"
#include "plugin/abi/session.h"
#include "qcow2/image_set.h"
#include "qcow2/io/result.h"
#include "vmstate/device_sections.h"
#include "vmstate/dirty_pages.h"
#include "vmstate/stream_parts.h"

namespace qvmstate::abi {

struct StatePlan {
  Session &session;
  qcow2::SetSave &transaction;
  vmstate::StreamConfiguration configuration;
  std::vector<HostBlock> blocks;
  bool live;             ///< RAM changes while it is written, and comes more than once
  unsigned channels;     ///< of mapped-ram
  PageRelease *release;  ///< or null: RAM is kept
  vmstate::RamHook hook;
};

class StateWriter {
 public:
  virtual ~StateWriter() = default;
  /// All pages, or in a later round the dirty ones.
  virtual Result<void> write_ram(const vmstate::DirtyPages *dirty) = 0;
  /// The rest. When it returns all of the state is in the image's file, and nothing in flight.
  virtual Result<vmstate::StreamStats> finish(std::span<const vmstate::DeviceSection> sections) = 0;
  /// By its own Files: the session's are not among them.
  virtual uint64_t written_bytes() const = 0;
};

Result<std::unique_ptr<StateWriter>> begin_legacy_state(const StatePlan &plan);
Result<std::unique_ptr<StateWriter>> begin_mapped_state(const StatePlan &plan);

}  // namespace qvmstate::abi
