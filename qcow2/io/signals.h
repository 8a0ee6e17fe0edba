// Signals belong to the program that we are a guest in: its threads handle them, never ours.
#pragma once

#include <signal.h>

namespace qvmstate::io {

/// Blocks all signals in the calling thread while it lives. A thread or process that is started
/// meanwhile begins with them blocked.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked &) = delete;
  SignalsBlocked &operator=(const SignalsBlocked &) = delete;

 private:
  sigset_t before_;
};

}  // namespace qvmstate::io
