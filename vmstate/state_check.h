// Whether a VM state is whole: its structure to the end mark, a record for each page of RAM, and,
// where it has a checksum, every byte.
//
// All of it in one pass over the stream, which is read ahead.
#pragma once

#include <optional>

#include "qcow2/findings.h"
#include "qcow2/io/result.h"
#include "vmstate/mapped_ram_reader.h"
#include "vmstate/state_checksum.h"
#include "vmstate/stream_reader.h"

namespace qvmstate::vmstate {

enum class ChecksumResult : uint8_t { none, right, wrong };

struct StateCheck {
  std::optional<StreamSummary> stream;  ///< nothing: it could not be read to its end
  ChecksumResult checksum = ChecksumResult::none;
};

/// What is wrong goes to `findings`, with `what` in front; an error means that the check could not
/// be done.
Result<StateCheck> check_state(const SourceOpener &open_source,
                               const std::optional<StateChecksum> &expected,
                               const std::string &what, qcow2::Findings &findings);

}  // namespace qvmstate::vmstate
