// The example for embedders: a machine that is saved, loaded in a new process, and runs on, ends as
// one that was never interrupted.

#include <fstream>
#include <set>

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

/// What the README quotes of it is there, line by line.
TEST(Example, IsQuotedAsItIs) {
  const std::string folder = QVMSTATE_SOURCE_DIR "/";
  std::ifstream source(folder + "plugin/example/toy_machine.c");
  std::set<std::string> lines;
  size_t count = 0;
  for (std::string line; std::getline(source, line); ++count) {
    lines.insert(line);
  }
  EXPECT_LT(count, 200U);
  std::ifstream readme(folder + "README.md");
  bool quoted = false;
  size_t found = 0;
  for (std::string line; std::getline(readme, line);) {
    if (line.starts_with("```")) {
      quoted = line == "```c";
    } else if (quoted) {
      EXPECT_TRUE(lines.contains(line)) << line;
      ++found;
    }
  }
  EXPECT_GT(found, 10U);
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
