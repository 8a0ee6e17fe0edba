// diff: what differs between the VM states of two snapshots of an image: pages of RAM and device
// sections.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "tools/commands.h"
#include "tools/format.h"
#include "tools/state_source.h"
#include "tools/state_work.h"

namespace qvmstate::tools {

namespace {

constexpr uint64_t compare_bytes = 256 * kib;

struct Range {
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

struct BlockDifference {
  std::string name;
  uint64_t bytes_in_a = 0;  ///< 0: the block is not in it
  uint64_t bytes_in_b = 0;
  uint64_t pages = 0;              ///< that both have
  uint64_t pages_differ = 0;       ///< of these
  std::vector<Range> ranges = {};  ///< that differ
};

struct SectionDifference {
  std::string name;
  uint32_t instance = 0;
  const char *what = "";      ///< "differs", "only-in-a", "only-in-b"
  uint64_t bytes_differ = 0;  ///< of bodies of the same length
};

struct Difference {
  uint64_t page_bytes = 0;
  std::vector<BlockDifference> blocks;
  std::vector<SectionDifference> sections;
  size_t sections_equal = 0;
};

/// One of the two.
struct Side {
  CheckedSnapshot checked;
  std::unique_ptr<vmstate::StoredState> state;
  std::unique_ptr<vmstate::RamSource> ram;
};

Result<Side> open_side(const qcow2::Image &image, const std::string &name) {
  Side side;
  QV_ASSIGN(side.checked, checked_snapshot(image, name));
  QV_ASSIGN(side.state, stored_state(side.checked));
  QV_ASSIGN(side.ram, side.state->ram());
  return side;
}

/// Reads what is there; what is not is zeros.
Result<void> read_part(vmstate::RamSource &ram, size_t block, uint64_t offset,
                       const vmstate::RamSource::Presence &presence, uint64_t page_bytes,
                       std::span<std::byte> to) {
  if (!presence.touched) {
    std::ranges::fill(to, std::byte{0});
    return {};
  }
  return ram.read_pages(block, offset, to.size() / page_bytes, page_bytes, to.data(), page_bytes);
}

Result<void> compare_block(Side &a, size_t block_a, Side &b, size_t block_b, uint64_t page_bytes,
                           BlockDifference &difference) {
  std::vector<std::byte> bytes_a(compare_bytes);
  std::vector<std::byte> bytes_b(compare_bytes);
  const uint64_t end = std::min(difference.bytes_in_a, difference.bytes_in_b);
  const vmstate::TransferHook hook = cancel_hook();
  difference.pages = end / page_bytes;
  for (uint64_t offset = 0; offset < end;) {
    QV_TRY(hook());
    QV_ASSIGN(const auto in_a, a.ram->presence(block_a, offset));
    QV_ASSIGN(const auto in_b, b.ram->presence(block_b, offset));
    uint64_t bytes = std::min({in_a.bytes, in_b.bytes, end - offset});
    if (!in_a.touched && !in_b.touched) {
      offset += bytes;
      continue;
    }
    bytes = std::min(bytes, compare_bytes);
    const std::span part_a(bytes_a.data(), bytes);
    const std::span part_b(bytes_b.data(), bytes);
    QV_TRY(read_part(*a.ram, block_a, offset, in_a, page_bytes, part_a));
    QV_TRY(read_part(*b.ram, block_b, offset, in_b, page_bytes, part_b));
    for (uint64_t at = 0; at < bytes; at += page_bytes) {
      if (std::memcmp(&part_a[at], &part_b[at], page_bytes) == 0) {
        continue;
      }
      ++difference.pages_differ;
      std::vector<Range> &ranges = difference.ranges;
      if (!ranges.empty() && ranges.back().offset + ranges.back().bytes == offset + at) {
        ranges.back().bytes += page_bytes;
      } else {
        ranges.push_back({offset + at, page_bytes});
      }
    }
    offset += bytes;
  }
  return {};
}

Result<void> compare_blocks(Side &a, Side &b, Difference &difference) {
  const auto blocks_a = a.state->blocks();
  const auto blocks_b = b.state->blocks();
  for (size_t i = 0; i < blocks_a.size(); ++i) {
    BlockDifference block = {blocks_a[i].idstr, blocks_a[i].used_bytes, 0};
    const auto other = std::ranges::find(blocks_b, blocks_a[i].idstr, &vmstate::RamBlock::idstr);
    if (other != blocks_b.end()) {
      block.bytes_in_b = other->used_bytes;
      QV_TRY(compare_block(a, i, b, static_cast<size_t>(other - blocks_b.begin()),
                           difference.page_bytes, block));
    }
    difference.blocks.push_back(std::move(block));
  }
  for (const vmstate::RamBlock &block : blocks_b) {
    if (std::ranges::find(blocks_a, block.idstr, &vmstate::RamBlock::idstr) == blocks_a.end()) {
      difference.blocks.push_back({block.idstr, 0, block.used_bytes});
    }
  }
  return {};
}

void compare_sections(const Side &a, const Side &b, Difference &difference) {
  std::map<std::pair<std::string, uint32_t>, const vmstate::DeviceSection *> left;
  for (const vmstate::DeviceSection &section : b.state->devices()) {
    left[{section.idstr, section.instance}] = &section;
  }
  for (const vmstate::DeviceSection &section : a.state->devices()) {
    const auto other = left.find({section.idstr, section.instance});
    if (other == left.end()) {
      difference.sections.push_back({section.idstr, section.instance, "only-in-a"});
      continue;
    }
    const auto mine = section.body;
    const auto theirs = other->second->body;
    if (section.version == other->second->version && std::ranges::equal(mine, theirs)) {
      ++difference.sections_equal;
    } else {
      uint64_t bytes = 0;
      for (size_t i = 0; mine.size() == theirs.size() && i < mine.size(); ++i) {
        bytes += mine[i] != theirs[i];
      }
      difference.sections.push_back({section.idstr, section.instance, "differs", bytes});
    }
    left.erase(other);
  }
  for (const auto &[key, section] : left) {
    difference.sections.push_back({key.first, key.second, "only-in-b"});
  }
}

Result<Difference> compare(const DiffCommand &command) {
  QV_ASSIGN(const OpenImage opened, open_image(command.image, false, !command.force_share));
  QV_ASSIGN(Side a, open_side(opened.image, command.a));
  QV_ASSIGN(Side b, open_side(opened.image, command.b));
  Difference difference;
  difference.page_bytes = a.checked.stream.page_bytes;
  if (b.checked.stream.page_bytes != difference.page_bytes) {
    return fail(ErrorCode::not_supported,
                command.image + ": the two states have pages of different sizes");
  }
  QV_TRY(compare_blocks(a, b, difference));
  compare_sections(a, b, difference);
  return difference;
}

Json to_json(const DiffCommand &command, const Difference &difference, double seconds) {
  Json blocks = Json::array();
  for (const BlockDifference &block : difference.blocks) {
    Json ranges = Json::array();
    for (const Range &range : block.ranges) {
      ranges.push_back({range.offset, range.bytes});
    }
    blocks.push_back({{"name", block.name},
                      {"size-in-a", block.bytes_in_a},
                      {"size-in-b", block.bytes_in_b},
                      {"pages", block.pages},
                      {"pages-differ", block.pages_differ},
                      {"ranges", std::move(ranges)}});
  }
  Json sections = Json::array();
  for (const SectionDifference &section : difference.sections) {
    sections.push_back({{"name", section.name},
                        {"instance", section.instance},
                        {"what", section.what},
                        {"bytes-differ", section.bytes_differ}});
  }
  return {{"event", "completed"},
          {"operation", "diff"},
          {"filename", command.image},
          {"a", command.a},
          {"b", command.b},
          {"page-size", difference.page_bytes},
          {"ram-blocks", std::move(blocks)},
          {"sections-equal", difference.sections_equal},
          {"sections", std::move(sections)},
          {"total-seconds", seconds}};
}

std::string to_text(const DiffCommand &command, const Difference &difference) {
  std::string text;
  for (const BlockDifference &block : difference.blocks) {
    text += fmt::format("RAM block {}: ", printable(block.name));
    if (block.bytes_in_a == 0 || block.bytes_in_b == 0) {
      text +=
          fmt::format("only in '{}'\n", printable(block.bytes_in_a == 0 ? command.b : command.a));
      continue;
    }
    text += fmt::format("{} of {} pages differ", block.pages_differ, block.pages);
    if (block.bytes_in_a != block.bytes_in_b) {
      text += fmt::format(", and its sizes: {} and {}", format_size(block.bytes_in_a),
                          format_size(block.bytes_in_b));
    }
    text += '\n';
  }
  for (const SectionDifference &section : difference.sections) {
    text += fmt::format("section {} {}: ", printable(section.name), section.instance);
    if (std::string_view(section.what) != "differs") {
      text += fmt::format(
          "only in '{}'\n",
          printable(section.what[sizeof "only-in-" - 1] == 'a' ? command.a : command.b));
    } else if (section.bytes_differ == 0) {
      text += "differs in version or length\n";
    } else {
      text += fmt::format("{} bytes differ\n", section.bytes_differ);
    }
  }
  return text + fmt::format("{} sections are the same\n", difference.sections_equal);
}

}  // namespace

int run_diff(const DiffCommand &command) {
  const auto begin = std::chrono::steady_clock::now();
  const Result<Difference> difference = compare(command);
  if (!difference) {
    return report_failure("diff", difference.error(), command.format);
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return finish("diff", command.format == Format::json
                            ? to_line(to_json(command, *difference, seconds))
                            : to_text(command, *difference));
}

}  // namespace qvmstate::tools
