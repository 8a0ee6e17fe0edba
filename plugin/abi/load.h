// One load: RAM and device sections of a snapshot, into a host.
//
// Threads: one at a time; cancel() from any.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "plugin/abi/failure.h"
#include "plugin/abi/host_ram.h"
#include "plugin/abi/pace.h"
#include "plugin/abi/session.h"
#include "plugin/qvmstate.h"
#include "qcow2/snapshot_table.h"
#include "vmstate/snapshot_source.h"
#include "vmstate/stream_reader.h"

namespace qvmstate::abi {

class Load {
 public:
  static Outcome<std::unique_ptr<Load>> begin(Session &session,
                                              const qvmstate_load_options &options);

  /// Everything but `size`.
  qvmstate_load_info info() const;
  Outcome<qvmstate_block_info> block_info(uint64_t index) const;
  Outcome<void> add_ram(const qvmstate_ram_block &block);
  Outcome<void> read_ram();
  Outcome<void> read_sections(qvmstate_section_read_fn read, void *user);
  void cancel() { pace_.cancel(); }
  /// The load does not survive this.
  tl::unexpected<Failure> fail(Failure failure);

 private:
  Load(Session &session, const qvmstate_load_options &options, const qcow2::Snapshot &snapshot);
  Outcome<void> read_head(const qvmstate_load_options &options);
  std::optional<size_t> index_of(const std::string &block) const;
  bool is_mapped() const { return stream_.layout == vmstate::Layout::mapped_ram; }
  Result<void> read_legacy_ram();
  Result<void> read_mapped_ram();
  void fill(size_t block, uint64_t offset, uint64_t bytes, std::span<const std::byte> data) const;

  Session &session_;
  const qcow2::Snapshot &snapshot_;
  const bool skip_unknown_;
  const unsigned threads_;
  Pace pace_;
  std::optional<Failure> failure_;
  std::unique_ptr<vmstate::StreamSource> source_;
  vmstate::StreamSummary stream_;    // of a legacy one only the head, until its RAM was read
  std::vector<HostBlock> blocks_;    // those that were added
  std::vector<std::byte *> places_;  // for each block of the stream; null: not added
  bool ram_read_ = false;
};

}  // namespace qvmstate::abi
