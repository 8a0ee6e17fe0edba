// Turns an errno into an Error.
#include "qcow2/io/result.h"

#include <cstring>

namespace qvmstate {

namespace {

ErrorCode code_of(int sys_errno) {
  switch (sys_errno) {
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return ErrorCode::no_space;
    case EACCES:
    case EPERM:
      return ErrorCode::permission;
    case ENOENT:
      return ErrorCode::not_found;
    default:
      return ErrorCode::io;
  }
}

}  // namespace

tl::unexpected<Error> fail_errno(int sys_errno, std::string message) {
  char text[128];
  message += ": ";
  message += ::strerror_r(sys_errno, text, sizeof text);
  return fail(code_of(sys_errno), std::move(message), sys_errno);
}

}  // namespace qvmstate
