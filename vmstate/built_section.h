// A device section put together here, from bytes that mean nothing to us.
//
// Readers find the end of a section by its footer, the byte 7e and the section's id. What a guest
// puts into a device could look like that; so the id is chosen when all bytes are known, and such
// that no footer of it is among them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "vmstate/device_sections.h"

namespace qvmstate::vmstate {

class BuiltSection {
 public:
  /// Preconditions: 1 to 255 printable characters, not "ram"; version <= section_version_max.
  BuiltSection(std::string idstr, uint32_t instance, uint32_t version);

  const std::string &idstr() const { return idstr_; }
  uint32_t instance() const { return instance_; }

  void add(std::span<const std::byte> bytes);
  /// So far. Precondition: not closed.
  size_t body_bytes() const { return whole_.size() - body_at_; }
  /// Whether a footer of section `id` is among the bytes.
  bool has_footer_of(uint32_t id) const;
  /// No more bytes come. Precondition: !has_footer_of(id).
  void close(uint32_t id);
  /// Valid as long as this is. Precondition: closed.
  DeviceSection section() const;

 private:
  std::string idstr_;
  uint32_t instance_;
  uint32_t version_;
  uint32_t id_ = 0;
  size_t body_at_;
  std::vector<std::byte> whole_;
};

}  // namespace qvmstate::vmstate
