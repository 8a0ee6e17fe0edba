#include "vmstate/ram_map.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <string_view>
#include <utility>

#include "qcow2/io/offsets.h"

namespace qvmstate::vmstate {
namespace {

constexpr uint64_t high_address = 4 * gib;
constexpr uint64_t arm_virt_address = 1 * gib;
// From machine types 7.1 on, with an AMD CPU, memory that would reach this goes above 1 TiB.
constexpr uint64_t amd_reserved_address = 0xfd00000000;
constexpr std::array amd_since = {7, 1};

// Blocks of the board that are no main memory; those of devices have a '/' in their names.
constexpr std::array<std::string_view, 9> board_blocks = {
    "pc.bios",     "pc.rom",      "vga.vram",        "system.flash0", "system.flash1",
    "virt.flash0", "virt.flash1", "virt.secure-ram", "isa-bios"};

struct Version {
  int major = 0;
  int minor = 0;
};

/// Of "pc-q35-7.2"; names that distributions give count as new.
std::optional<Version> machine_version(std::string_view name) {
  Version version;
  const char *const end = name.data() + name.size();
  const auto [dot, error] = std::from_chars(name.data() + name.rfind('-') + 1, end, version.major);
  if (error != std::errc() || dot == end || *dot != '.') {
    return std::nullopt;
  }
  const auto [rest, minor_error] = std::from_chars(dot + 1, end, version.minor);
  return minor_error == std::errc() && rest == end ? std::optional(version) : std::nullopt;
}

/// Where memory below 4 GiB ends if there is more of it; arm virt: none.
struct Board {
  std::string_view default_block;
  uint64_t low_bytes_max = 0;
  bool reserves_for_amd = false;
};

std::optional<Board> board_of(const StreamSummary &stream, uint64_t ram_bytes) {
  const std::string_view name = stream.machine_type;
  const std::optional<Version> version = machine_version(name);
  // The low part ended anywhere before it was rounded to a GiB.
  const bool rounds_to_gib = !version || version->major >= 2;
  const bool for_amd = !version || std::array{version->major, version->minor} >= amd_since;
  if (name.starts_with("pc-i440fx-")) {
    return Board{"pc.ram", rounds_to_gib && ram_bytes >= 0xe0000000 ? 0xc0000000 : 0xe0000000,
                 for_amd};
  }
  if (name.starts_with("pc-q35-")) {
    return Board{"pc.ram", rounds_to_gib && ram_bytes >= 0xb0000000 ? 0x80000000 : 0xb0000000,
                 for_amd};
  }
  if (name == "microvm") {
    return Board{"microvm.ram", 0xc0000000, false};
  }
  return std::nullopt;
}

bool may_be_main_memory(const StreamBlock &block) {
  const std::string_view name = block.idstr;
  return std::ranges::find(board_blocks, name) == board_blocks.end() &&
         (name.find('/') == std::string_view::npos || name.starts_with("/objects/"));
}

tl::unexpected<Error> unknown(const StreamSummary &stream, const std::string &why) {
  std::string blocks;
  for (const StreamBlock &block : stream.blocks) {
    blocks += (blocks.empty() ? "" : ", ") + block.idstr;
  }
  return fail(ErrorCode::not_supported,
              why +
                  "; say where in guest-physical memory its RAM lies with --ram-map "
                  "BLOCK=ADDRESS[,BYTES[,OFFSET]], once for each piece; its blocks are: " +
                  blocks);
}

Result<size_t> main_block(const StreamSummary &stream) {
  std::vector<size_t> candidates;
  for (size_t i = 0; i < stream.blocks.size(); ++i) {
    if (may_be_main_memory(stream.blocks[i])) {
      candidates.push_back(i);
    }
  }
  if (candidates.size() != 1) {
    return unknown(stream, candidates.empty()
                               ? "no RAM block looks like main memory"
                               : "the VM has several blocks of RAM (DIMMs, NUMA nodes), and the "
                                 "stream does not tell where they lie");
  }
  return candidates.front();
}

bool parse_number(std::string_view text, uint64_t &number) {
  const bool is_hex = text.starts_with("0x") || text.starts_with("0X");
  text.remove_prefix(is_hex ? 2 : 0);
  const auto [end, error] =
      std::from_chars(text.data(), text.data() + text.size(), number, is_hex ? 16 : 10);
  return !text.empty() && error == std::errc() && end == text.data() + text.size();
}

}  // namespace

// Only arm tells its page size.
bool is_arm_virt(const StreamSummary &stream) {
  return stream.machine_type.starts_with("virt-") &&
         (stream.target_page_bits || std::ranges::any_of(stream.blocks, [](const auto &block) {
            return block.idstr == "mach-virt.ram";
          }));
}

Result<RamPlace> parse_ram_place(const std::string &text) {
  const size_t equals = text.rfind('=');
  RamPlace place;
  bool good = equals != std::string::npos && equals > 0;
  if (good) {
    place.idstr = text.substr(0, equals);
    std::vector<uint64_t> numbers;
    for (size_t at = equals + 1; good; ++at) {
      const size_t comma = std::min(text.find(',', at), text.size());
      numbers.emplace_back();
      good = numbers.size() <= 3 &&
             parse_number(std::string_view(text).substr(at, comma - at), numbers.back());
      at = comma;
      if (comma == text.size()) {
        break;
      }
    }
    if (good) {
      place.address = numbers[0];
      if (numbers.size() > 1) {
        place.bytes = numbers[1];
      }
      place.block_offset = numbers.size() > 2 ? numbers[2] : 0;
    }
  }
  if (!good) {
    return fail(ErrorCode::bad_argument,
                "'" + text + "' is not BLOCK=ADDRESS[,BYTES[,OFFSET]], as pc.ram=0,0xc0000000");
  }
  return place;
}

Result<std::vector<RamPiece>> ram_of_machine(const StreamSummary &stream) {
  QV_ASSIGN(const size_t block, main_block(stream));
  const uint64_t bytes = stream.blocks[block].used_bytes;
  if (is_arm_virt(stream)) {
    return std::vector<RamPiece>{{block, 0, bytes, arm_virt_address}};
  }
  const std::optional<Board> board = board_of(stream, bytes);
  if (!board) {
    return unknown(stream, stream.machine_type.empty()
                               ? "the stream does not name its machine type"
                               : "machine type '" + stream.machine_type + "' is not known");
  }
  const uint64_t low = std::min(bytes, board->low_bytes_max);
  std::vector<RamPiece> pieces = {{block, 0, low, 0}};
  if (bytes > low) {
    if (board->reserves_for_amd && bytes - low > amd_reserved_address - high_address) {
      return unknown(stream, "whether RAM that large lies at 4 GiB or at 1 TiB depends on the CPU");
    }
    pieces.push_back({block, low, bytes - low, high_address});
  }
  return pieces;
}

Result<std::vector<RamPiece>> ram_of_places(const StreamSummary &stream,
                                            std::span<const RamPlace> places) {
  std::vector<RamPiece> pieces;
  for (const RamPlace &place : places) {
    const auto block = std::ranges::find(stream.blocks, place.idstr, &StreamBlock::idstr);
    if (block == stream.blocks.end()) {
      return unknown(stream, "--ram-map: there is no RAM block '" + place.idstr + "'");
    }
    const uint64_t used = block->used_bytes;
    const uint64_t left = place.block_offset < used ? used - place.block_offset : 0;
    const uint64_t bytes = place.bytes.value_or(left);
    if (bytes == 0 || bytes > left || place.address > UINT64_MAX - bytes ||
        (place.address | bytes | place.block_offset) % stream.page_bytes != 0) {
      return fail(ErrorCode::bad_argument,
                  "--ram-map: block '" + place.idstr + "' has " + std::to_string(used) +
                      " bytes, and what is mapped must lie in it, in whole pages of " +
                      std::to_string(stream.page_bytes) + " bytes");
    }
    pieces.push_back({static_cast<size_t>(block - stream.blocks.begin()), place.block_offset, bytes,
                      place.address});
  }
  std::ranges::sort(pieces, {}, &RamPiece::address);
  for (size_t i = 1; i < pieces.size(); ++i) {
    if (pieces[i].address < pieces[i - 1].address + pieces[i - 1].bytes) {
      return fail(ErrorCode::bad_argument, "--ram-map: two pieces lie over each other at address " +
                                               std::to_string(pieces[i].address));
    }
  }
  return pieces;
}

}  // namespace qvmstate::vmstate
