// The legacy layout: one stream, one round behind the other.
#include <algorithm>
#include <deque>
#include <optional>
#include <utility>

#include "plugin/abi/state_writer.h"
#include "qcow2/io/buffer_pool.h"
#include "qcow2/io/stream_buffer.h"
#include "vmstate/legacy_writer.h"
#include "vmstate/state_checksum.h"

namespace qvmstate::abi {
namespace {

constexpr unsigned transfers_max = 8;
constexpr uint64_t record_head_bytes = 9;  // of a page; no zero page takes more
constexpr uint64_t sections_bytes_expected = 16 * mib;

class LegacyState : public StateWriter {
 public:
  static Result<std::unique_ptr<LegacyState>> begin(const StatePlan &plan) {
    std::unique_ptr<LegacyState> state(new LegacyState(plan));
    QV_ASSIGN(state->pool_, io::BufferPool::create());
    QV_ASSIGN(state->file_, plan.session.another_file(transfers_max));
    state->file_->backend().register_buffers(state->pool_->memory());
    state->out_.emplace(
        *state->file_, *state->pool_, plan.transaction.vmstate(), io::FlushHook(),
        [digest = &state->digest_](std::span<const std::byte> data) { digest->add(data); });
    QV_ASSIGN(state->writer_,
              vmstate::LegacyWriter::begin(*state->out_, plan.configuration, state->blocks_, {}));
    return state;
  }

  Result<void> write_ram(const vmstate::DirtyPages *dirty) override {
    QV_ASSIGN(const auto source, open_host_ram(plan_.blocks));
    QV_TRY(expect_bytes(*source, dirty));
    return writer_->put_pages(
        *source,
        [&](uint64_t ram_bytes) {
          release_up_to(ram_bytes);
          return plan_.hook(ram_bytes);
        },
        dirty);
  }

  Result<vmstate::StreamStats> finish(std::span<const vmstate::DeviceSection> sections) override {
    QV_ASSIGN(vmstate::StreamStats stats, writer_->finish(sections));
    stats.checksum = digest_.finish();
    if (plan_.release != nullptr) {
      release_landed();
    }
    return stats;
  }

  uint64_t written_bytes() const override { return file_->bytes_written(); }

 private:
  explicit LegacyState(const StatePlan &plan) : plan_(plan), blocks_(ram_blocks(plan.blocks)) {}

  /// Says how far the file has to be made longer.
  Result<void> expect_bytes(vmstate::RamSource &source, const vmstate::DirtyPages *dirty) {
    const uint64_t page_bytes = plan_.configuration.page_bytes;
    uint64_t bytes = out_->tell() + sections_bytes_expected;
    if (dirty == nullptr) {
      QV_ASSIGN(const uint64_t touched, touched_bytes(source));
      bytes += touched + vmstate::total_bytes(blocks_) / page_bytes * record_head_bytes;
    } else {
      for (size_t block = 0; block < blocks_.size(); ++block) {
        bytes += dirty->count(block, blocks_[block].used_bytes / page_bytes) *
                 (page_bytes + record_head_bytes);
      }
    }
    plan_.transaction.expect_stream_bytes(bytes);
    return {};
  }

  /// RAM up to here is in the stream; it lies in the file once the stream up to here does.
  void release_up_to(uint64_t ram_bytes) {
    if (plan_.release != nullptr) {
      marks_.push_back({out_->tell(), ram_bytes});
      release_landed();
    }
  }

  void release_landed() {
    const uint64_t landed = out_->landed();
    uint64_t ram_end = released_;
    while (!marks_.empty() && marks_.front().stream_bytes <= landed) {
      ram_end = marks_.front().ram_bytes;
      marks_.pop_front();
    }
    uint64_t block_begin = 0;
    for (size_t block = 0; block < blocks_.size(); ++block) {
      const uint64_t block_end = block_begin + blocks_[block].used_bytes;
      const uint64_t from = std::max(released_, block_begin);
      const uint64_t to = std::min(ram_end, block_end);
      if (from < to) {
        plan_.release->landed(block, from - block_begin, to - from);
      }
      block_begin = block_end;
    }
    released_ = ram_end;
  }

  struct Mark {
    uint64_t stream_bytes;
    uint64_t ram_bytes;  ///< of all blocks, one after the other
  };

  StatePlan plan_;
  std::vector<vmstate::RamBlock> blocks_;
  vmstate::StreamDigest digest_;
  std::optional<io::BufferPool> pool_;
  std::unique_ptr<io::File> file_;
  std::optional<io::StreamBuffer> out_;
  std::optional<vmstate::LegacyWriter> writer_;
  std::deque<Mark> marks_;
  uint64_t released_ = 0;
};

}  // namespace

Result<std::unique_ptr<StateWriter>> begin_legacy_state(const StatePlan &plan) {
  QV_ASSIGN(auto state, LegacyState::begin(plan));
  return std::unique_ptr<StateWriter>(std::move(state));
}

}  // namespace qvmstate::abi
