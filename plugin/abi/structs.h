// The host's structs, which begin with their size: read whatever version of them the host has, and
// filled as far as it knows them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "plugin/abi/failure.h"

namespace qvmstate::abi {

// Far above any version; an uninitialised size is as a rule above it.
constexpr uint32_t struct_bytes_max = 4096;

/// All structs are of the first version still. One that grows keeps its first size here.
template <class T>
constexpr uint32_t first_version_bytes = sizeof(T);

template <class T>
Outcome<uint32_t> check_struct(const T *given, const char *name) {
  if (given == nullptr) {
    return refuse(QVMSTATE_BAD_ARGUMENT, std::string(name) + ": is NULL");
  }
  if (given->size < first_version_bytes<T> || given->size > struct_bytes_max) {
    return refuse(QVMSTATE_BAD_ARGUMENT, std::string(name) + ": its size is " +
                                             std::to_string(given->size) +
                                             "; set it to sizeof(struct " + name + ")");
  }
  return given->size;
}

/// What a host did not know of is 0.
template <class T>
Outcome<T> read_struct(const T *given, const char *name) {
  QV_ASSIGN(const uint32_t size, check_struct(given, name));
  T known{};
  std::memcpy(&known, given, std::min<size_t>(size, sizeof known));
  const auto *bytes = reinterpret_cast<const unsigned char *>(given);
  if (size > sizeof known &&
      std::any_of(bytes + sizeof known, bytes + size, [](unsigned char b) { return b != 0; })) {
    return refuse(QVMSTATE_NOT_SUPPORTED,
                  std::string(name) +
                      ": uses members that this libqvmstate.so does not know; load a newer one");
  }
  return known;
}

/// Leaves the size as the host set it. Precondition: check_struct().
template <class T>
void fill_struct(T *to, T values) {
  values.size = to->size;
  std::memcpy(to, &values, std::min<size_t>(to->size, sizeof values));
}

}  // namespace qvmstate::abi
