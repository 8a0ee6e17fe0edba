// The parts of a stream that both layouts share: all but the RAM pages.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "qcow2/io/endian.h"
#include "qcow2/io/offsets.h"
#include "qcow2/io/result.h"
#include "vmstate/device_sections.h"
#include "vmstate/ram_source.h"
#include "vmstate/state_checksum.h"

namespace qvmstate::vmstate {

constexpr uint64_t page_bytes_max = 64 * kib;  ///< of QEMU's targets

struct StreamConfiguration {
  std::string machine_type;                  ///< resolved, for example "pc-i440fx-7.2"
  std::optional<uint32_t> target_page_bits;  ///< written where the loader demands it (arm virt)
  uint64_t page_bytes = 4096;                ///< target page size
  std::string vmdescription = {};            ///< of these sections, kept; empty: one is made
};

struct StreamStats {
  uint64_t stream_bytes = 0;
  uint64_t ram_bytes = 0;  ///< of all blocks
  uint64_t data_pages = 0;
  uint64_t zero_pages = 0;                     ///< read and found zero
  uint64_t untouched_pages = 0;                ///< not read at all
  uint64_t copied_bytes = 0;                   ///< RAM bytes copied by this process
  uint64_t written_groups = 0;                 ///< of the layout stream-aligned
  uint64_t shared_groups = 0;                  ///< the same, that stand in the base already
  uint64_t read_groups = 0;                    ///< whose pages were read
  uint64_t known_groups = 0;                   ///< that were not, as it was known what they are
  std::optional<StateChecksum> checksum = {};  ///< if it was wanted
};

/// Called now and then with the RAM bytes dealt with so far; an error (cancelled) stops the writer.
using RamHook = std::function<Result<void>(uint64_t ram_bytes_done)>;

/// Small pieces of a stream, gathered before they are written.
class StreamPart {
 public:
  template <std::unsigned_integral T>
  void add(T value) {
    bytes_.resize(bytes_.size() + sizeof value);
    store_be<T>(bytes_.data() + bytes_.size() - sizeof value, value);
  }
  void add_text(std::string_view text) { add_bytes(std::as_bytes(std::span(text))); }
  void add_short_text(std::string_view text) {
    add(static_cast<uint8_t>(text.size()));
    add_text(text);
  }
  void add_bytes(std::span<const std::byte> bytes) {
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
  }
  std::span<const std::byte> span() const { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
};

/// Refuses what no stream can say.
Result<void> check_stream_arguments(const StreamConfiguration &configuration,
                                    std::span<const RamBlock> blocks);

uint64_t total_bytes(std::span<const RamBlock> blocks);

/// Device sections by when they are loaded.
struct LoadOrder {
  std::vector<DeviceSection> before_ram;
  std::vector<DeviceSection> after_ram;
};
/// As QEMU wants them: virtio-mem's early section before RAM, because it says which parts of the
/// device's RAM are plugged; all others after it.
LoadOrder qemu_load_order(std::span<const DeviceSection> devices);

/// File header, configuration section with these capabilities, and device sections.
void add_stream_head(StreamPart &part, const StreamConfiguration &configuration,
                     std::span<const std::string_view> capabilities,
                     std::span<const DeviceSection> before_ram);
/// Device sections, end mark, and the vmdescription of all of them.
void add_stream_tail(StreamPart &part, const StreamConfiguration &configuration,
                     const LoadOrder &devices);

/// "ram" START up to the block list, which follows.
void add_ram_start(StreamPart &part, uint64_t ram_bytes);
void add_ram_continuation(StreamPart &part, uint8_t type);
void add_ram_body_end(StreamPart &part);

}  // namespace qvmstate::vmstate
