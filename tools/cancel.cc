#include "tools/cancel.h"

#include <csignal>

namespace qvmstate::tools {

namespace {

std::atomic<bool> cancelled = false;
static_assert(std::atomic<bool>::is_always_lock_free);

void on_signal(int) {
  cancelled.store(true, std::memory_order_relaxed);
}

}  // namespace

const std::atomic<bool> &catch_cancel_signals() {
  struct sigaction action = {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) {
    struct sigaction before = {};
    sigaction(number, nullptr, &before);
    if (before.sa_handler != SIG_IGN) {
      sigaction(number, &action, nullptr);
    }
  }
  return cancelled;
}

}  // namespace qvmstate::tools
