#include "tools/state_work.h"

#include <fmt/format.h>

#include <utility>

#include "tools/cancel.h"
#include "tools/state_source.h"
#include "vmstate/snapshot_source.h"
#include "vmstate/state_check.h"

namespace qvmstate::tools {

Result<FoundSnapshot> found_snapshot(const qcow2::Image &image, const std::string &name) {
  FoundSnapshot state;
  QV_ASSIGN(state.snapshot, named_snapshot(image, name));
  state.name = fmt::format("{}: snapshot '{}'", image.name(), name);
  if (state.snapshot->vmstate_bytes == 0) {
    return fail(ErrorCode::not_found, state.name + ": has no VM state, only that of the disk");
  }
  state.opener = [&image,
                  snapshot = state.snapshot]() -> Result<std::unique_ptr<vmstate::StreamSource>> {
    QV_ASSIGN(auto source, vmstate::SnapshotSource::reopen(image, *snapshot, {}));
    return std::unique_ptr<vmstate::StreamSource>(std::move(source));
  };
  return state;
}

Result<CheckedSnapshot> check_snapshot(FoundSnapshot found) {
  CheckedSnapshot state{std::move(found), {}};
  qcow2::Findings findings;
  QV_ASSIGN(vmstate::StateCheck check,
            vmstate::check_state(state.opener, vmstate::parse_checksum(state.snapshot->more_extra),
                                 state.name, findings));
  for (const qcow2::Finding &finding : findings.list()) {
    const bool damaged = finding.kind == qcow2::FindingKind::damage;
    if (damaged || !check.stream) {
      return fail(damaged ? ErrorCode::bad_stream : ErrorCode::not_supported, finding.message);
    }
  }
  state.stream = std::move(*check.stream);
  return state;
}

Result<CheckedSnapshot> checked_snapshot(const qcow2::Image &image, const std::string &name) {
  QV_ASSIGN(FoundSnapshot found, found_snapshot(image, name));
  return check_snapshot(std::move(found));
}

Result<std::unique_ptr<vmstate::StoredState>> stored_state(const CheckedSnapshot &state) {
  auto stored = vmstate::StoredState::open(state.opener);
  if (!stored) {
    return tl::unexpected(with_context(std::move(stored).error(), state.name));
  }
  return stored;
}

vmstate::TransferHook cancel_hook() {
  return [&cancelled = catch_cancel_signals()]() -> Result<void> {
    return cancelled ? fail(ErrorCode::cancelled, "cancelled") : Result<void>();
  };
}

}  // namespace qvmstate::tools
