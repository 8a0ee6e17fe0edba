#include "tools/libvirt_save.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <span>
#include <string_view>

#include "qcow2/io/endian.h"
#include "qcow2/io/offsets.h"

namespace qvmstate::tools {

namespace {

constexpr std::string_view magic = "LibvirtQemudSave";
constexpr std::string_view magic_of_unfinished = "LibvirtQemudPart";
// magic; u32 version, data bytes, was running, format, cookie offset; 14 unused ones
constexpr uint64_t header_bytes = 16 + 5 * 4 + 14 * 4;
constexpr uint32_t written_version = 2;
constexpr uint32_t version_max = 3;
constexpr uint32_t data_bytes_max = 64 * mib;  // XMLs have some KiB
constexpr uint64_t room_for_xml = 64 * kib;
constexpr uint64_t head_alignment = 4096;

}  // namespace

Result<std::optional<LibvirtSave>> read_libvirt_save(io::File &file) {
  std::array<std::byte, header_bytes> header;
  QV_TRY(file.read_or_zero_at(header, HostOffset(0)));
  const std::string_view text(reinterpret_cast<const char *>(header.data()), magic.size());
  const auto bad = [&file](const std::string &what) {
    return fail(ErrorCode::bad_stream, file.name() + ": libvirt save file: " + what);
  };
  if (text == magic_of_unfinished) {
    return bad("it was never finished");
  }
  if (text != magic) {
    return std::optional<LibvirtSave>();
  }
  const auto word = [&header](size_t index, bool swapped) {
    uint32_t value = 0;
    std::memcpy(&value, header.data() + magic.size() + index * 4, sizeof value);
    return swapped ? byte_swap(value) : value;
  };
  const bool swapped = word(0, false) > version_max;
  const uint32_t version = word(0, swapped);
  const uint32_t data_bytes = word(1, swapped);
  const uint32_t format = word(3, swapped);
  const uint32_t cookie_offset = word(4, swapped);
  if (version > version_max || format > static_cast<uint32_t>(LibvirtFormat::sparse)) {
    return fail(ErrorCode::not_supported, file.name() + ": libvirt save file of version " +
                                              std::to_string(version) + " and format " +
                                              std::to_string(format) + ", which is not known");
  }
  QV_ASSIGN(const uint64_t file_bytes, file.size());
  if (file_bytes < header_bytes || data_bytes == 0 || data_bytes > data_bytes_max ||
      data_bytes > file_bytes - header_bytes || cookie_offset > data_bytes) {
    return bad("its XML does not lie in it");
  }
  LibvirtSave save;
  save.format = static_cast<LibvirtFormat>(format);
  save.stream_offset = header_bytes + data_bytes;
  save.xml.resize(cookie_offset != 0 ? cookie_offset : data_bytes);
  QV_TRY(file.read_at(std::as_writable_bytes(std::span(save.xml)), HostOffset(header_bytes)));
  save.xml.resize(std::min(save.xml.find('\0'), save.xml.size()));
  return std::optional(std::move(save));
}

Result<std::vector<std::byte>> format_libvirt_save(LibvirtFormat format, const std::string &xml) {
  const uint64_t wanted = header_bytes + xml.size() + 1 + room_for_xml;
  const uint64_t head_bytes = round_up(wanted, head_alignment);
  const uint64_t data_bytes = head_bytes - header_bytes;
  if (data_bytes > data_bytes_max || xml.find('\0') != std::string::npos) {
    return fail(ErrorCode::bad_argument, "this is no XML of a domain: it is too long or binary");
  }
  std::vector<std::byte> head(head_bytes);
  std::memcpy(head.data(), magic.data(), magic.size());
  size_t at = magic.size();
  for (const uint32_t value :
       {written_version, static_cast<uint32_t>(data_bytes), uint32_t{1},  // it was running
        static_cast<uint32_t>(format), uint32_t{0}}) {
    std::memcpy(head.data() + at, &value, sizeof value);
    at += sizeof value;
  }
  std::memcpy(head.data() + header_bytes, xml.data(), xml.size());
  return head;
}

}  // namespace qvmstate::tools
