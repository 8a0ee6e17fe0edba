#include "plugin/qemu/preflight.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/unit/plugin/fake_qmp.h"

namespace qvmstate::qemu {
namespace {

using testing::FakeQmp;
using ::testing::HasSubstr;
using testing::returns;

TEST(Preflight, ServesItsMachineTypes) {
  for (const char *type : {"pc-i440fx-7.2-machine", "pc-q35-11.1-machine", "pc-i440fx-2.4-machine",
                           "microvm-machine"}) {
    auto machine = check_machine_type(type, "x86_64");
    ASSERT_TRUE(machine) << type;
    EXPECT_EQ(machine->type + "-machine", type);
    EXPECT_FALSE(machine->target_page_bits);
  }
  auto arm = check_machine_type("virt-10.0-machine", "aarch64");
  ASSERT_TRUE(arm);
  EXPECT_EQ(arm->type, "virt-10.0");
  EXPECT_EQ(arm->target_page_bits, 12U);
}

TEST(Preflight, RefusesOtherMachines) {
  struct Case {
    const char *type;
    const char *target;
  };
  for (const Case &wrong :
       {Case{"isapc-machine", "x86_64"}, Case{"xenfv-4.2-machine", "x86_64"},
        Case{"none-machine", "x86_64"}, Case{"pc-i440fx-2.3-machine", "x86_64"},
        Case{"pc-q35-1.7-machine", "x86_64"}, Case{"virt-machine", "riscv64"},
        Case{"virt-7.2-machine", "arm"}, Case{"pseries-7.2-machine", "ppc64"},
        Case{"s390-ccw-virtio-7.2-machine", "s390x"}, Case{"", ""},
        Case{"pc-i440fx-7.2-machine", "aarch64"}, Case{"pc-i440fx--machine", "x86_64"}}) {
    auto machine = check_machine_type(wrong.type, wrong.target);
    ASSERT_FALSE(machine) << wrong.type;
    EXPECT_EQ(machine.error().code, ErrorCode::not_supported);
  }
}

/// The run state and migration that a QEMU reports.
Result<bool> state_of(const Json &status, const Json &migration) {
  const testing::TemporaryFolder folder;
  FakeQmp server(folder.file("q"), testing::greeting, [&](const Json &request) {
    const std::string command = text_at(request, "execute");
    return returns(request, command == "query-status"    ? status
                            : command == "query-migrate" ? migration
                                                         : Json::object());
  });
  auto qmp = Qmp::connect(folder.file("q"));
  return qmp ? check_state(**qmp) : tl::unexpected(qmp.error());
}

TEST(Preflight, GoesOnFromThreeStatesOnly) {
  EXPECT_EQ(*state_of({{"status", "running"}, {"running", true}}, Json::object()), true);
  EXPECT_EQ(*state_of({{"status", "paused"}, {"running", false}}, Json::object()), false);
  EXPECT_EQ(*state_of({{"status", "prelaunch"}, {"running", false}}, Json::object()), false);
  for (const char *state :
       {"suspended", "shutdown", "internal-error", "inmigrate", "postmigrate", "finish-migrate",
        "colo", "save-vm", "restore-vm", "never-heard-of", ""}) {
    auto refused = state_of({{"status", state}, {"running", false}}, Json::object());
    ASSERT_FALSE(refused) << state;
    EXPECT_EQ(refused.error().code, ErrorCode::bad_state);
    EXPECT_THAT(refused.error().message, HasSubstr("'" + std::string(state) + "'"));
  }
  EXPECT_FALSE(state_of("garbage", Json::object()));
}

TEST(Preflight, RefusesMigrationsAndBlockers) {
  const Json running = {{"status", "running"}, {"running", true}};
  for (const char *done : {"none", "completed", "cancelled", "failed"}) {
    EXPECT_TRUE(state_of(running, {{"status", done}})) << done;
  }
  for (const char *busy : {"setup", "active", "device", "postcopy-active", "postcopy-paused",
                           "pre-switchover", "cancelling", "wait-unplug", "colo"}) {
    auto refused = state_of(running, {{"status", busy}});
    ASSERT_FALSE(refused) << busy;
    EXPECT_THAT(refused.error().message, HasSubstr(busy));
  }
  auto blocked = state_of(running, {{"blocked-reasons", {"nvme cannot migrate"}}});
  ASSERT_FALSE(blocked);
  EXPECT_THAT(blocked.error().message, HasSubstr("nvme cannot migrate"));
}

}  // namespace
}  // namespace qvmstate::qemu
