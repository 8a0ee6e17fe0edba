// The records of the RAM section: the list of blocks, and pages in all the ways that QEMU wrote
// them over the years.
//
// A page comes in one of the ways of page_coding.h. Later records supersede earlier ones.
// Source of the facts: QEMU migration/ram.c, docs/devel/migration.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "vmstate/page_coding.h"
#include "vmstate/stream_cursor.h"
#include "vmstate/stream_reader.h"

namespace qvmstate::vmstate {

class RamRecords {
 public:
  /// All of these outlive it.
  RamRecords(StreamSource &source, StreamCursor &cursor, StreamSummary &summary,
             const StreamHooks &hooks)
      : source_(source), cursor_(cursor), summary_(summary), hooks_(hooks) {}

  /// What was said about the target's pages, before the first one; otherwise it is found out.
  /// False: no size that a page can have, or another one than the pages had so far.
  bool set_page_bytes(uint64_t bytes);
  /// The stream was made with postcopy allowed: blocks of large host pages say so.
  void expect_host_page_bytes(uint64_t mask) { host_page_bytes_mask_ = mask; }
  /// Records up to the end mark of one section.
  Result<void> read_body();
  /// The stream has ended.
  Result<void> finish();

 private:
  Result<void> begin_pages();
  Result<void> refuse_flags(uint64_t flags) const;
  Result<void> read_block_list(uint64_t total_bytes);
  Result<void> read_host_page_bytes();
  Result<void> read_mapped_header(StreamBlock &block);
  Result<void> check_region(const std::string &what, uint64_t offset, uint64_t bytes,
                            uint64_t least) const;
  Result<void> read_mapped_pages();
  Result<void> report_mapped_run(size_t block, uint64_t offset, const MappedRun &run);
  Result<void> read_page(uint64_t flags, uint64_t offset);
  struct Encoded {
    PageCoding coding = PageCoding::plain;
    std::span<const std::byte> bytes = {};  ///< valid until the cursor moves on
  };
  Result<Encoded> take_encoded(uint64_t kind);
  Result<std::span<const std::byte>> decode(const Encoded &encoded, uint64_t offset);
  Result<void> find_page_bytes();
  struct Walk;
  Walk walk_records(std::span<const std::byte> ahead, uint64_t page_bytes) const;

  StreamSource &source_;
  StreamCursor &cursor_;
  StreamSummary &summary_;
  const StreamHooks &hooks_;
  std::unordered_map<std::string, size_t> block_by_idstr_;
  static constexpr size_t no_block = SIZE_MAX;
  size_t block_ = no_block;  ///< of the record before, for CONTINUE
  bool knows_page_bytes_ = false;
  bool pages_begun_ = false;
  uint64_t host_page_bytes_mask_ = 0;
  std::vector<std::byte> piece_;  ///< pages that do not stand in the stream as they are
};

}  // namespace qvmstate::vmstate
