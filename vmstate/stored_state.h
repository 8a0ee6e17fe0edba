// A VM state that is stored in a stream of either layout, as the writers take one: RAM that can be
// read anywhere, and the device sections.
//
// Of a legacy stream it takes one pass to know where each page is: 8 bytes a page are kept, and 24
// more for each record that does not hold its page as it is. Of a mapped-ram stream nothing but its
// bitmaps is read ahead of need.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "qcow2/io/result.h"
#include "vmstate/device_sections.h"
#include "vmstate/mapped_ram_reader.h"
#include "vmstate/ram_source.h"
#include "vmstate/stream_parts.h"
#include "vmstate/stream_reader.h"

namespace qvmstate::vmstate {

/// Threads: any, once it is open.
class StoredState {
 public:
  /// Refuses streams that do not tell every page of RAM.
  static Result<std::unique_ptr<StoredState>> open(SourceOpener open_source,
                                                   StreamOffset start = {});

  const StreamSummary &summary() const { return summary_; }
  std::span<const RamBlock> blocks() const { return blocks_; }
  /// For a writer of the same state.
  StreamConfiguration configuration() const;
  std::span<const DeviceSection> devices() const { return devices_; }
  /// For one thread; this must outlive it.
  Result<std::unique_ptr<RamSource>> ram() const;

 private:
  class Ram;
  static constexpr uint64_t page_is_zero = 0;  // no page lies at the start of a stream
  static constexpr uint64_t page_is_missing = UINT64_MAX;
  static constexpr uint64_t page_is_encoded = uint64_t{1} << 63;  // the rest is an index

  /// A record that does not hold its page as it is.
  struct EncodedPage {
    uint64_t place;
    uint64_t before;  ///< what pages_ said when it came: a difference needs it
    uint32_t bytes;
    PageCoding coding;
  };

  StoredState() = default;
  Result<void> read_all(StreamSource &source, StreamOffset start);
  Result<void> begin_blocks(const StreamSummary &so_far, uint64_t stream_bytes_max);
  Result<void> note_page(uint64_t &page, const PagePlace &place);
  Result<void> check_all_pages() const;
  Result<void> read_devices(StreamSource &source);

  SourceOpener open_source_;
  StreamSummary summary_;
  std::vector<RamBlock> blocks_;
  /// Of a legacy stream: where in it each page of each block is.
  std::vector<std::vector<uint64_t>> pages_;
  std::vector<EncodedPage> encoded_;
  std::vector<std::vector<std::byte>> device_bytes_;
  std::vector<DeviceSection> devices_;
};

}  // namespace qvmstate::vmstate
