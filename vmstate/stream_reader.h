// Reads a legacy stream: what `info` shows, and every RAM page for those who want it.
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

namespace qvmstate::vmstate {

/// Bytes of a stream by offset; `to` may reach past the stream's end, where bytes are arbitrary
/// (a vmstate area has no exact end), but not past what can be read at all: then an error.
class StreamSource {
 public:
  virtual ~StreamSource() = default;
  virtual Result<void> read(StreamOffset offset, std::span<std::byte> to) = 0;
  /// The stream certainly ends at or before this; every byte before it can be read.
  virtual uint64_t bytes_max() const = 0;
};

struct StreamBlock {
  std::string idstr;
  uint64_t used_bytes = 0;
};

struct StreamSection {
  std::string idstr;
  uint32_t instance = 0;
  uint32_t version = 0;
  uint64_t offset = 0;  ///< of the body
  uint64_t bytes = 0;   ///< of the body
};

struct StreamSummary {
  std::string machine_type;
  std::optional<uint32_t> target_page_bits;
  std::vector<std::string> capabilities;
  uint64_t page_bytes = 4096;
  std::vector<StreamBlock> blocks;
  uint64_t data_pages = 0;
  uint64_t zero_pages = 0;
  std::vector<StreamSection> devices;
  std::string vmdescription;  ///< JSON, empty if the stream has none
  uint64_t stream_bytes = 0;  ///< exact: to the end of the vmdescription
};

/// Called for each page record in stream order (a later one of the same page supersedes);
/// `data` is empty for a zero page.
using PageHook = std::function<Result<void>(size_t block, uint64_t offset, uint64_t page_bytes,
                                            std::span<const std::byte> data)>;

/// Walks the stream to its end. Refuses by name what it does not decode (XBZRLE, compressed pages,
/// mapped-ram, postcopy, multifd).
Result<StreamSummary> read_stream(StreamSource &source, const PageHook &hook = {});

}  // namespace qvmstate::vmstate
