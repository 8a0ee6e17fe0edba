#include "vmstate/device_sections.h"

#include <algorithm>

#include "qcow2/io/endian.h"
#include "vmstate/section_scan.h"
#include "vmstate/stream_format.h"

namespace qvmstate::vmstate {
namespace {

constexpr size_t file_header_bytes = 8;

// Section "timer" (QEMU system/cpu-timers.c): i64 tick offset, 8 unused bytes, i64 clock offset,
// which is the VM clock itself while the VM is stopped; then, only with -icount, subsection
// "timer/icount" with i64 bias and i64 instruction count, and, only with -icount shift=auto, its
// subsection "timer/icount/shift" with i16 shift. Under icount the clock is bias + (count <<
// shift).
constexpr size_t timer_clock_at = 16;
constexpr size_t timer_fields_bytes = 24;
constexpr int icount_shift_max = 10;

/// The fields after the header of the subsection `name` in `body`, or nothing.
std::span<const std::byte> subsection_fields(std::span<const std::byte> body,
                                             std::string_view name) {
  std::vector<std::byte> header = {std::byte{section_subsection},
                                   static_cast<std::byte>(name.size())};
  for (const char c : name) {
    header.push_back(static_cast<std::byte>(c));
  }
  const auto hit = std::ranges::search(body, header);
  const size_t fields_at = (hit.begin() - body.begin()) + header.size() + 4;  // u32 version
  return hit.empty() || fields_at > body.size() ? std::span<const std::byte>{}
                                                : body.subspan(fields_at);
}

Result<int64_t> icount_clock(std::span<const std::byte> icount,
                             std::span<const std::byte> subsections) {
  const auto shift_field = subsection_fields(subsections, "timer/icount/shift");
  if (icount.size() < 16 || shift_field.size() < 2) {
    return fail(ErrorCode::not_supported,
                "device state: the VM clock under -icount with a fixed shift is not in the device "
                "state; run QEMU without -icount, or with -icount shift=auto");
  }
  const auto bias = static_cast<int64_t>(load_be<uint64_t>(icount.data()));
  const auto count = static_cast<int64_t>(load_be<uint64_t>(icount.data() + 8));
  const auto shift = static_cast<int16_t>(load_be<uint16_t>(shift_field.data()));
  int64_t clock = 0;
  if (shift < 0 || shift > icount_shift_max ||
      __builtin_mul_overflow(count, 1LL << shift, &clock) ||
      __builtin_add_overflow(clock, bias, &clock)) {
    return fail(
        ErrorCode::bad_stream,
        "device state: section \"timer\" holds an impossible instruction count; save again");
  }
  return clock;
}

void append_quoted(std::string &json, std::string_view text) {
  json += '"';
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      json += '\\';
    }
    // Section names are printable; a machine type from elsewhere may not be.
    json += c >= 0x20 && c < 0x7f ? c : '?';
  }
  json += '"';
}

void append_buffer_field(std::string &json, std::string_view name, size_t bytes) {
  json += "{\"name\": ";
  append_quoted(json, name);
  json += ", \"type\": \"buffer\", \"size\": " + std::to_string(bytes) + "}";
}

constexpr std::string_view u32_fields_begin = "{\"name\": \"";
constexpr std::string_view u32_fields_end = "\", \"type\": \"uint32\", \"size\": 4}";

}  // namespace

Result<std::vector<DeviceSection>> split_device_sections(std::span<const std::byte> bytes) {
  if (bytes.size() < file_header_bytes || load_be<uint32_t>(bytes.data()) != stream_magic ||
      load_be<uint32_t>(bytes.data() + 4) != stream_version) {
    return fail(ErrorCode::bad_stream,
                "device state: does not begin with a QEMU stream header of version 3; is the "
                "emulator QEMU 2.11 or newer?");
  }
  const auto is_last_end_mark = [&](size_t at) {
    return at + 1 == bytes.size() && bytes[at] == std::byte{section_eof};
  };
  QV_ASSIGN(SectionRun run, split_section_run(bytes, file_header_bytes, is_last_end_mark));
  return std::move(run.sections);
}

Result<uint64_t> vm_clock_nanos(std::span<const DeviceSection> sections) {
  const auto timer = std::ranges::find_if(
      sections, [](const DeviceSection &s) { return s.idstr == "timer" && s.version >= 2; });
  if (timer == sections.end() || timer->body.size() < timer_fields_bytes) {
    return fail(ErrorCode::bad_stream,
                "device state: no section \"timer\" of version 2, so the VM clock is unknown");
  }
  auto clock = static_cast<int64_t>(load_be<uint64_t>(timer->body.data() + timer_clock_at));
  const auto subsections = timer->body.subspan(timer_fields_bytes);
  if (const auto icount = subsection_fields(subsections, "timer/icount"); !icount.empty()) {
    QV_ASSIGN(clock, icount_clock(icount, subsections));
  }
  if (clock < 0) {
    return fail(ErrorCode::bad_stream,
                "device state: section \"timer\" holds a negative VM clock; save again");
  }
  return static_cast<uint64_t>(clock);
}

std::string format_vmdescription(const std::string &machine_type,
                                 std::optional<uint32_t> target_page_bits, uint64_t page_bytes,
                                 std::span<const DeviceSection> sections) {
  std::string json = "{\"configuration\": {\"vmsd_name\": \"configuration\", \"version\": 1, ";
  json += "\"fields\": [";
  json.append(u32_fields_begin).append("len").append(u32_fields_end).append(", ");
  append_buffer_field(json, "name", machine_type.size());
  json += "]";
  if (target_page_bits) {
    json += ", \"subsections\": [{\"vmsd_name\": \"configuration/target-page-bits\", ";
    json += "\"version\": 1, \"fields\": [";
    json.append(u32_fields_begin).append("target_page_bits").append(u32_fields_end);
    json += "]}]";
  }
  json += "}, \"page_size\": " + std::to_string(page_bytes) + ", \"devices\": [";
  bool first = true;
  for (const DeviceSection &section : sections) {
    json += first ? "{\"name\": " : ", {\"name\": ";
    first = false;
    append_quoted(json, section.idstr);
    json += ", \"instance_id\": " + std::to_string(section.instance);
    json += ", \"version\": " + std::to_string(section.version);
    json += ", \"size\": " + std::to_string(section.body.size()) + ", \"fields\": [";
    append_buffer_field(json, "data", section.body.size());
    json += "]}";
  }
  json += "]}";
  // analyze-migration.py finds the JSON by the first brace after the last NUL byte of the file, so
  // no byte of the u32 length in front of it may be a brace.
  const auto has_brace = [](size_t size) {
    return (size & 0xff) == '{' || (size >> 8 & 0xff) == '{' || (size >> 16 & 0xff) == '{';
  };
  while (has_brace(json.size())) {
    json += ' ';
  }
  return json;
}

}  // namespace qvmstate::vmstate
