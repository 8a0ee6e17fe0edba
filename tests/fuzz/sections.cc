// The input is what QEMU's xen-save-devices-state wrote, or a hostile program in its place. If it
// can be split, the sections lie inside it, one after the other, and add up to all of it.

#include <cstdlib>

#include "vmstate/device_sections.h"

namespace {

using namespace qvmstate;

constexpr size_t file_header_bytes = 8;
constexpr size_t end_mark_bytes = 1;

void require(bool condition) {
  if (!condition) {
    abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte *>(data), size);
  const auto sections = vmstate::split_device_sections(bytes);
  if (!sections) {
    return 0;
  }
  const std::byte *at = bytes.data() + file_header_bytes;
  for (const vmstate::DeviceSection &section : *sections) {
    require(section.whole.data() == at);
    require(section.body.data() >= section.whole.data());
    require(section.body.data() + section.body.size() <= at + section.whole.size());
    at += section.whole.size();
  }
  require(at + end_mark_bytes == bytes.data() + bytes.size());
  (void)vmstate::vm_clock_nanos(*sections);
  (void)vmstate::format_vmdescription("pc", {}, 4096, *sections);
  return 0;
}
