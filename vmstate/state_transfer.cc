#include "vmstate/state_transfer.h"

#include <algorithm>
#include <utility>

#include "qcow2/io/buffer_pool.h"
#include "qcow2/io/stream_buffer.h"
#include "vmstate/legacy_writer.h"
#include "vmstate/mapped_ram_writer.h"

namespace qvmstate::vmstate {
namespace {

/// A stream to a target in order, hashed if that is wanted.
class SequentialTarget {
 public:
  SequentialTarget(const TransferTarget &target, io::BufferPool pool, const TransferHook &hook)
      : wants_checksum_(target.checksum),
        pool_(std::move(pool)),
        buffer_(
            *target.file, pool_, *target.sequential, [&hook](uint64_t) { return hook(); },
            [this](std::span<const std::byte> data) {
              if (wants_checksum_) {
                digest_.add(data);
              }
            }) {}
  io::StreamBuffer &buffer() { return buffer_; }
  void put_checksum(StreamStats &stats) {
    if (wants_checksum_) {
      stats.checksum = digest_.finish();
    }
  }

 private:
  const bool wants_checksum_;
  StreamDigest digest_;
  io::BufferPool pool_;
  io::StreamBuffer buffer_;
};

Result<StreamStats> write_mapped(const StoredState &state, RamSource &ram,
                                 const TransferTarget &target, const TransferHook &hook) {
  MappedWriteOptions options;
  options.start_bytes = target.start_bytes;
  options.all_pages_present = target.all_pages_present;
  options.checksum = target.checksum;
  const LoadOrder order = qemu_load_order(state.devices());
  QV_ASSIGN(auto writer,
            MappedRamWriter::plan(state.configuration(), ram.blocks(), order.before_ram, options));
  QV_ASSIGN(io::BufferPool pool,
            io::BufferPool::create(io::buffer_count_default,
                                   MappedRamWriter::chunk_bytes(*target.fixed)));
  const RamChannel channel = {target.file, &ram, &pool};
  QV_TRY(
      writer.write_pages({&channel, 1}, *target.fixed, [&](uint64_t, uint64_t) { return hook(); }));
  return writer.finish(*target.file, *target.fixed, order.after_ram);
}

}  // namespace

Result<StreamStats> write_state_anew(const StoredState &state, Layout layout,
                                     const TransferTarget &target, const TransferHook &hook) {
  if (state.summary().machine_type.empty()) {
    return fail(
        ErrorCode::not_supported,
        "vmstate stream: has no configuration section (machine types up to 2.3), and cannot "
        "be written anew; let QEMU load it and save it anew");
  }
  QV_ASSIGN(const auto ram, state.ram());
  if (layout == Layout::mapped_ram) {
    return write_mapped(state, *ram, target, hook);
  }
  QV_ASSIGN(io::BufferPool pool, io::BufferPool::create());
  SequentialTarget out(target, std::move(pool), hook);
  QV_ASSIGN(StreamStats stats, write_legacy_stream(out.buffer(), state.configuration(), *ram,
                                                   qemu_load_order(state.devices()),
                                                   [&](uint64_t) { return hook(); }));
  out.put_checksum(stats);
  return stats;
}

bool can_be_copied(const StreamSummary &stream, Layout layout) {
  return layout == Layout::legacy && stream.layout == layout && has_plain_pages(stream);
}

Result<StreamStats> copy_stream(StreamSource &source, StreamOffset start, uint64_t bytes,
                                const TransferTarget &target, const TransferHook &hook) {
  QV_ASSIGN(io::BufferPool pool, io::BufferPool::create());
  SequentialTarget out(target, std::move(pool), hook);
  StreamStats stats;
  while (stats.stream_bytes < bytes) {
    QV_ASSIGN(std::span<std::byte> room, out.buffer().space());
    room = room.first(std::min<uint64_t>(room.size(), bytes - stats.stream_bytes));
    QV_TRY(source.read(start + stats.stream_bytes, room));
    QV_TRY(out.buffer().advance(room.size()));
    stats.stream_bytes += room.size();
  }
  QV_TRY(out.buffer().finish());
  out.put_checksum(stats);
  return stats;
}

}  // namespace qvmstate::vmstate
