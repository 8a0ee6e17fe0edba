#include "vmstate/built_section.h"

#include <cassert>
#include <cstring>
#include <utility>

#include "qcow2/io/endian.h"
#include "vmstate/section_scan.h"
#include "vmstate/stream_format.h"
#include "vmstate/stream_parts.h"

namespace qvmstate::vmstate {
namespace {

constexpr size_t id_at = 1;  // after the type byte

}  // namespace

BuiltSection::BuiltSection(std::string idstr, uint32_t instance, uint32_t version)
    : idstr_(std::move(idstr)), instance_(instance), version_(version) {
  StreamPart head;
  head.add(section_full);
  head.add(uint32_t{0});  // the id, which close() knows
  head.add_short_text(idstr_);
  head.add(instance_);
  head.add(version_);
  whole_.assign(head.span().begin(), head.span().end());
  body_at_ = whole_.size();
}

void BuiltSection::add(std::span<const std::byte> bytes) {
  whole_.insert(whole_.end(), bytes.begin(), bytes.end());
}

bool BuiltSection::has_footer_of(uint32_t id) const {
  std::byte footer[section_footer_bytes] = {std::byte{section_footer}};
  store_be<uint32_t>(footer + 1, id);
  return ::memmem(whole_.data() + body_at_, whole_.size() - body_at_, footer, sizeof footer) !=
         nullptr;
}

void BuiltSection::close(uint32_t id) {
  assert(!has_footer_of(id));
  id_ = id;
  store_be<uint32_t>(whole_.data() + id_at, id);
  StreamPart footer;
  footer.add(section_footer);
  footer.add(id);
  add(footer.span());
}

DeviceSection BuiltSection::section() const {
  const std::span<const std::byte> whole(whole_);
  return {id_,
          idstr_,
          instance_,
          version_,
          whole.subspan(body_at_, whole.size() - body_at_ - section_footer_bytes),
          whole};
}

}  // namespace qvmstate::vmstate
