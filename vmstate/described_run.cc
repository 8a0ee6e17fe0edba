#include "vmstate/described_run.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "qcow2/io/endian.h"
#include "qcow2/io/offsets.h"
#include "vmstate/stream_format.h"

namespace qvmstate::vmstate {
namespace {

using nlohmann::json;

// QEMU's descriptions have some 100 KiB; the tree made of one takes many times its bytes.
constexpr size_t description_bytes_max = 4 * mib;
constexpr unsigned attempts_max = 16;  // bytes that look like a description by accident
constexpr uint64_t body_bytes_max = uint64_t{1} << 32;

uint64_t number(const json &object, const char *key, uint64_t otherwise) {
  const auto found = object.find(key);
  return found != object.end() && found->is_number_unsigned() ? found->get<uint64_t>() : otherwise;
}

std::string text(const json &object, const char *key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_string() ? found->get<std::string>() : std::string();
}

/// Bytes of what has fields and subsections; nullopt: nobody knows. "size" counts what is nested.
std::optional<uint64_t> described_bytes(const json &described, unsigned depth = 0) {
  constexpr unsigned depth_max = 32;
  constexpr size_t subsection_head_bytes = 1 + 1 + 4;  // and the name
  uint64_t bytes = 0;
  if (const auto fields = described.find("fields"); fields != described.end()) {
    for (const json &field : *fields) {
      if (!field.is_object()) {
        return std::nullopt;
      }
      const uint64_t size = number(field, "size", body_bytes_max);
      const uint64_t count = number(field, "array_len", 1);
      if (size >= body_bytes_max || count >= body_bytes_max || size * count >= body_bytes_max) {
        return std::nullopt;
      }
      bytes += size * count;
    }
  }
  if (const auto subsections = described.find("subsections"); subsections != described.end()) {
    for (const json &subsection : *subsections) {
      const auto inner = subsection.is_object() && depth < depth_max
                             ? described_bytes(subsection, depth + 1)
                             : std::nullopt;
      if (!inner) {
        return std::nullopt;
      }
      bytes += subsection_head_bytes + text(subsection, "vmsd_name").size() + *inner;
    }
  }
  return bytes < body_bytes_max ? std::optional(bytes) : std::nullopt;
}

using Sizes = std::map<std::pair<std::string, uint64_t>, uint64_t>;  // by name and instance

Sizes sizes_of(const json &description) {
  Sizes sizes;
  const auto devices = description.is_object() ? description.find("devices") : description.end();
  if (devices == description.end() || !devices->is_array()) {
    return sizes;
  }
  for (const json &device : *devices) {
    if (!device.is_object()) {
      continue;
    }
    if (const auto bytes = described_bytes(device)) {
      sizes.emplace(std::pair(text(device, "name"),
                              number(device, "instance_id", std::numeric_limits<uint64_t>::max())),
                    *bytes);
    }
  }
  return sizes;
}

/// Empty if one section is not described or goes past the end.
SectionRun split_by(std::span<const std::byte> bytes, const Sizes &sizes) {
  SectionRun run;
  for (;;) {
    const auto header = parse_section_header(bytes, run.end);
    if (!header || header->type != section_full || header->idstr == "ram") {
      return run;
    }
    const auto size = sizes.find({std::string(header->idstr), header->instance});
    const size_t body = run.end + header->bytes;
    if (size == sizes.end() || size->second > bytes.size() - body ||
        run.sections.size() >= device_sections_max) {
      return {};
    }
    const size_t end = body + size->second;
    run.sections.push_back({header->id, std::string(header->idstr), header->instance,
                            header->version, bytes.subspan(body, size->second),
                            bytes.subspan(run.end, end - run.end)});
    run.end = end;
  }
}

}  // namespace

Result<SectionRun> split_described_run(std::span<const std::byte> bytes) {
  // The end mark, the type, a length below 16 MiB.
  constexpr char head[] = {section_eof, section_vmdescription, 0};
  constexpr size_t head_bytes = 1 + 1 + 4;
  unsigned attempts = 0;
  for (size_t at = 0; attempts < attempts_max; ++at) {
    const void *const hit = memmem(bytes.data() + at, bytes.size() - at, head, sizeof head);
    if (hit == nullptr) {
      break;
    }
    at = static_cast<size_t>(static_cast<const std::byte *>(hit) - bytes.data());
    if (bytes.size() - at <= head_bytes || bytes[at + head_bytes] != std::byte{'{'}) {
      continue;
    }
    const auto size = load_be<uint32_t>(&bytes[at + 2]);
    if (size > description_bytes_max || size > bytes.size() - at - head_bytes) {
      continue;
    }
    ++attempts;
    const auto *const begin = reinterpret_cast<const char *>(&bytes[at + head_bytes]);
    SectionRun run = split_by(bytes, sizes_of(json::parse(begin, begin + size, nullptr, false)));
    // What follows must be the end mark, or sections of another kind.
    if (!run.sections.empty() && run.end <= at) {
      return run;
    }
  }
  return fail(
      ErrorCode::not_supported,
      "device sections without footers (a machine type up to 2.3), and no description behind "
      "them that says where they end: load the state with QEMU and save it again");
}

}  // namespace qvmstate::vmstate
