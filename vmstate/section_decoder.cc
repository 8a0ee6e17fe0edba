#include "vmstate/section_decoder.h"

#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>

#include "qcow2/io/endian.h"
#include "vmstate/cpu_layouts.h"
#include "vmstate/ram_map.h"
#include "vmstate/stream_format.h"

namespace qvmstate::vmstate {
namespace {

// QEMU's descriptions have some 100 KiB; the tree made of one takes many times its bytes.
constexpr size_t description_bytes_max = 4 * 1024 * 1024;
constexpr unsigned depth_max = 32;         // QEMU's structures nest less than 10 deep
constexpr size_t values_max = 256 * 1024;  // of one section

std::optional<uint64_t> number(const DecodedJson &object, const char *key) {
  const auto found = object.find(key);
  if (found == object.end() || !found->is_number_unsigned()) {
    return std::nullopt;
  }
  return found->get<uint64_t>();
}

std::string_view text(const DecodedJson &object, const char *key) {
  const auto found = object.find(key);
  if (found == object.end() || !found->is_string()) {
    return {};
  }
  return found->get_ref<const std::string &>();
}

/// An object's array of that name, or an empty one.
const DecodedJson &list(const DecodedJson &object, const char *key) {
  static const DecodedJson none = DecodedJson::array();
  if (!object.is_object()) {
    return none;
  }
  const auto found = object.find(key);
  return found != object.end() && found->is_array() ? *found : none;
}

/// "uint32", and "int32 equal", as QEMU calls integers that it compares; 's', 'u' or 0.
char integer_sign(std::string_view type) {
  const char sign = type.starts_with("int") ? 's' : type.starts_with("uint") ? 'u' : '\0';
  type.remove_prefix(sign == 's' ? 3 : sign == 'u' ? 4 : type.size());
  return !type.empty() && type[0] >= '1' && type[0] <= '9' ? sign : '\0';
}

/// Walks the fields of one section over its bytes.
class Walk {
 public:
  explicit Walk(std::span<const std::byte> bytes) : left_(bytes) {}

  bool fields(const DecodedJson &described, DecodedJson &out, unsigned depth) {
    if (depth > depth_max) {
      return false;
    }
    for (const DecodedJson &field : described) {
      if (!field.is_object() || ++values_ > values_max) {
        return false;
      }
      std::string name(text(field, "name"));
      if (const auto index = number(field, "index")) {
        name += "[" + std::to_string(*index) + "]";
      }
      while (out.contains(name)) {
        name += "'";
      }
      DecodedJson value;
      if (!array_or_one(field, value, depth)) {
        return false;
      }
      out[name] = std::move(value);
    }
    return true;
  }

  bool subsections(const DecodedJson &described, DecodedJson &out, unsigned depth) {
    for (const DecodedJson &subsection : described) {
      const std::string_view name = text(subsection, "vmsd_name");
      const size_t head_bytes = 1 + 1 + name.size() + 4;
      if (depth > depth_max || left_.size() < head_bytes ||
          static_cast<uint8_t>(left_[0]) != section_subsection ||
          static_cast<size_t>(left_[1]) != name.size() ||
          std::string_view(reinterpret_cast<const char *>(&left_[2]), name.size()) != name) {
        return false;
      }
      left_ = left_.subspan(head_bytes);
      DecodedJson inner = DecodedJson::object();
      if (!structure(subsection, inner, depth + 1)) {
        return false;
      }
      out[std::string(name)] = std::move(inner);
    }
    return true;
  }

  /// Fields, and under "subsections" those.
  bool structure(const DecodedJson &described, DecodedJson &out, unsigned depth) {
    if (!fields(list(described, "fields"), out, depth)) {
      return false;
    }
    const DecodedJson &under = list(described, "subsections");
    if (under.empty()) {
      return true;
    }
    DecodedJson inner = DecodedJson::object();
    if (!subsections(under, inner, depth)) {
      return false;
    }
    out["subsections"] = std::move(inner);
    return true;
  }

  std::span<const std::byte> left() const { return left_; }

 private:
  bool array_or_one(const DecodedJson &field, DecodedJson &value, unsigned depth) {
    const auto length = number(field, "array_len");
    if (!length) {
      return one(field, value, depth);
    }
    value = DecodedJson::array();
    for (uint64_t i = 0; i < *length; ++i) {
      DecodedJson element;
      if (++values_ > values_max || !one(field, element, depth)) {
        return false;
      }
      value.push_back(std::move(element));
    }
    return true;
  }

  bool one(const DecodedJson &field, DecodedJson &value, unsigned depth) {
    const auto inner = field.find("struct");
    // What is computed while it is saved has its fields in the field itself.
    const DecodedJson *const nested = inner != field.end() && inner->is_object() ? &*inner
                                      : field.contains("fields")                 ? &field
                                                                                 : nullptr;
    if (nested != nullptr) {
      value = DecodedJson::object();
      return structure(*nested, value, depth + 1);
    }
    const auto size = number(field, "size");
    if (!size || *size > left_.size()) {
      return false;
    }
    const auto bytes = left_.first(*size);
    left_ = left_.subspan(*size);
    value = scalar(text(field, "type"), bytes);
    return true;
  }

  static DecodedJson scalar(std::string_view type, std::span<const std::byte> bytes) {
    if (type == "bool" && bytes.size() == 1) {
      return bytes[0] != std::byte{0};
    }
    const char sign = integer_sign(type);
    if (sign == '\0' || bytes.empty() || bytes.size() > 8) {
      return to_hex(bytes);
    }
    const bool is_signed = sign == 's';
    uint64_t value = is_signed && (bytes[0] & std::byte{0x80}) != std::byte{0} ? UINT64_MAX : 0;
    for (const std::byte byte : bytes) {
      value = value << 8 | static_cast<uint64_t>(byte);
    }
    return is_signed ? DecodedJson(static_cast<int64_t>(value)) : DecodedJson(value);
  }

  std::span<const std::byte> left_;
  size_t values_ = 0;
};

/// qvmstate's own description names sections only: one buffer each.
bool tells_fields(const DecodedJson &device) {
  const DecodedJson &fields = list(device, "fields");
  return !(fields.size() == 1 && fields[0].is_object() && text(fields[0], "type") == "buffer") ||
         !list(device, "subsections").empty();
}

std::vector<const CpuLayout *> layouts_for(const StreamSummary &stream) {
  const std::string_view machine = stream.machine_type;
  if (machine.starts_with("pc-") || machine == "microvm") {
    return {&x86_64_cpu_layout, &i386_cpu_layout};
  }
  if (is_arm_virt(stream)) {
    return {&aarch64_cpu_layout};
  }
  return {};
}

/// Which x86 CPU it is nothing tells, but where one has its flags, the other has segments. Of the
/// flags bit 1 is always set, and these never.
bool has_impossible_flags(const DecodedJson &fields) {
  constexpr uint64_t always_set = 0x2;
  constexpr uint64_t never_set = ~uint64_t{0x3fffff} | 0x8028;
  const auto flags = number(fields, "env.eflags");
  return flags && (*flags & (always_set | never_set)) != always_set;
}

}  // namespace

std::string to_hex(std::span<const std::byte> bytes) {
  static constexpr char digits[] = "0123456789abcdef";
  std::string hex;
  hex.reserve(bytes.size() * 2);
  for (const std::byte byte : bytes) {
    hex += digits[static_cast<uint8_t>(byte) >> 4];
    hex += digits[static_cast<uint8_t>(byte) & 15];
  }
  return hex;
}

SectionDecoder::SectionDecoder(const StreamSummary &stream) {
  if (stream.vmdescription.size() <= description_bytes_max) {
    description_ = DecodedJson::parse(stream.vmdescription, nullptr, false);
  }
  for (const CpuLayout *const layout : layouts_for(stream)) {
    cpu_layouts_.push_back({{"version_min", layout->version_min},
                            {"version_max", layout->version_max},
                            {"fields", DecodedJson::parse(layout->fields)}});
  }
}

DecodedJson SectionDecoder::decode(const StreamSection &section,
                                   std::span<const std::byte> body) const {
  DecodedJson out = {{"name", section.idstr},
                     {"instance", section.instance},
                     {"version", section.version},
                     {"size", body.size()}};
  for (const DecodedJson &device : list(description_, "devices")) {
    if (!device.is_object() || text(device, "name") != section.idstr ||
        number(device, "instance_id") != section.instance || !tells_fields(device)) {
      continue;
    }
    Walk walk(body);
    DecodedJson fields = DecodedJson::object();
    DecodedJson under = DecodedJson::object();
    if (walk.fields(list(device, "fields"), fields, 0) &&
        walk.subsections(list(device, "subsections"), under, 0) && walk.left().empty()) {
      out["fields"] = std::move(fields);
      if (!under.empty()) {
        out["subsections"] = std::move(under);
      }
      return out;
    }
  }
  for (const DecodedJson &layout : cpu_layouts_) {
    if (section.idstr != "cpu" || section.version < number(layout, "version_min") ||
        section.version > number(layout, "version_max")) {
      continue;
    }
    Walk walk(body);
    DecodedJson fields = DecodedJson::object();
    if (walk.fields(list(layout, "fields"), fields, 0) && !has_impossible_flags(fields)) {
      out["fields"] = std::move(fields);
      out["rest"] = to_hex(walk.left());
      return out;
    }
  }
  out["raw"] = to_hex(body);
  return out;
}

}  // namespace qvmstate::vmstate
