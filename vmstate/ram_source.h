// Where guest RAM comes from: the memory of this process (plugin) or of another one (attach).
//
// Addresses inside a block are byte offsets from its start. While a source is used its RAM does not
// change: the VM is stopped, or the source keeps what it was. Threads: one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "qcow2/io/result.h"

namespace qvmstate::vmstate {

/// A RAMBlock that migrates. Blocks without a name do not, and are left out by whoever fills these.
struct RamBlock {
  std::string idstr;           ///< 1 to 255 bytes
  uint64_t used_bytes = 0;     ///< used length: what the stream announces; a multiple of 4096
  uint64_t page_bytes = 4096;  ///< host page size of the block's memory
  bool operator==(const RamBlock &) const = default;
};

/// A part of a block, in whole pages.
struct RamRange {
  size_t block = 0;
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

/// In which order a source wants to be read.
class RamOrder {
 public:
  virtual ~RamOrder() = default;
  /// What to read next, all pages once in the end; what was given before has been read. nullopt:
  /// that was all.
  virtual Result<std::optional<RamRange>> next() = 0;
};

class RamSource {
 public:
  virtual ~RamSource() = default;

  /// In the emulator's own order; constant while the source lives.
  virtual std::span<const RamBlock> blocks() const = 0;

  /// The block's memory, if this process can address it; else nullptr. Reading untouched pages
  /// through it would fault them in: ask presence() first.
  virtual const std::byte *view(size_t block) const = 0;

  struct Presence {
    bool touched = true;  ///< false: reads as zeros, and must not be read
    uint64_t bytes = 0;   ///< how far from `offset` that holds; > 0, a multiple of 4096
  };
  virtual Result<Presence> presence(size_t block, uint64_t offset) = 0;

  /// Copies `count` pages of `page_bytes` from `offset` on; page i goes to to + i * stride.
  virtual Result<void> read_pages(size_t block, uint64_t offset, size_t count, size_t page_bytes,
                                  std::byte *to, size_t stride) = 0;

  /// nullptr: any order will do.
  virtual RamOrder *order() { return nullptr; }
};

}  // namespace qvmstate::vmstate
