#include "qcow2/snapshot_table.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <unordered_set>

#include "qcow2/limits.h"

namespace qvmstate::qcow2 {
namespace {

constexpr uint64_t known_extra_bytes = 24;  // 64-bit vmstate size, disk size, icount
constexpr uint64_t entry_alignment = 8;

bool all_digits(std::string_view text) {
  return !text.empty() &&
         std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

/// What is left of an id or name in QEMU's buffers: cut at NUL and at the buffer's end.
std::string_view as_qemu_sees(std::string_view text, uint64_t bytes_max) {
  return text.substr(0, std::min<uint64_t>(text.find('\0'), bytes_max));
}

std::string_view seen_id(const Snapshot &snapshot) {
  return as_qemu_sees(snapshot.id, snapshot_id_bytes_max);
}

std::string_view seen_name(const Snapshot &snapshot) {
  return as_qemu_sees(snapshot.name, snapshot_name_bytes_max);
}

/// The value of a decimal id; 0 for other ids and for those that 64 bits cannot hold.
uint64_t decimal_id(std::string_view id) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(id.data(), id.data() + id.size(), value);
  return error == std::errc() && end == id.data() + id.size() ? value : 0;
}

void append(std::vector<std::byte> &bytes, const void *data, size_t count) {
  const auto *first = static_cast<const std::byte *>(data);
  bytes.insert(bytes.end(), first, first + count);
}

}  // namespace

Result<std::vector<Snapshot>> parse_snapshot_table(std::span<const std::byte> table, uint32_t count,
                                                   uint64_t disk_bytes,
                                                   std::string_view image_name) {
  uint32_t index = 0;
  const auto bad = [&](const std::string &what) {
    return fail(ErrorCode::bad_image, std::string(image_name) + ": snapshot table entry " +
                                          std::to_string(index + 1) + " of " +
                                          std::to_string(count) + " " + what);
  };
  if (count > snapshots_max) {
    return fail(ErrorCode::bad_image, std::string(image_name) + ": has " + std::to_string(count) +
                                          " snapshots, and at most " +
                                          std::to_string(snapshots_max) + " are valid");
  }
  std::vector<Snapshot> snapshots;
  uint64_t position = 0;
  for (; index < count; ++index) {
    position = round_up(position, entry_alignment);
    if (position > table.size() || table.size() - position < sizeof(RawSnapshot)) {
      return bad("is cut short: the table ends inside it");
    }
    RawSnapshot raw;
    std::memcpy(&raw, &table[position], sizeof raw);
    position += sizeof raw;

    const uint64_t extra_bytes = raw.extra_bytes;
    if (extra_bytes > snapshot_extra_bytes_max) {
      return bad("has " + std::to_string(extra_bytes) + " bytes of extra data, and at most " +
                 std::to_string(snapshot_extra_bytes_max) + " are valid");
    }
    if (table.size() - position < extra_bytes + raw.id_bytes + raw.name_bytes) {
      return bad("is cut short: the table ends inside it");
    }
    const auto extra = table.subspan(position, extra_bytes);
    position += extra_bytes;

    Snapshot snapshot;
    snapshot.entry_extra_bytes = raw.extra_bytes;
    snapshot.l1_offset = HostOffset(raw.l1_offset);
    snapshot.l1_entries = raw.l1_entries;
    snapshot.date_seconds = raw.date_seconds;
    snapshot.date_nanos = raw.date_nanos;
    snapshot.clock_nanos = raw.clock_nanos;
    snapshot.vmstate_bytes = raw.vmstate_bytes;
    snapshot.disk_bytes = disk_bytes;
    if (extra_bytes >= 8) {
      snapshot.vmstate_bytes = load_be<uint64_t>(extra.data());
    }
    if (extra_bytes >= 16) {
      snapshot.disk_bytes = load_be<uint64_t>(extra.data() + 8);
    }
    if (extra_bytes >= known_extra_bytes) {
      snapshot.icount = load_be<uint64_t>(extra.data() + 16);
      snapshot.more_extra.assign(extra.begin() + known_extra_bytes, extra.end());
    }
    const auto *text = reinterpret_cast<const char *>(table.data());
    snapshot.id.assign(text + position, raw.id_bytes);
    position += raw.id_bytes;
    snapshot.name.assign(text + position, raw.name_bytes);
    position += raw.name_bytes;
    if (position > snapshot_table_bytes_max) {
      return bad("lies past the " + std::to_string(snapshot_table_bytes_max) +
                 " bytes that are valid for the table");
    }
    snapshots.push_back(std::move(snapshot));
  }
  return snapshots;
}

Result<std::vector<std::byte>> format_snapshot_table(std::span<const Snapshot> snapshots) {
  if (snapshots.size() > snapshots_max) {
    return fail(ErrorCode::no_space, "an image can hold at most " + std::to_string(snapshots_max) +
                                         " snapshots: delete some first");
  }
  std::vector<std::byte> table;
  for (const Snapshot &snapshot : snapshots) {
    const uint64_t extra_bytes = known_extra_bytes + snapshot.more_extra.size();
    if (snapshot.id.size() > UINT16_MAX || snapshot.name.size() > UINT16_MAX ||
        extra_bytes > snapshot_extra_bytes_max) {
      return fail(ErrorCode::bad_argument,
                  "snapshot '" + snapshot.name.substr(0, 64) +
                      "': its id, name or extra data is longer than an entry can hold");
    }
    table.resize(round_up(table.size(), entry_alignment));

    RawSnapshot raw;
    raw.l1_offset = snapshot.l1_offset.value;
    raw.l1_entries = snapshot.l1_entries;
    raw.id_bytes = static_cast<uint16_t>(snapshot.id.size());
    raw.name_bytes = static_cast<uint16_t>(snapshot.name.size());
    raw.date_seconds = snapshot.date_seconds;
    raw.date_nanos = snapshot.date_nanos;
    raw.clock_nanos = snapshot.clock_nanos;
    raw.vmstate_bytes = snapshot.vmstate_bytes > UINT32_MAX
                            ? uint32_t{0}
                            : static_cast<uint32_t>(snapshot.vmstate_bytes);
    raw.extra_bytes = static_cast<uint32_t>(extra_bytes);
    append(table, &raw, sizeof raw);
    for (const uint64_t field : {snapshot.vmstate_bytes, snapshot.disk_bytes, snapshot.icount}) {
      const Be64 stored = field;
      append(table, &stored, sizeof stored);
    }
    append(table, snapshot.more_extra.data(), snapshot.more_extra.size());
    append(table, snapshot.id.data(), snapshot.id.size());
    append(table, snapshot.name.data(), snapshot.name.size());
    if (table.size() > snapshot_table_bytes_max) {
      return fail(ErrorCode::no_space, "the snapshot table would be larger than the " +
                                           std::to_string(snapshot_table_bytes_max) +
                                           " bytes that are valid: delete snapshots first");
    }
  }
  return table;
}

Result<void> check_snapshot_name(std::string_view name, std::span<const Snapshot> others) {
  const auto bad = [](const std::string &what) { return fail(ErrorCode::bad_argument, what); };
  if (name.empty()) {
    return bad("a snapshot name must have at least one character");
  }
  if (name.size() > snapshot_name_bytes_max) {
    return bad("the snapshot name has " + std::to_string(name.size()) +
               " bytes, and QEMU can load only names of at most " +
               std::to_string(snapshot_name_bytes_max));
  }
  if (std::any_of(name.begin(), name.end(), [](char c) {
        return static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) == 0x7f;
      })) {
    return bad("the snapshot name has control characters in it, which QEMU's monitor cannot take");
  }
  if (all_digits(name)) {
    return bad("the snapshot name '" + std::string(name) +
               "' is a number, and QEMU's loadvm would take it for the id of a snapshot: put a "
               "letter into it");
  }
  for (const Snapshot &other : others) {
    if (seen_id(other) == name) {
      return bad("the snapshot name '" + std::string(name) + "' is the id of the snapshot '" +
                 other.name + "', which QEMU's loadvm would load instead: choose another name");
    }
  }
  return {};
}

std::string next_snapshot_id(std::span<const Snapshot> snapshots) {
  uint64_t largest = 0;
  std::unordered_set<std::string_view> taken;
  for (const Snapshot &snapshot : snapshots) {
    largest = std::max(largest, decimal_id(seen_id(snapshot)));
    taken.insert(seen_id(snapshot));
    taken.insert(seen_name(snapshot));
  }
  std::string id;
  uint64_t candidate = largest;
  do {
    ++candidate;
    id = std::to_string(candidate);
  } while (candidate == 0 ||  // came round past the largest id that 64 bits hold
           taken.contains(id));
  return id;
}

int find_snapshot(std::span<const Snapshot> snapshots, std::string_view name) {
  const auto found = std::find_if(snapshots.begin(), snapshots.end(), [name](const Snapshot &s) {
    return s.name == name || seen_name(s) == name;
  });
  return found == snapshots.end() ? -1 : static_cast<int>(found - snapshots.begin());
}

}  // namespace qvmstate::qcow2
