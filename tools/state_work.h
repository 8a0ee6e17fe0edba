// What convert, export, import and diff share: a state of a snapshot that was checked and can be
// read anywhere.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "qcow2/image.h"
#include "qcow2/io/result.h"
#include "qcow2/snapshot_table.h"
#include "vmstate/mapped_ram_reader.h"
#include "vmstate/state_transfer.h"
#include "vmstate/stored_state.h"
#include "vmstate/stream_reader.h"

namespace qvmstate::tools {

struct FoundSnapshot {
  const qcow2::Snapshot *snapshot = nullptr;
  vmstate::SourceOpener opener;  ///< further sources of the state; the image must outlive it
  std::string name;              ///< for messages: the image, and the snapshot in it
};
struct CheckedSnapshot : FoundSnapshot {
  vmstate::StreamSummary stream;
};

/// The named snapshot; refuses one without a state.
Result<FoundSnapshot> found_snapshot(const qcow2::Image &image, const std::string &name);

/// Reads its state once to its end; refuses one that is damaged, and one that has another checksum
/// than it was saved with: what is made from it would look whole. Threads: any, the image must not
/// be changed by a commit meanwhile.
Result<CheckedSnapshot> check_snapshot(FoundSnapshot found);

/// Both.
Result<CheckedSnapshot> checked_snapshot(const qcow2::Image &image, const std::string &name);

/// The state for a writer.
Result<std::unique_ptr<vmstate::StoredState>> stored_state(const CheckedSnapshot &state);

/// An error (cancelled) once the user wants to stop.
vmstate::TransferHook cancel_hook();

}  // namespace qvmstate::tools
