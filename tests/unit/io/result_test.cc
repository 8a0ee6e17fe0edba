// Errors from errno, and the macros that hand them on.
#include "qcow2/io/result.h"

#include <gtest/gtest.h>

#include <memory>

namespace qvmstate {
namespace {

Result<int> failing(int sys_errno) {
  return fail_errno(sys_errno, "disk.qcow2: cannot write");
}

TEST(Result, AnErrnoChoosesTheCodeAndIsSpeltOut) {
  const std::pair<int, ErrorCode> expected[] = {
      {ENOSPC, ErrorCode::no_space},  {EDQUOT, ErrorCode::no_space},
      {EFBIG, ErrorCode::no_space},   {EACCES, ErrorCode::permission},
      {EPERM, ErrorCode::permission}, {ENOENT, ErrorCode::not_found},
      {EIO, ErrorCode::io},           {EINVAL, ErrorCode::io},
  };
  for (const auto &[sys_errno, code] : expected) {
    EXPECT_EQ(failing(sys_errno).error().code, code) << sys_errno;
    EXPECT_EQ(failing(sys_errno).error().sys_errno, sys_errno);
  }
  EXPECT_EQ(failing(ENOSPC).error().message, "disk.qcow2: cannot write: No space left on device");
  EXPECT_EQ(with_context(failing(EIO).error(), "saving").message,
            "saving: disk.qcow2: cannot write: Input/output error");
}

Result<std::unique_ptr<int>> make(bool works) {
  if (!works) {
    return fail(ErrorCode::cancelled, "stopped");
  }
  return std::make_unique<int>(5);
}

Result<int> use(bool first, bool second) {
  QV_TRY(make(first));
  QV_ASSIGN(const std::unique_ptr<int> value, make(second));
  return *value;
}

TEST(Result, MacrosHandOnErrorsAndMoveValues) {
  EXPECT_EQ(use(true, true), 5);
  EXPECT_EQ(use(false, true).error().code, ErrorCode::cancelled);
  EXPECT_EQ(use(true, false).error().message, "stopped");
}

}  // namespace
}  // namespace qvmstate
