// What the bytes of a device section mean, as JSON: by the vmdescription that QEMU writes behind a
// stream, and for the CPUs of streams without one by layouts of our own (cpu_layouts.h).
//
// The description is trusted no further than the bytes go: a section that it does not fit exactly
// comes as raw hexadecimal. Source of the facts: QEMU docs/devel/migration, migration/vmstate.c,
// scripts/analyze-migration.py (reference).
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "vmstate/stream_reader.h"

namespace qvmstate::vmstate {

/// Keys in the order of the stream.
using DecodedJson = nlohmann::ordered_json;

/// Two digits a byte.
std::string to_hex(std::span<const std::byte> bytes);

class SectionDecoder {
 public:
  /// What is no description counts as none.
  explicit SectionDecoder(const StreamSummary &stream);

  /// name, instance, version, size; and either "fields" (with "subsections" where there are some)
  /// or "raw". `rest` in a section by a layout of ours: the bytes that it does not name.
  DecodedJson decode(const StreamSection &section, std::span<const std::byte> body) const;

 private:
  DecodedJson description_;
  std::vector<DecodedJson> cpu_layouts_;  ///< empty: of an unknown CPU
};

}  // namespace qvmstate::vmstate
