// SIGINT, SIGTERM and SIGHUP as a wish to stop, for commands that have something to clean up.
#pragma once

#include <atomic>

namespace qvmstate::tools {

/// Catches them from now on (those that the caller does not ignore, as nohup does), and returns
/// what they set.
const std::atomic<bool> &catch_cancel_signals();

}  // namespace qvmstate::tools
