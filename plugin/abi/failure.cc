#include "plugin/abi/failure.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace qvmstate::abi {
namespace {

int code_of(const Error &error) {
  if (error.sys_errno == ENOMEM) {
    return QVMSTATE_NO_MEMORY;
  }
  switch (error.code) {
    case ErrorCode::no_space:
      return QVMSTATE_NO_SPACE;
    case ErrorCode::bad_image:
      return QVMSTATE_BAD_IMAGE;
    case ErrorCode::bad_stream:
      return QVMSTATE_BAD_STREAM;
    case ErrorCode::not_supported:
      return QVMSTATE_NOT_SUPPORTED;
    case ErrorCode::locked:
      return QVMSTATE_LOCKED;
    case ErrorCode::exists:
      return QVMSTATE_EXISTS;
    case ErrorCode::not_found:
      return QVMSTATE_NOT_FOUND;
    case ErrorCode::bad_argument:
      return QVMSTATE_BAD_ARGUMENT;
    case ErrorCode::permission:
      return QVMSTATE_PERMISSION;
    case ErrorCode::bad_state:
      return QVMSTATE_BAD_STATE;
    case ErrorCode::cancelled:
      return QVMSTATE_CANCELLED;
    case ErrorCode::io:
    case ErrorCode::peer:
      return QVMSTATE_IO;
  }
  return QVMSTATE_INTERNAL;
}

}  // namespace

Failure::Failure(Error error)
    : code(code_of(error)), sys_errno(error.sys_errno), message(std::move(error.message)) {}

void report(const Failure &failure, qvmstate_error *error) noexcept {
  if (error == nullptr) {
    return;
  }
  error->code = failure.code;
  error->sys_errno = failure.sys_errno;
  const size_t bytes = std::min(failure.message.size(), sizeof error->message - 1);
  std::memcpy(error->message, failure.message.data(), bytes);
  error->message[bytes] = '\0';
}

}  // namespace qvmstate::abi
