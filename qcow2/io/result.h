// The one error type of the project, and Result<T>, which carries either a value or that error.
//
// Everything that can go wrong because of a file, a socket, another process or the user's words is
// an Error. A mistake of this program's own code is an assert. No exception crosses a function that
// returns a Result.
#pragma once

#include <cerrno>
#include <string>
#include <string_view>
#include <tl/expected.hpp>
#include <utility>

namespace qvmstate {

/// What kind of thing went wrong; callers branch on this, people read Error::message.
enum class ErrorCode {
  io,             ///< the kernel refused or cut short an operation; sys_errno says why
  no_space,       ///< ENOSPC, EDQUOT, EFBIG, or a qcow2 limit that a larger image would pass
  bad_image,      ///< bytes of an image contradict the format
  bad_stream,     ///< bytes of a vmstate stream contradict the format
  not_supported,  ///< a valid image, machine or option that this program cannot serve
  locked,         ///< somebody else holds the image
  exists,         ///< a snapshot of that name is there already
  not_found,      ///< no snapshot, node, file or process of that name
  bad_argument,   ///< the user's or the calling program's words cannot be taken
  permission,     ///< EACCES, EPERM: of a process, file or socket
  bad_state,      ///< the VM is in a state in which this cannot be done
  peer,           ///< QEMU or the control socket answered with an error, or went away
  cancelled,      ///< the user said stop
};

struct Error {
  ErrorCode code;
  int sys_errno = 0;    ///< 0, or the errno behind it
  std::string message;  ///< one line: object, operation, cause and, where there is one, the remedy
};

template <class T>
using Result = tl::expected<T, Error>;

/// Makes the error half of a Result: `return fail(ErrorCode::bad_image, "...")`.
inline tl::unexpected<Error> fail(ErrorCode code, std::string message, int sys_errno = 0) {
  return tl::unexpected<Error>(Error{code, sys_errno, std::move(message)});
}

/// The same from an errno: chooses the code (no_space, permission, not_found, io) and appends
/// ": <strerror>" to the message.
tl::unexpected<Error> fail_errno(int sys_errno, std::string message);

/// Puts "context: " in front of the message.
inline Error with_context(Error error, std::string_view context) {
  error.message = std::string(context) + ": " + error.message;
  return error;
}

}  // namespace qvmstate

/// Returns the error of `expr` to the caller, if it has one.
#define QV_TRY(expr)                                        \
  do {                                                      \
    if (auto qv_result_ = (expr); !qv_result_) {            \
      return tl::unexpected(std::move(qv_result_).error()); \
    }                                                       \
  } while (0)

#define QV_CONCAT_(a, b) a##b
#define QV_CONCAT(a, b) QV_CONCAT_(a, b)

/// `QV_ASSIGN(auto x, f());` declares or sets x from the value of f(), or returns its error.
#define QV_ASSIGN(target, expr) QV_ASSIGN_(QV_CONCAT(qv_assign_, __LINE__), target, expr)
#define QV_ASSIGN_(temporary, target, expr)              \
  auto temporary = (expr);                               \
  if (!temporary) {                                      \
    return tl::unexpected(std::move(temporary).error()); \
  }                                                      \
  target = std::move(temporary).value()
