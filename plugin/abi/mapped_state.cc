// The mapped-ram layout: written by several channels, in rounds one over the other.
#include <optional>
#include <utility>

#include "plugin/abi/state_writer.h"
#include "qcow2/io/buffer_pool.h"
#include "vmstate/mapped_ram_writer.h"

namespace qvmstate::abi {
namespace {

constexpr unsigned transfers_max = 32;  // of each channel: zero pages between others split writes

class MappedState : public StateWriter {
 public:
  static Result<std::unique_ptr<MappedState>> begin(const StatePlan &plan) {
    std::unique_ptr<MappedState> state(new MappedState(plan));
    vmstate::MappedWriteOptions options;
    options.all_pages_present = true;
    options.depth = transfers_max;
    options.ram_changes = plan.live;
    options.checksum = !plan.live;
    if (plan.release != nullptr) {
      options.on_landed = [release = plan.release](size_t block, uint64_t offset, uint64_t bytes) {
        release->landed(block, offset, bytes);
      };
    }
    QV_ASSIGN(state->writer_, vmstate::MappedRamWriter::plan(plan.configuration,
                                                             ram_blocks(plan.blocks), {}, options));
    for (unsigned i = 0; i < plan.channels; ++i) {
      QV_ASSIGN(io::BufferPool pool,
                io::BufferPool::create(io::buffer_count_min,
                                       vmstate::MappedRamWriter::chunk_bytes(state->area())));
      QV_ASSIGN(auto file, plan.session.another_file(transfers_max));
      file->backend().register_buffers(pool.memory());
      state->pools_.push_back(std::move(pool));
      state->files_.push_back(std::move(file));
    }
    return state;
  }

  Result<void> write_ram(const vmstate::DirtyPages *dirty) override {
    std::vector<std::unique_ptr<vmstate::RamSource>> sources;
    std::vector<vmstate::RamChannel> channels;
    for (size_t i = 0; i < files_.size(); ++i) {
      QV_ASSIGN(auto source, open_host_ram(plan_.blocks));
      sources.push_back(std::move(source));
      channels.push_back({files_[i].get(), sources.back().get(), &pools_[i]});
    }
    if (dirty == nullptr) {
      QV_ASSIGN(const uint64_t bytes, touched_bytes(*sources.front()));
      area().expect_fixed_bytes(bytes);
    }
    return writer_->write_pages(
        channels, area(), [&](uint64_t ram_bytes, uint64_t) { return plan_.hook(ram_bytes); },
        dirty);
  }

  Result<vmstate::StreamStats> finish(std::span<const vmstate::DeviceSection> sections) override {
    QV_ASSIGN(const vmstate::StreamStats stats,
              writer_->finish(plan_.session.file(), area(), sections));
    QV_TRY(area().finish_fixed(stats.stream_bytes));
    return stats;
  }

  uint64_t written_bytes() const override {
    uint64_t bytes = 0;
    for (const auto &file : files_) {
      bytes += file->bytes_written();
    }
    return bytes;
  }

 private:
  explicit MappedState(const StatePlan &plan) : plan_(plan) {}

  qcow2::VmstateArea &area() { return plan_.transaction.vmstate(); }

  StatePlan plan_;
  std::optional<vmstate::MappedRamWriter> writer_;
  std::vector<io::BufferPool> pools_;  // before the files, which have registered their memory
  std::vector<std::unique_ptr<io::File>> files_;
};

}  // namespace

Result<std::unique_ptr<StateWriter>> begin_mapped_state(const StatePlan &plan) {
  QV_ASSIGN(auto state, MappedState::begin(plan));
  return std::unique_ptr<StateWriter>(std::move(state));
}

}  // namespace qvmstate::abi
