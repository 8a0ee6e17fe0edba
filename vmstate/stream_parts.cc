#include "vmstate/stream_parts.h"

#include <bit>
#include <unordered_set>

#include "vmstate/section_scan.h"
#include "vmstate/stream_format.h"

namespace qvmstate::vmstate {
namespace {

constexpr uint64_t page_bytes_min = 4096;  // QEMU's targets; the flags need the bits below it
constexpr uint64_t blocks_bytes_max = uint64_t{1} << 56;  // far above any guest; sums do not wrap

}  // namespace

Result<void> check_stream_arguments(const StreamConfiguration &configuration,
                                    std::span<const RamBlock> blocks) {
  const uint64_t page_bytes = configuration.page_bytes;
  if (!std::has_single_bit(page_bytes) || page_bytes < page_bytes_min ||
      page_bytes > page_bytes_max) {
    return fail(ErrorCode::bad_argument, "vmstate stream: pages of " + std::to_string(page_bytes) +
                                             " bytes; only powers "
                                             "of two from 4096 to 65536 can be written");
  }
  if (blocks.empty()) {
    return fail(ErrorCode::bad_argument, "vmstate stream: the VM has no RAM block that migrates");
  }
  std::unordered_set<std::string_view> names;
  uint64_t sum_bytes = 0;
  for (const RamBlock &block : blocks) {
    const std::string where = "vmstate stream: RAM block \"" + block.idstr + "\": ";
    if (block.idstr.empty() || block.idstr.size() > section_idstr_bytes_max) {
      return fail(ErrorCode::bad_argument, where + "its name must have 1 to 255 bytes");
    }
    if (!names.insert(block.idstr).second) {
      return fail(ErrorCode::bad_argument, where + "two blocks have this name");
    }
    if (block.used_bytes == 0 || block.used_bytes % page_bytes != 0 ||
        block.used_bytes > blocks_bytes_max - sum_bytes) {
      return fail(ErrorCode::bad_argument,
                  where + "its size of " + std::to_string(block.used_bytes) +
                      " bytes is not a multiple of the page size, or impossibly large");
    }
    sum_bytes += block.used_bytes;
  }
  return {};
}

uint64_t total_bytes(std::span<const RamBlock> blocks) {
  uint64_t bytes = 0;
  for (const RamBlock &block : blocks) {
    bytes += block.used_bytes;
  }
  return bytes;
}

LoadOrder qemu_load_order(std::span<const DeviceSection> devices) {
  LoadOrder order;
  for (const DeviceSection &device : devices) {
    const bool early = device.idstr.ends_with("virtio-mem-device-early");
    (early ? order.before_ram : order.after_ram).push_back(device);
  }
  return order;
}

void add_stream_head(StreamPart &part, const StreamConfiguration &configuration,
                     std::span<const std::string_view> capabilities,
                     std::span<const DeviceSection> before_ram) {
  part.add(stream_magic);
  part.add(stream_version);
  part.add(section_configuration);
  part.add(static_cast<uint32_t>(configuration.machine_type.size()));
  part.add_text(configuration.machine_type);
  if (configuration.target_page_bits) {
    part.add(section_subsection);
    part.add_short_text("configuration/target-page-bits");
    part.add(uint32_t{1});  // version
    part.add(*configuration.target_page_bits);
  }
  if (!capabilities.empty()) {
    part.add(section_subsection);
    part.add_short_text("configuration/capabilities");
    part.add(uint32_t{1});  // version
    part.add(static_cast<uint32_t>(capabilities.size()));
    for (const std::string_view capability : capabilities) {
      part.add_short_text(capability);
    }
  }
  for (const DeviceSection &device : before_ram) {
    part.add_bytes(device.whole);
  }
}

void add_stream_tail(StreamPart &part, const StreamConfiguration &configuration,
                     const LoadOrder &devices) {
  for (const DeviceSection &device : devices.after_ram) {
    part.add_bytes(device.whole);
  }
  std::vector<DeviceSection> ordered = devices.before_ram;
  ordered.insert(ordered.end(), devices.after_ram.begin(), devices.after_ram.end());
  const std::string description =
      configuration.vmdescription.empty()
          ? format_vmdescription(configuration.machine_type, configuration.target_page_bits,
                                 configuration.page_bytes, ordered)
          : configuration.vmdescription;
  part.add(section_eof);
  part.add(section_vmdescription);
  part.add(static_cast<uint32_t>(description.size()));
  part.add_text(description);
}

void add_ram_start(StreamPart &part, uint64_t ram_bytes) {
  part.add(section_start);
  part.add(ram_section_id);
  part.add_short_text("ram");
  part.add(uint32_t{0});  // instance
  part.add(ram_section_version);
  part.add(ram_bytes | ram_mem_size);
}

void add_ram_continuation(StreamPart &part, uint8_t type) {
  part.add(type);
  part.add(ram_section_id);
}

void add_ram_body_end(StreamPart &part) {
  part.add(ram_eos);
  part.add(section_footer);
  part.add(ram_section_id);
}

}  // namespace qvmstate::vmstate
