#include "plugin/qemu/inprocess_source.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "plugin/qemu/attach_source.h"

namespace qvmstate::qemu {

Result<std::unique_ptr<InProcessSource>> InProcessSource::open(std::vector<HostRamBlock> blocks) {
  QV_ASSIGN(MemoryMap map, MemoryMap::read(::getpid(), blocks));
  std::unique_ptr<InProcessSource> source(new InProcessSource(std::move(map)));
  for (HostRamBlock &block : blocks) {
    // NOLINTNEXTLINE(performance-no-int-to-ptr): it came as a number, as for the attached source
    source->addresses_.push_back(reinterpret_cast<const std::byte *>(*block.address));
    source->blocks_.push_back(std::move(block.block));
  }
  return source;
}

const std::byte *InProcessSource::view(size_t block) const {
  return map_.has_shared_huge_pages(block) ? nullptr : addresses_[block];
}

Result<void> InProcessSource::read_pages(size_t block, uint64_t offset, size_t count,
                                         size_t page_bytes, std::byte *to, size_t stride) {
  while (count > 0) {
    const Segment &segment = map_.segment_at(block, offset);
    const size_t pages =
        std::min<uint64_t>(count, std::max<uint64_t>(1, (segment.end - offset) / page_bytes));
    if (segment.kind == MemoryKind::shared_huge && segment.file >= 0) {
      QV_TRY(read_pages_of_file(map_.descriptor(segment),
                                segment.file_offset + (offset - segment.start), pages, page_bytes,
                                to, stride, blocks_[block].idstr));
    } else {
      for (size_t i = 0; i < pages; ++i) {
        std::memcpy(to + i * stride, addresses_[block] + offset + i * page_bytes, page_bytes);
      }
    }
    offset += pages * page_bytes;
    to += pages * stride;
    count -= pages;
  }
  return {};
}

}  // namespace qvmstate::qemu
