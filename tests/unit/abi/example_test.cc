// The example for embedders: a machine that is saved, loaded in a new process, and runs on, ends as
// one that was never interrupted.

#include "host.h"

namespace qvmstate::abi::test {
namespace {

std::string toy_machine(std::vector<std::string> words) {
  words.insert(words.begin(), {QVMSTATE_EXAMPLE, QVMSTATE_PLUGIN});
  const auto done = run_command(words);
  EXPECT_EQ(done.status, 0) << done.output;
  return done.output;
}

TEST(Example, RunsOnWhereItWasSaved) {
  const ScratchImage image;
  const std::string half = toy_machine({"save", image.path(), "half", "500000"});
  EXPECT_EQ(half, toy_machine({"run", "500000"}));
  const std::string whole = toy_machine({"load", image.path(), "half", "234567"});
  EXPECT_EQ(whole, toy_machine({"run", "734567"}));
  EXPECT_NE(whole, half);
  image.check();
}

TEST(Example, SaysWhatIsWrong) {
  const ScratchImage image;
  const auto refused =
      run_command({QVMSTATE_EXAMPLE, QVMSTATE_PLUGIN, "load", image.path(), "none", "1"});
  EXPECT_EQ(refused.status, 1);
  EXPECT_EQ(refused.output, "toy_machine: " + image.path() + ": has no snapshot named 'none'\n");
}

/// A program that was built with the first header that was released.
TEST(FrozenClient, RunsWithThisPlugin) {
  const ScratchImage image;
  const auto done = run_command({QVMSTATE_CLIENT_V1, QVMSTATE_PLUGIN, image.path()});
  EXPECT_EQ(done.status, 0) << done.output;
  EXPECT_EQ(done.output, "every function of version 1 works\n");
  image.check();
}

}  // namespace
}  // namespace qvmstate::abi::test
