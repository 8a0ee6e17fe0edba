// The words of `qvmstate save`: what they set, and which of them do not go together.
#include "tools/arguments.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <sstream>

namespace qvmstate::tools {
namespace {

using ::testing::HasSubstr;

struct Parsed {
  SaveCommand command;
  std::string refusal;  ///< empty: accepted
};

Parsed parse(const std::string &words) {
  Parsed parsed;
  CLI::App app("", "qvmstate");
  add_save(app, parsed.command);
  std::istringstream stream("save --qmp Q " + words);
  std::vector<std::string> arguments{std::istream_iterator<std::string>(stream), {}};
  std::reverse(arguments.begin(), arguments.end());  // as CLI11 takes a vector
  try {
    app.parse(arguments);
  } catch (const CLI::ParseError &error) {
    parsed.refusal = error.what();
    EXPECT_NE(error.get_exit_code(), 0) << words;
  }
  return parsed;
}

TEST(SaveArguments, NameAloneIsASnapshotAsBefore) {
  const Parsed parsed = parse("before --replace --allow-bitmaps --vmstate-node n0 --limit-rate 1M");
  EXPECT_EQ(parsed.refusal, "");
  const qemu::SaveOptions &options = parsed.command.options;
  EXPECT_EQ(options.name, "before");
  EXPECT_TRUE(options.replace);
  EXPECT_TRUE(options.allow_bitmaps);
  EXPECT_FALSE(parse("before").command.options.allow_bitmaps);
  EXPECT_FALSE(options.live);
  EXPECT_TRUE(parse("before --live").command.options.live);
  EXPECT_EQ(options.vmstate_node, "n0");
  EXPECT_EQ(options.rate_limit_bytes_per_second, 1048576U);
  EXPECT_EQ(options.to, "");
  EXPECT_EQ(options.layout, qemu::SaveLayout::automatic);
  EXPECT_EQ(options.channels, 0U);
  EXPECT_FALSE(options.sparse_bitmap);
  EXPECT_EQ(options.fd, -1);
  EXPECT_EQ(options.direct_fd, -1);
}

TEST(SaveArguments, ATargetWithEverything) {
  const Parsed parsed =
      parse("--to file:/a,b,offset=0x1000 --layout mapped-ram --channels 64 --sparse-bitmap");
  EXPECT_EQ(parsed.refusal, "");
  const qemu::SaveOptions &options = parsed.command.options;
  EXPECT_EQ(options.to, "file:/a,b,offset=0x1000");
  EXPECT_EQ(options.layout, qemu::SaveLayout::mapped_ram);
  EXPECT_EQ(options.channels, 64U);
  EXPECT_TRUE(options.sparse_bitmap);
  EXPECT_EQ(parse("x --layout legacy").command.options.layout, qemu::SaveLayout::legacy);
  EXPECT_EQ(parse("x --layout stream-aligned").command.options.layout,
            qemu::SaveLayout::stream_aligned);
  EXPECT_EQ(parse("x --base y").command.options.base, "y");
  EXPECT_EQ(parse("x --layout auto").command.options.layout, qemu::SaveLayout::automatic);
}

TEST(SaveArguments, DescriptorsAreATarget) {
  const Parsed parsed = parse("--fd 7 --direct-fd 8");
  EXPECT_EQ(parsed.refusal, "");
  EXPECT_EQ(parsed.command.options.to, "fd");
  EXPECT_EQ(parsed.command.options.fd, 7);
  EXPECT_EQ(parsed.command.options.direct_fd, 8);
  const Parsed with_offset = parse("--to fd,offset=4k --fd 7 --direct-fd 8");
  EXPECT_EQ(with_offset.refusal, "");
  EXPECT_EQ(with_offset.command.options.to, "fd,offset=4k");
}

TEST(SaveArguments, WhatDoesNotGoTogetherIsWrongUsage) {
  const std::pair<const char *, const char *> cases[] = {
      {"", "a save needs the NAME of a snapshot, or a target (--to file:PATH)"},
      {"x --to file:/f", "it cannot go with --to or --fd"},
      {"x --fd 7 --direct-fd 8", "it cannot go with --to or --fd"},
      {"--to file:/f --replace", "and --vmstate-node mean a snapshot"},
      {"--to file:/f --vmstate-node n", "and --vmstate-node mean a snapshot"},
      {"--to file:/f --allow-bitmaps", "and --vmstate-node mean a snapshot"},
      {"--fd 7 --direct-fd 8 --replace", "and --vmstate-node mean a snapshot"},
      {"--fd 7", "--fd and --direct-fd go together"},
      {"--direct-fd 7", "--fd and --direct-fd go together"},
      {"--fd 7 --direct-fd 7", "are the same descriptor"},
      {"--to file:/f --fd 7 --direct-fd 8", "cannot go with --to file:"},
      {"x --to=", "--to"},
      {"--to file:/f --live", "--live writes the legacy layout into the VM's own image"},
      {"x --live --layout mapped-ram", "--live writes the legacy layout"},
      {"x --live --base b", "--live and --base do not go together"},
      {"--to fd", "--to fd needs --fd and --direct-fd"},
      {"--fd 2 --direct-fd 8", "--fd"},
      {"--fd -1 --direct-fd 8", "--fd"},
      {"--to exec:cat", "a seekable target is required"},
      {"--to file:", "has no path"},
      {"--to file:/f,offset=1x", "the offset '1x' is none"},
      {"--to /f", "is no target; give file:PATH"},
      {"x --sparse-bitmap", "--sparse-bitmap needs --layout mapped-ram"},
      {"x --sparse-bitmap --layout legacy", "--sparse-bitmap needs --layout mapped-ram"},
      {"x --layout best", "is not one of auto|legacy|mapped-ram|stream-aligned"},
      {"x --base y --layout legacy", "--base shares groups of the layout stream-aligned"},
      {"--to file:/f --base y", "--base"},
      {"--to file:/f --layout stream-aligned", "--layout stream-aligned"},
      {"x --channels 0", "--channels"},
      {"x --channels 65", "--channels"},
      {"x --channels many", "--channels"},
  };
  for (const auto &[words, refusal] : cases) {
    EXPECT_THAT(parse(words).refusal, HasSubstr(refusal)) << words;
  }
}

}  // namespace
}  // namespace qvmstate::tools
