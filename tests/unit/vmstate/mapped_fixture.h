// Mapped-ram streams for tests, put together here from the description of the format.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "stream_fixture.h"

namespace qvmstate::vmstate::test {

constexpr uint8_t stale_fill = 0xdb;  ///< under clear bits: must never be seen

struct MappedPart {
  std::string idstr;
  std::vector<uint8_t> fill;  ///< of each page; 0: its bit is clear
};

/// Everything that a test may want to be otherwise.
struct MappedStream {
  std::vector<MappedPart> blocks;
  uint64_t page_bytes = 4096;
  uint64_t start = 0;            ///< where in the file the stream begins
  uint64_t alignment = 1 << 20;  ///< of the pages regions
  bool all_bits = false;         ///< zero pages are stored as pages of zeros

  // Where things went.
  struct Place {
    uint64_t header = 0;
    uint64_t bitmap = 0;
    uint64_t pages = 0;
  };
  std::vector<Place> places = {};
  uint64_t ram_end = 0;

  Blob build() {
    places.clear();
    Bytes head;
    head.fill(start, 0xaa).text("QEVM").u32(3).u8(0x07).u32(2).text("pc");
    if (page_bytes != 4096) {
      head.u8(5).u8(30).text("configuration/target-page-bits").u32(1);
      head.u32(static_cast<uint32_t>(std::countr_zero(page_bytes)));
    }
    head.u8(5).u8(26).text("configuration/capabilities").u32(1).u32(1).u8(10).text("mapped-ram");
    uint64_t total = 0;
    for (const MappedPart &block : blocks) {
      total += block.fill.size() * page_bytes;
    }
    head.u8(0x01).u32(2).u8(3).text("ram").u32(0).u32(4).u64(total | 0x4);
    Blob file = head.done();
    for (const MappedPart &block : blocks) {
      add_block(file, block);
    }
    ram_end = file.size();
    Bytes tail;
    tail.u64(0x10).u8(0x7e).u32(2);                  // end of START
    tail.u8(0x02).u32(2).u64(0x10).u8(0x7e).u32(2);  // a round without anything
    tail.u8(0x03).u32(2).u64(0x10).u8(0x7e).u32(2);  // END
    add_section(tail, 5, "cpu", 1, 12, Bytes().text("~registers").done());
    tail.u8(0x00).u8(0x06).u32(2).text("{}");
    file.insert(file.end(), tail.done().begin(), tail.done().end());
    return file;
  }

  Blob expected(size_t block) const {
    Blob memory;
    for (const uint8_t fill : blocks[block].fill) {
      memory.insert(memory.end(), page_bytes, std::byte{fill});
    }
    return memory;
  }

 private:
  void add_block(Blob &file, const MappedPart &block) {
    const uint64_t used = block.fill.size() * page_bytes;
    Place place;
    place.header = file.size() + 1 + block.idstr.size() + 8;
    place.bitmap = place.header + 28;
    const uint64_t bitmap_bytes = (block.fill.size() + 63) / 64 * 8;
    place.pages = (place.bitmap + bitmap_bytes + alignment - 1) / alignment * alignment;
    const Bytes entry = Bytes()
                            .u8(static_cast<uint8_t>(block.idstr.size()))
                            .text(block.idstr)
                            .u64(used)
                            .u32(1)
                            .u64(page_bytes)
                            .u64(place.bitmap)
                            .u64(place.pages);
    file.insert(file.end(), entry.done().begin(), entry.done().end());
    file.resize(place.bitmap + bitmap_bytes);
    file.resize(place.pages + used, std::byte{stale_fill});
    for (size_t i = 0; i < block.fill.size(); ++i) {
      if (block.fill[i] != 0 || all_bits) {
        file[place.bitmap + i / 8] |= static_cast<std::byte>(1U << i % 8);
        std::memset(&file[place.pages + i * page_bytes], block.fill[i], page_bytes);
      }
    }
    places.push_back(place);
  }
};

/// Pages with data where i % every == 0, each filled otherwise.
inline std::vector<uint8_t> page_fills(size_t pages, size_t every = 2) {
  std::vector<uint8_t> fill(pages);
  for (size_t i = 0; i < pages; ++i) {
    fill[i] = i % every == 0 ? static_cast<uint8_t>(i % 200 + 1) : 0;
  }
  return fill;
}

}  // namespace qvmstate::vmstate::test
