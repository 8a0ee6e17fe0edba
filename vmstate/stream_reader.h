// Reads a stream of either layout: what `info` shows, and every RAM page for those who want it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "qcow2/io/offsets.h"
#include "qcow2/io/result.h"
#include "vmstate/mapped_block.h"
#include "vmstate/page_coding.h"
#include "vmstate/stream_source.h"

namespace qvmstate::vmstate {

/// Where the pages are: `legacy`, each in a record of its own; `mapped_ram`, each at its own place.
enum class Layout : uint8_t { legacy, mapped_ram };
/// "legacy" or "mapped-ram".
const char *layout_name(Layout layout);

struct StreamBlock {
  std::string idstr;
  uint64_t used_bytes = 0;
  std::optional<MappedBlock> mapped = {};  ///< in the layout mapped_ram
  /// In its memory region, which for main memory begins at 0; said with x-ignore-shared only.
  std::optional<uint64_t> address = {};
  uint64_t page_records = 0;  ///< mapped_ram: pages that are stored
};

struct StreamSection {
  std::string idstr;
  uint32_t instance = 0;
  uint32_t version = 0;
  uint64_t offset = 0;  ///< of the body, in the source
  uint64_t bytes = 0;   ///< of the body
};

struct StreamSummary {
  Layout layout = Layout::legacy;
  std::string machine_type;
  std::optional<uint32_t> target_page_bits;
  std::vector<std::string> capabilities;
  uint64_t page_bytes = 4096;
  std::vector<StreamBlock> blocks;
  uint64_t data_pages = 0;  ///< of the layout mapped_ram: pages that are stored
  uint64_t zero_pages = 0;
  uint64_t compressed_pages = 0;  ///< of the data pages
  uint64_t xbzrle_pages = 0;      ///< of the data pages
  std::vector<StreamSection> devices;
  std::string vmdescription;  ///< JSON, empty if the stream has none
  uint64_t stream_bytes = 0;  ///< exact: from the start to the end of the vmdescription
};

/// Called for each page record in stream order (a later one of the same page supersedes); in the
/// layout mapped_ram for each page of each block in order, once. `data` is empty for a zero page,
/// and otherwise valid during the call.
using PageHook = std::function<Result<void>(size_t block, uint64_t offset, uint64_t page_bytes,
                                            std::span<const std::byte> data)>;

/// Called once, as soon as the RAM blocks and the size of pages are known, and before any page:
/// with what was read so far. In a legacy stream that is where the first page comes.
using BlocksHook = std::function<Result<void>(const StreamSummary &so_far)>;

/// Asks what a page holds by the records so far; `to` is as long as the page and full of zeros.
using PageNowHook =
    std::function<Result<void>(size_t block, uint64_t offset, std::span<std::byte> to)>;

/// What a record of a legacy stream says of a page, and where.
struct PagePlace {
  StreamOffset offset;
  uint32_t bytes = 0;
  PageCoding coding = PageCoding::plain;
};
/// Called for each page of a legacy stream, before the page hook.
using PlaceHook = std::function<void(const PagePlace &place)>;

/// Each may be empty. A page that comes as a difference (XBZRLE) is refused where `page` is there
/// and `page_now` is not.
struct StreamHooks {
  PageHook page = {};
  BlocksHook blocks = {};
  PageNowHook page_now = {};
  PlaceHook place = {};
};

/// Walks the stream that begins at `start` of the source to its end; an error of a hook ends it
/// early. Sections come in any order, with or without configuration and footers. Refuses by name
/// what it does not decode (iterative sections of devices, RDMA, multifd over a network).
Result<StreamSummary> read_stream(StreamSource &source, StreamOffset start,
                                  const StreamHooks &hooks);
Result<StreamSummary> read_stream(StreamSource &source, const PageHook &hook = {},
                                  StreamOffset start = {}, const BlocksHook &blocks_hook = {});

/// Whether every page stands in the stream as it is: every QEMU loads those, whatever its
/// capabilities; compressed ones none from 9.1 on.
bool has_plain_pages(const StreamSummary &stream);

/// Refuses a legacy stream whose blocks have more pages than fit as records into so many bytes: a
/// damaged size would ask for any amount of memory. To ask when the blocks are known.
Result<void> check_room_for_pages(const StreamSummary &stream, uint64_t stream_bytes_max);

/// Whether the stream leaves out a block (x-ignore-shared): its memory is somewhere else. To ask
/// when the stream was read to its end.
bool is_left_out(const StreamSummary &stream, size_t block);

}  // namespace qvmstate::vmstate
