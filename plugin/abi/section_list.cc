#include "plugin/abi/section_list.h"

#include <algorithm>
#include <cstring>
#include <random>

#include "vmstate/section_scan.h"
#include "vmstate/stream_format.h"

namespace qvmstate::abi {

Outcome<vmstate::BuiltSection> SectionList::begin(const qvmstate_section &given) const {
  const size_t name_bytes =
      given.name == nullptr ? 0 : ::strnlen(given.name, vmstate::section_idstr_bytes_max + 1);
  const auto is_printable = [](char c) { return c >= 0x20 && c < 0x7f; };
  if (name_bytes == 0 || name_bytes > vmstate::section_idstr_bytes_max ||
      !std::all_of(given.name, given.name + name_bytes, is_printable)) {
    return refuse(QVMSTATE_BAD_ARGUMENT,
                  "device section: its name must have 1 to 255 printable ASCII characters");
  }
  const std::string name = given.name;
  const std::string where = "device section '" + name + "': ";
  if (name == "ram") {
    return refuse(QVMSTATE_BAD_ARGUMENT, where + "this name is that of the RAM section");
  }
  if (given.version > vmstate::section_version_max) {
    return refuse(QVMSTATE_BAD_ARGUMENT,
                  where + "version " + std::to_string(given.version) + " is more than 65535");
  }
  if (names_.contains({name, given.instance})) {
    return refuse(QVMSTATE_BAD_ARGUMENT, where + "there is one of this name and instance " +
                                             std::to_string(given.instance) + " already");
  }
  if (sections_.size() >= vmstate::device_sections_max) {
    return refuse(QVMSTATE_BAD_ARGUMENT, where + "there are 16384 sections already");
  }
  return vmstate::BuiltSection(name, given.instance, given.version);
}

Outcome<void> SectionList::put(vmstate::BuiltSection &section, const void *data,
                               uint64_t bytes) const {
  const std::string where = "device section '" + section.idstr() + "': ";
  if (data == nullptr && bytes > 0) {
    return refuse(QVMSTATE_BAD_ARGUMENT, where + "its data is NULL");
  }
  if (bytes > sections_bytes_max - bytes_ - section.body_bytes()) {
    return refuse(QVMSTATE_BAD_ARGUMENT,
                  where +
                      "with it the sections have more than 192 MiB; make a RAM block of what "
                      "is large");
  }
  section.add({static_cast<const std::byte *>(data), bytes});
  return {};
}

void SectionList::add(vmstate::BuiltSection section) {
  bytes_ += section.body_bytes();
  section.close(unused_id(section));
  names_.emplace(section.idstr(), section.instance());
  sections_.push_back(std::move(section));
}

/// Small numbers as a rule. A guest that writes footers of those into a device's bytes does not
/// know which number comes instead.
uint32_t SectionList::unused_id(const vmstate::BuiltSection &section) {
  uint32_t id = next_id_++;
  while (section.has_footer_of(id) || ids_.contains(id)) {
    id = std::random_device()() % vmstate::ram_section_id;
  }
  ids_.insert(id);
  return id;
}

std::vector<vmstate::DeviceSection> SectionList::sections() const {
  std::vector<vmstate::DeviceSection> list;
  list.reserve(sections_.size());
  for (const vmstate::BuiltSection &section : sections_) {
    list.push_back(section.section());
  }
  return list;
}

}  // namespace qvmstate::abi
