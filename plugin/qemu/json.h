// Reading JSON that somebody else wrote: every access checks the type, and nothing throws.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace qvmstate::qemu {

using Json = nlohmann::json;

/// How deep a message may nest. QEMU describes a backing chain as one object in the other, and its
/// chains are seldom longer than some ten files; what nests deeper is left out.
constexpr int json_depth_max = 1000;

/// Discarded if it is no JSON. Takes at most some 30 bytes for each of the text, whose length the
/// reader of lines bounds.
inline Json parse_json(std::string_view text) {
  return Json::parse(
      text, [](int depth, Json::parse_event_t, const Json &) { return depth < json_depth_max; },
      false);
}

/// A value that is not there; what at() returns for a missing key or a value that is no object.
inline const Json json_missing = Json(Json::value_t::discarded);

/// The member of an object, or json_missing.
inline const Json &at(const Json &value, std::string_view key) {
  if (value.is_object()) {
    if (auto found = value.find(key); found != value.end()) {
      return *found;
    }
  }
  return json_missing;
}

inline std::string text(const Json &value, const std::string &fallback = {}) {
  const auto *string = value.get_ptr<const std::string *>();
  return string != nullptr ? *string : fallback;
}
inline std::string text_at(const Json &value, std::string_view key,
                           const std::string &fallback = {}) {
  return text(at(value, key), fallback);
}

inline bool flag_at(const Json &value, std::string_view key, bool fallback = false) {
  const auto *flag = at(value, key).get_ptr<const bool *>();
  return flag != nullptr ? *flag : fallback;
}

inline uint64_t number_at(const Json &value, std::string_view key, uint64_t fallback = 0) {
  const Json &number = at(value, key);
  if (const auto *positive = number.get_ptr<const uint64_t *>()) {
    return *positive;
  }
  const auto *integer = number.get_ptr<const int64_t *>();
  return integer != nullptr && *integer >= 0 ? static_cast<uint64_t>(*integer) : fallback;
}

inline double real_at(const Json &value, std::string_view key, double fallback = 0) {
  const Json &number = at(value, key);
  return number.is_number() ? number.get<double>() : fallback;
}

/// One line of text; bytes that are no UTF-8 are replaced instead of thrown at.
inline std::string to_line(const Json &value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace qvmstate::qemu
