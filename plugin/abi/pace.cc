#include "plugin/abi/pace.h"

namespace qvmstate::abi {
namespace {

constexpr std::chrono::milliseconds interval{50};

}  // namespace

Result<void> Pace::check() const {
  if (cancelled_) {
    return fail(ErrorCode::cancelled, std::string(what_) + ": cancelled");
  }
  return {};
}

Result<void> Pace::follow(uint64_t ram_bytes_done) {
  QV_TRY(check());
  const auto now = std::chrono::steady_clock::now();
  if (progress_ == nullptr || (now - told_ < interval && ram_bytes_done != total_)) {
    return {};
  }
  told_ = now;
  const qvmstate_progress progress = {sizeof progress, 0, ram_bytes_done, total_};
  if (progress_(user_, &progress) != 0) {
    cancel();
  }
  return check();
}

}  // namespace qvmstate::abi
