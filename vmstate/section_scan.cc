#include "vmstate/section_scan.h"

#include <algorithm>
#include <cstring>
#include <unordered_set>

#include "qcow2/io/endian.h"
#include "qcow2/io/offsets.h"
#include "vmstate/stream_format.h"

namespace qvmstate::vmstate {
namespace {

// How many bytes a search may look at: once over all of them when nothing misleads it, and this
// many times for the sake of bytes that do.
constexpr uint64_t scan_passes_max = 32;
constexpr uint64_t scan_bytes_min = 1 * mib;
// What looking at one candidate costs beside the bytes passed over.
constexpr uint64_t candidate_cost_bytes = 64;

bool is_printable(std::string_view text) {
  return std::ranges::all_of(text, [](char c) { return c >= 0x20 && c < 0x7f; });
}

struct OpenSection {
  SectionHeader header;
  size_t start = 0;
  size_t search_from = 0;  ///< where the next footer candidate is looked for
  size_t footer = 0;       ///< the candidate taken
};

/// The next footer of section `id` at or after `from`, or bytes.size().
size_t find_footer(std::span<const std::byte> bytes, size_t from, uint32_t id) {
  std::byte needle[section_footer_bytes] = {std::byte{section_footer}};
  store_be<uint32_t>(needle + 1, id);
  const void *hit = memmem(bytes.data() + from, bytes.size() - from, needle, sizeof needle);
  return hit == nullptr ? bytes.size() : static_cast<const std::byte *>(hit) - bytes.data();
}

SectionRun make_run(std::span<const std::byte> bytes, const std::vector<OpenSection> &path) {
  SectionRun run;
  run.sections.reserve(path.size());
  for (const OpenSection &open : path) {
    const size_t body = open.start + open.header.bytes;
    const size_t end = open.footer + section_footer_bytes;
    run.sections.push_back({open.header.id, std::string(open.header.idstr), open.header.instance,
                            open.header.version, bytes.subspan(body, open.footer - body),
                            bytes.subspan(open.start, end - open.start)});
    run.end = end;
  }
  return run;
}

}  // namespace

std::optional<SectionHeader> parse_section_header(std::span<const std::byte> bytes, size_t at) {
  constexpr size_t before_idstr = 1 + 4 + 1;
  constexpr size_t after_idstr = 4 + 4;
  if (at > bytes.size() || bytes.size() - at < before_idstr) {
    return std::nullopt;
  }
  const std::byte *p = bytes.data() + at;
  SectionHeader header;
  header.type = static_cast<uint8_t>(p[0]);
  header.id = load_be<uint32_t>(p + 1);
  const size_t idstr_bytes = static_cast<size_t>(p[5]);
  header.bytes = before_idstr + idstr_bytes + after_idstr;
  if ((header.type != section_full && header.type != section_start) || idstr_bytes == 0 ||
      bytes.size() - at < header.bytes) {
    return std::nullopt;
  }
  header.idstr = {reinterpret_cast<const char *>(p + before_idstr), idstr_bytes};
  header.instance = load_be<uint32_t>(p + before_idstr + idstr_bytes);
  header.version = load_be<uint32_t>(p + before_idstr + idstr_bytes + 4);
  if (!is_printable(header.idstr) || header.version > section_version_max) {
    return std::nullopt;
  }
  return header;
}

Result<SectionRun> split_section_run(std::span<const std::byte> bytes, size_t start,
                                     const RunEnd &is_run_end) {
  std::vector<OpenSection> path;
  std::unordered_set<uint32_t> ids;      // of the path: no id occurs twice in a stream
  std::unordered_set<size_t> dead_ends;  // section starts from which no split was found
  uint64_t budget = std::max<uint64_t>(bytes.size(), scan_bytes_min) * scan_passes_max;

  const auto push = [&](size_t at) {
    const auto header = parse_section_header(bytes, at);
    if (!header || header->type != section_full || dead_ends.contains(at) ||
        path.size() >= device_sections_max || !ids.insert(header->id).second) {
      return false;
    }
    path.push_back({*header, at, at + header->bytes, 0});
    return true;
  };

  if (!push(start)) {
    return fail(ErrorCode::bad_stream, "device state: no section header at byte " +
                                           std::to_string(start) +
                                           "; the state is damaged, save again");
  }
  std::string deepest(path.back().header.idstr);
  size_t deepest_start = start;
  while (!path.empty()) {
    OpenSection &top = path.back();
    top.footer = find_footer(bytes, top.search_from, top.header.id);
    const uint64_t cost = top.footer - top.search_from + candidate_cost_bytes;
    if (cost > budget) {
      break;
    }
    budget -= cost;
    if (top.footer == bytes.size()) {
      dead_ends.insert(top.start);
      ids.erase(top.header.id);
      path.pop_back();
      continue;
    }
    top.search_from = top.footer + 1;
    const size_t next = top.footer + section_footer_bytes;
    if (is_run_end(next)) {
      return make_run(bytes, path);
    }
    if (push(next) && next > deepest_start) {
      deepest = path.back().header.idstr;
      deepest_start = next;
    }
  }
  return fail(ErrorCode::bad_stream,
              "device state: section \"" + deepest + "\" at byte " + std::to_string(deepest_start) +
                  " is not closed by a footer and a valid next section; damaged, more than " +
                  std::to_string(device_sections_max) +
                  " sections, or of a machine type up to 2.3, which writes no footers: use a newer "
                  "machine type");
}

}  // namespace qvmstate::vmstate
