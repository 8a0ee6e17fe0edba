#include "plugin/qemu/ram_blocks.h"

#include <dlfcn.h>

#include <charconv>

namespace qvmstate::qemu {
namespace {

std::string_view trimmed(std::string_view text) {
  const size_t first = text.find_first_not_of(" \t\r");
  if (first == std::string_view::npos) {
    return {};
  }
  return text.substr(first, text.find_last_not_of(" \t\r") - first + 1);
}

/// Cuts the last word off `line`.
std::string_view take_last_word(std::string_view &line) {
  line = trimmed(line);
  const size_t space = line.find_last_of(" \t");
  const std::string_view word = space == std::string_view::npos ? line : line.substr(space + 1);
  line.remove_suffix(word.size());
  return word;
}

std::optional<uint64_t> parse_number(std::string_view word, int base) {
  if (base == 16) {
    if (!word.starts_with("0x")) {
      return std::nullopt;
    }
    word.remove_prefix(2);
  }
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value, base);
  if (error != std::errc() || end != word.data() + word.size() || word.empty()) {
    return std::nullopt;
  }
  return value;
}

std::optional<uint64_t> unit_bytes(std::string_view unit) {
  constexpr std::string_view units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  for (size_t i = 0; i < std::size(units); ++i) {
    if (unit == units[i]) {
      return uint64_t{1} << (10 * i);
    }
  }
  return std::nullopt;
}

/// Columns from the right: [RO] [HVA] total, used, offset, unit, page size; the rest is the name.
std::optional<HostRamBlock> parse_line(std::string_view line, bool with_address) {
  HostRamBlock found;
  if (with_address) {
    const std::string_view access = take_last_word(line);
    const auto address = parse_number(take_last_word(line), 16);
    if ((access != "rw" && access != "ro") || !address) {
      return std::nullopt;
    }
    found.address = address;
  }
  const auto total = parse_number(take_last_word(line), 16);
  const auto used = parse_number(take_last_word(line), 16);
  const auto offset = parse_number(take_last_word(line), 16);
  const auto unit = unit_bytes(take_last_word(line));
  const auto pages = parse_number(take_last_word(line), 10);
  if (!total || !used || !offset || !unit || !pages || *used > *total || *pages == 0 ||
      *pages > 1024 * 1024) {
    return std::nullopt;
  }
  found.block = {std::string(trimmed(line)), *used, *pages * *unit};
  return found;
}

// QEMU's functions, exported to its modules in Debian's binaries. Declared by what they do; a
// RAMBlock is only passed around.
struct RAMBlock;
using VisitBlock = int (*)(RAMBlock *block, void *opaque);
struct Functions {
  int (*for_each_block)(VisitBlock visit, void *opaque) = nullptr;
  const char *(*name)(RAMBlock *) = nullptr;
  void *(*address)(RAMBlock *) = nullptr;
  size_t (*used_bytes)(RAMBlock *) = nullptr;
  bool (*migrates)(RAMBlock *) = nullptr;
};

template <class Function>
bool find_function(Function &function, const char *name) {
  function = reinterpret_cast<Function>(::dlsym(RTLD_DEFAULT, name));
  return function != nullptr;
}

struct Visit {
  const Functions *functions;
  std::vector<HostRamBlock> *blocks;
  std::string mismatch;
  size_t next = 0;
};

int visit_block(RAMBlock *block, void *opaque) {
  auto &visit = *static_cast<Visit *>(opaque);
  const Functions &qemu = *visit.functions;
  const char *name = qemu.name(block);
  if (!qemu.migrates(block) || name == nullptr || name[0] == 0) {
    return 0;
  }
  if (visit.next == visit.blocks->size()) {
    visit.mismatch = name;
    return 1;
  }
  HostRamBlock &known = (*visit.blocks)[visit.next++];
  if (known.block.idstr != name || known.block.used_bytes != qemu.used_bytes(block)) {
    visit.mismatch = name;
    return 1;
  }
  known.address = reinterpret_cast<uint64_t>(qemu.address(block));
  return 0;
}

Result<std::vector<HostRamBlock>> ask_monitor(Qmp &qmp) {
  QV_ASSIGN(const std::string output, qmp.human("info ramblock"));
  return parse_info_ramblock(output);
}

}  // namespace

Result<std::vector<HostRamBlock>> parse_info_ramblock(std::string_view output) {
  std::vector<HostRamBlock> blocks;
  bool with_address = false;
  bool header_seen = false;
  while (!output.empty()) {
    const size_t end = output.find('\n');
    const std::string_view line = trimmed(output.substr(0, end));
    output.remove_prefix(end == std::string_view::npos ? output.size() : end + 1);
    if (line.empty()) {
      continue;
    }
    if (!header_seen) {
      if (!line.starts_with("Block Name")) {
        break;
      }
      header_seen = true;
      with_address = line.find(" HVA") != std::string_view::npos;
      continue;
    }
    auto parsed = parse_line(line, with_address);
    if (!parsed || parsed->block.idstr.size() > 255) {
      return fail(ErrorCode::peer,
                  "QEMU's `info ramblock` has a line of unknown form: '" + std::string(line) + "'");
    }
    if (parsed->block.idstr.empty() || parsed->block.used_bytes == 0) {
      continue;
    }
    if (parsed->block.used_bytes % 4096 != 0) {
      return fail(ErrorCode::not_supported,
                  "RAM block '" + parsed->block.idstr + "' has a size that is no multiple of 4096");
    }
    blocks.push_back(*std::move(parsed));
  }
  if (!header_seen || blocks.empty()) {
    return fail(ErrorCode::peer, "QEMU's `info ramblock` lists no RAM");
  }
  return blocks;
}

Result<std::vector<HostRamBlock>> ram_blocks_from_outside(Qmp &qmp) {
  QV_ASSIGN(std::vector<HostRamBlock> blocks, ask_monitor(qmp));
  if (!blocks.front().address) {
    return fail(ErrorCode::not_supported,
                "QEMU " + qmp.version() +
                    " does not tell where its RAM lies; attaching needs QEMU 8.0 or newer, or the "
                    "plugin (-plugin libqvmstate.so, then `save --control`)");
  }
  return blocks;
}

Result<std::vector<HostRamBlock>> ram_blocks_from_inside(Qmp &qmp) {
  QV_ASSIGN(std::vector<HostRamBlock> blocks, ask_monitor(qmp));
  if (blocks.front().address) {
    return blocks;
  }
  Functions functions;
  if (!find_function(functions.for_each_block, "qemu_ram_foreach_block") ||
      !find_function(functions.name, "qemu_ram_get_idstr") ||
      !find_function(functions.address, "qemu_ram_get_host_addr") ||
      !find_function(functions.used_bytes, "qemu_ram_get_used_length") ||
      !find_function(functions.migrates, "qemu_ram_is_migratable")) {
    return fail(ErrorCode::not_supported,
                "this build of QEMU " + qmp.version() +
                    " neither shows nor exports where its RAM lies; use QEMU 8.0 or newer");
  }
  Visit visit = {&functions, &blocks, {}};
  functions.for_each_block(visit_block, &visit);
  if (!visit.mismatch.empty() || visit.next != blocks.size()) {
    return fail(ErrorCode::peer,
                "QEMU's monitor and its functions disagree on RAM block '" +
                    (visit.mismatch.empty() ? blocks[visit.next].block.idstr : visit.mismatch) +
                    "'; try again, or use QEMU 8.0 or newer");
  }
  return blocks;
}

}  // namespace qvmstate::qemu
