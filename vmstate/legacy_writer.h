// Where a page becomes bytes: the legacy stream, written in one pass over stopped RAM.
//
// File header; configuration section; "ram" START (block list), PART (one PAGE or ZERO record for
// every page of every block), END; the device sections as QEMU wrote them; EOF; vmdescription.
// Every page gets a record, because a hot loadvm leaves a page stale that has none. Loads in every
// QEMU since 2.4.
#pragma once

#include <span>

#include "qcow2/io/result.h"
#include "qcow2/io/stream_buffer.h"
#include "vmstate/device_sections.h"
#include "vmstate/ram_source.h"
#include "vmstate/stream_parts.h"

namespace qvmstate::vmstate {

/// Writes all of it and finishes `out`.
Result<StreamStats> write_legacy_stream(io::StreamBuffer &out,
                                        const StreamConfiguration &configuration, RamSource &ram,
                                        std::span<const DeviceSection> devices,
                                        const RamHook &hook);

}  // namespace qvmstate::vmstate
