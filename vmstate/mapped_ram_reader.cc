#include "vmstate/mapped_ram_reader.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "qcow2/io/file.h"

namespace qvmstate::vmstate {

namespace {

// Over all channels; but each has two at least, to read one while the other is looked at.
constexpr size_t buffers_total = 64;
static_assert(buffers_total * 2 * io::buffer_bytes_default <= 128 * mib);
constexpr size_t buffers_per_channel_max = io::buffer_count_default;

/// Bytes of a block that one channel takes.
struct Portion {
  size_t block;
  uint64_t offset;
  uint64_t bytes;
};

/// Hands out portions, block after block.
///
/// Threads: any.
class Portions {
 public:
  Portions(const StreamSummary &summary, std::optional<size_t> only) {
    for (size_t i = 0; i < summary.blocks.size(); ++i) {
      if (!only || *only == i) {
        total_ += divide_up(summary.blocks[i].used_bytes, mapped_portion_bytes);
        blocks_.push_back({i, summary.blocks[i].used_bytes, total_});
      }
    }
  }
  std::optional<Portion> take() {
    const uint64_t number = next_.fetch_add(1);
    if (number >= total_) {
      return std::nullopt;
    }
    const auto block = std::ranges::upper_bound(blocks_, number, {}, &Block::portions_end);
    const uint64_t portions = divide_up(block->used_bytes, mapped_portion_bytes);
    const uint64_t offset = (number - (block->portions_end - portions)) * mapped_portion_bytes;
    return Portion{block->index, offset,
                   std::min(mapped_portion_bytes, block->used_bytes - offset)};
  }

 private:
  struct Block {
    size_t index;
    uint64_t used_bytes;
    uint64_t portions_end;  ///< of this block and those before
  };
  std::vector<Block> blocks_;
  uint64_t total_ = 0;
  std::atomic<uint64_t> next_ = 0;
};

/// Whether to go on, for all channels.
///
/// Threads: any.
class Stop {
 public:
  explicit Stop(const std::atomic<bool> *cancelled) : cancelled_(cancelled) {}
  void fail(Error error) {
    const std::lock_guard lock(mutex_);
    if (!error_) {
      error_ = std::move(error);
    }
    stopped_ = true;
  }
  /// Another channel failed.
  bool stopped() const { return stopped_; }
  bool cancelled() const { return cancelled_ != nullptr && *cancelled_; }
  Result<void> result() {
    const std::lock_guard lock(mutex_);
    return error_ ? Result<void>(tl::unexpected(*error_)) : Result<void>();
  }

 private:
  const std::atomic<bool> *cancelled_;
  std::atomic<bool> stopped_ = false;
  std::mutex mutex_;
  std::optional<Error> error_;
};

class Channel {
 public:
  static Result<std::unique_ptr<Channel>> create(size_t number, unsigned channels,
                                                 const StreamSummary &summary,
                                                 std::unique_ptr<StreamSource> source,
                                                 const ChunkHook &hook) {
    const size_t buffers =
        std::clamp(buffers_total / channels, io::buffer_count_min, buffers_per_channel_max);
    QV_ASSIGN(io::BufferPool pool, io::BufferPool::create(buffers, mapped_chunk_bytes));
    auto channel = std::unique_ptr<Channel>(
        new Channel(number, summary, std::move(pool), std::move(source), hook));
    if (channel->file_ != nullptr) {
      channel->file_->backend().register_buffers(channel->pool_.memory());
    }
    return channel;
  }

  /// To the end of the portions, or until something stops it. Nothing is in flight afterwards.
  Result<void> run(Portions &portions, const Stop &stop) {
    auto done = read_all(portions, stop);
    if (!done && file_ != nullptr) {
      // The buffers must not be freed under transfers; the error that counts is `done`.
      (void)file_->drain();
    }
    return done;
  }

 private:
  /// What a buffer of the pool holds, by its index.
  struct Chunk {
    size_t block;
    uint64_t offset;
  };

  Channel(size_t number, const StreamSummary &summary, io::BufferPool pool,
          std::unique_ptr<StreamSource> source, const ChunkHook &hook)
      : number_(number),
        summary_(summary),
        pool_(std::move(pool)),
        source_(std::move(source)),
        file_(source_->file()),
        hook_(hook),
        chunks_(pool_.count()) {}

  Result<void> read_all(Portions &portions, const Stop &stop) {
    std::optional<MappedBlockMap> map;
    std::optional<size_t> map_block;
    while (const std::optional<Portion> portion = portions.take()) {
      if (map_block != portion->block) {
        const StreamBlock &block = summary_.blocks[portion->block];
        map.emplace(*source_, *block.mapped, block.used_bytes);
        map_block = portion->block;
      }
      QV_TRY(read_portion(*map, *portion, stop));
      if (stop.stopped()) {
        break;
      }
    }
    while (file_ != nullptr && file_->pending() > 0) {
      QV_TRY(land_one());
    }
    return {};
  }

  Result<void> read_portion(MappedBlockMap &map, const Portion &portion, const Stop &stop) {
    const uint64_t end = portion.offset + portion.bytes;
    for (uint64_t offset = portion.offset; offset < end;) {
      QV_ASSIGN(const MappedRun run, map.run_at(offset, end - offset));
      for (const uint64_t run_end = offset + run.bytes; offset < run_end;) {
        if (stop.stopped()) {
          return {};
        }
        if (stop.cancelled()) {
          return fail(ErrorCode::cancelled, "reading RAM: cancelled");
        }
        const uint64_t left = run_end - offset;
        const uint64_t bytes = run.has_data ? std::min(left, mapped_chunk_bytes) : left;
        QV_TRY(run.has_data ? read_chunk({portion.block, offset}, bytes)
                            : hook_(number_, portion.block, offset, {}, bytes));
        offset += bytes;
      }
    }
    return {};
  }

  /// Starts what can be read asynchronously and reads the rest. Delivers the chunk if nothing is
  /// left to wait for.
  Result<void> read_chunk(const Chunk &chunk, uint64_t bytes) {
    QV_ASSIGN(io::Buffer *const buffer, free_buffer());
    chunks_[buffer->index] = chunk;
    buffer->used = bytes;
    const StreamOffset start = summary_.blocks[chunk.block].mapped->pages_offset + chunk.offset;
    // First the map: the number of transfers must be known before the first of them can land.
    runs_.clear();
    unsigned in_file = 0;
    for (uint64_t at = 0; at < bytes; at += runs_.back().bytes) {
      QV_ASSIGN(const StreamRun run, source_->run_at(start + at, bytes - at));
      runs_.push_back(run);
      in_file += run.kind == StreamRun::Kind::in_file ? 1 : 0;
    }
    if (in_file > 0) {
      pool_.send_off(*buffer, in_file);
    }
    uint64_t at = 0;
    for (const StreamRun &run : runs_) {
      const std::span<std::byte> part(buffer->data + at, run.bytes);
      switch (run.kind) {
        case StreamRun::Kind::zeros:
          std::memset(part.data(), 0, part.size());
          break;
        case StreamRun::Kind::in_file:
          QV_TRY(file_->start_read(part, run.host, buffer->index, buffer->index));
          break;
        case StreamRun::Kind::other:
          QV_TRY(source_->read(start + at, part));
          break;
      }
      at += run.bytes;
    }
    if (in_file > 0) {
      return {};
    }
    auto delivered = deliver(*buffer);
    pool_.give_back(*buffer);
    return delivered;
  }

  Result<io::Buffer *> free_buffer() {
    io::Buffer *buffer = pool_.take();
    while (buffer == nullptr) {
      QV_TRY(land_one());
      buffer = pool_.take();
    }
    return buffer;
  }

  /// Waits for one transfer, and delivers its chunk if that was the last of it.
  Result<void> land_one() {
    QV_ASSIGN(const uint64_t cookie, file_->wait_any());
    io::Buffer &buffer = pool_.at(static_cast<unsigned>(cookie));
    if (buffer.parts_in_flight == 1) {
      QV_TRY(deliver(buffer));
    }
    pool_.part_landed(buffer);
    return {};
  }

  Result<void> deliver(const io::Buffer &buffer) {
    const Chunk &chunk = chunks_[buffer.index];
    return hook_(number_, chunk.block, chunk.offset, {buffer.data, buffer.used}, buffer.used);
  }

  size_t number_;
  const StreamSummary &summary_;
  io::BufferPool pool_;  // before the source: its file may have registered the memory
  std::unique_ptr<StreamSource> source_;
  io::File *file_;
  const ChunkHook &hook_;
  std::vector<Chunk> chunks_;
  std::vector<StreamRun> runs_;
};

void run_channel(Channel &channel, Portions &portions, Stop &stop) {
  if (auto done = channel.run(portions, stop); !done) {
    stop.fail(std::move(done).error());
  }
}

}  // namespace

Result<void> read_mapped_ram(const StreamSummary &summary, const SourceOpener &open_source,
                             const ChunkHook &hook, const MappedRamOptions &options) {
  assert(summary.layout == Layout::mapped_ram);
  assert(!options.block || *options.block < summary.blocks.size());
  if (options.channels < 1 || options.channels > mapped_channels_max) {
    return fail(ErrorCode::bad_argument, "cannot read RAM in " + std::to_string(options.channels) +
                                             " channels: choose 1 to " +
                                             std::to_string(mapped_channels_max));
  }
  std::vector<std::unique_ptr<Channel>> channels;
  for (size_t i = 0; i < options.channels; ++i) {
    QV_ASSIGN(std::unique_ptr<StreamSource> source, open_source());
    QV_ASSIGN(auto channel, Channel::create(i, options.channels, summary, std::move(source), hook));
    channels.push_back(std::move(channel));
  }
  Portions portions(summary, options.block);
  Stop stop(options.cancelled);
  std::vector<std::thread> threads;
  try {
    for (size_t i = 1; i < channels.size(); ++i) {
      threads.emplace_back(run_channel, std::ref(*channels[i]), std::ref(portions), std::ref(stop));
    }
  } catch (const std::system_error &error) {
    stop.fail({ErrorCode::io, error.code().value(),
               std::string("cannot start threads to read RAM: ") + error.what() +
                   "; use fewer --channels"});
  }
  run_channel(*channels[0], portions, stop);
  for (std::thread &thread : threads) {
    thread.join();
  }
  return stop.result();
}

}  // namespace qvmstate::vmstate
