// The device sections of a save, held in memory until the RAM is written.
//
// Threads: one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "plugin/abi/failure.h"
#include "plugin/qvmstate.h"
#include "qcow2/io/offsets.h"
#include "vmstate/built_section.h"
#include "vmstate/device_sections.h"

namespace qvmstate::abi {

/// All sections together; with their headers they fit into what readers look at in one piece.
constexpr uint64_t sections_bytes_max = 192 * mib;

class SectionList {
 public:
  /// A section without bytes, if the host's words for it can be taken. Nothing is changed.
  Outcome<vmstate::BuiltSection> begin(const qvmstate_section &given) const;
  /// Adds bytes to a section that is not in the list yet.
  Outcome<void> put(vmstate::BuiltSection &section, const void *data, uint64_t bytes) const;
  /// Takes the section in.
  void add(vmstate::BuiltSection section);

  std::vector<vmstate::DeviceSection> sections() const;

 private:
  uint32_t unused_id(const vmstate::BuiltSection &section);

  std::deque<vmstate::BuiltSection> sections_;
  std::set<std::pair<std::string, uint32_t>> names_;
  std::set<uint32_t> ids_;
  uint32_t next_id_ = 0;
  uint64_t bytes_ = 0;  // of the bodies
};

}  // namespace qvmstate::abi
