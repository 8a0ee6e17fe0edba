// What goes wrong in a call of the C ABI: the errors of the layers below, and those that only a
// host can cause.
#pragma once

#include <string>
#include <tl/expected.hpp>
#include <utility>

#include "plugin/qvmstate.h"
#include "qcow2/io/result.h"

namespace qvmstate::abi {

struct Failure {
  int code;  ///< enum qvmstate_code
  int sys_errno = 0;
  std::string message;

  Failure(int code_of_abi, std::string text, int number = 0)
      : code(code_of_abi), sys_errno(number), message(std::move(text)) {}
  // So that QV_TRY and QV_ASSIGN take both kinds of results.
  Failure(Error error);  // NOLINT(google-explicit-constructor)
};

template <class T>
using Outcome = tl::expected<T, Failure>;

inline tl::unexpected<Failure> refuse(int code, std::string message) {
  return tl::unexpected(Failure(code, std::move(message)));
}

/// `error` may be null.
void report(const Failure &failure, qvmstate_error *error) noexcept;

}  // namespace qvmstate::abi
