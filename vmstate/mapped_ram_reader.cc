#include "vmstate/mapped_ram_reader.h"

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstring>
#include <deque>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "qcow2/io/file.h"
#include "qcow2/io/signals.h"

namespace qvmstate::vmstate {

namespace {

// Over all channels; but each has two at least, to read one while the other is looked at.
constexpr size_t buffers_total = 64;
static_assert(buffers_total * 2 * io::buffer_bytes_default <= 128 * mib);
constexpr size_t buffers_per_channel_max = io::buffer_count_default;

// Reading so many bytes for nothing takes a disk about as long as one more transfer.
constexpr uint64_t gap_bytes_max = 64 * kib;

// Of one buffer: its pages at their smallest, and zeros that follow them.
constexpr size_t pieces_max = 2048;

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
  Portions(const StreamSummary &summary, const std::vector<size_t> &only) {
    for (size_t i = 0; i < summary.blocks.size(); ++i) {
      if (only.empty() || std::ranges::binary_search(only, i)) {
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
                                                 const ChunkHook &hook, const Stop &stop) {
    const size_t buffers =
        std::clamp(buffers_total / channels, io::buffer_count_min, buffers_per_channel_max);
    QV_ASSIGN(io::BufferPool pool, io::BufferPool::create(buffers, mapped_chunk_bytes));
    auto channel = std::unique_ptr<Channel>(
        new Channel(number, summary, std::move(pool), std::move(source), hook, stop));
    if (channel->file_ != nullptr) {
      channel->file_->backend().register_buffers(channel->pool_.memory());
    }
    return channel;
  }

  /// To the end of the portions, or until something stops it. Nothing is in flight afterwards.
  Result<void> run(Portions &portions) {
    Result<void> done;
    try {
      done = read_all(portions);
    } catch (const std::bad_alloc &) {
      done = fail_errno(ENOMEM, "reading RAM");
    }
    if (!done && file_ != nullptr) {
      // The buffers must not be freed under transfers; the error that counts is `done`.
      (void)file_->drain();
    }
    return done;
  }

 private:
  /// What one call of the hook tells.
  struct Piece {
    size_t block;
    uint64_t offset;
    uint64_t bytes;
    bool has_data;
  };
  /// What a buffer of the pool holds, by its index: pages from the first that is stored to the
  /// last, with what stands between them.
  struct Chunk {
    size_t block = 0;
    uint64_t offset = 0;
    uint64_t bytes = 0;
    unsigned parts_left = 0;    ///< transfers in flight
    std::vector<Piece> pieces;  ///< in order; the last ones may be zeros after its bytes
  };

  /// A read that may still grow.
  struct Transfer {
    uint64_t at = 0;  ///< in the buffer
    uint64_t bytes = 0;
    HostOffset host;
  };

  Channel(size_t number, const StreamSummary &summary, io::BufferPool pool,
          std::unique_ptr<StreamSource> source, const ChunkHook &hook, const Stop &stop)
      : number_(number),
        summary_(summary),
        pool_(std::move(pool)),
        source_(std::move(source)),
        file_(source_->file()),
        hook_(hook),
        stop_(stop),
        chunks_(pool_.count()) {}

  Result<void> read_all(Portions &portions) {
    std::optional<MappedBlockMap> map;
    std::optional<size_t> map_block;
    while (const std::optional<Portion> portion = portions.take()) {
      if (map_block != portion->block) {
        const StreamBlock &block = summary_.blocks[portion->block];
        map.emplace(*source_, *block.mapped, block.used_bytes);
        map_block = portion->block;
      }
      QV_TRY(read_portion(*map, *portion));
      if (stop_.stopped()) {
        break;
      }
    }
    while (!queue_.empty()) {
      QV_TRY(deliver_oldest());
    }
    return {};
  }

  Result<void> read_portion(MappedBlockMap &map, const Portion &portion) {
    const uint64_t end = portion.offset + portion.bytes;
    uint64_t offset = portion.offset;
    while (offset < end && !stop_.stopped()) {
      QV_ASSIGN(const MappedRun run, map.run_at(offset, end - offset));
      if (!run.has_data) {
        QV_TRY(queue_zeros(portion.block, offset, run.bytes));
        offset += run.bytes;
        continue;
      }
      QV_ASSIGN(const uint64_t bytes, queue_chunk(map, portion.block, offset, end));
      offset += bytes;
    }
    return {};
  }

  /// Zeros need no buffer, but they wait for their turn where a buffer is in hand already.
  Result<void> queue_zeros(size_t block, uint64_t offset, uint64_t bytes) {
    while (!queue_.empty() && chunks_[queue_.back()].pieces.size() >= pieces_max) {
      QV_TRY(deliver_oldest());
    }
    if (queue_.empty()) {
      return tell({block, offset, bytes, false}, {});
    }
    chunks_[queue_.back()].pieces.push_back({block, offset, bytes, false});
    return {};
  }

  /// Takes in pages from `offset` on, short gaps between them as well, and starts to read them.
  /// Returns how many bytes that are.
  Result<uint64_t> queue_chunk(MappedBlockMap &map, size_t block, uint64_t offset, uint64_t end) {
    QV_ASSIGN(io::Buffer *const buffer, free_buffer());
    Chunk &chunk = chunks_[buffer->index];
    chunk.block = block;
    chunk.offset = offset;
    chunk.bytes = 0;
    chunk.pieces.clear();
    uint64_t gap = 0;
    const uint64_t bytes_max = std::min(mapped_chunk_bytes, end - offset);
    while (chunk.bytes + gap < bytes_max) {
      const uint64_t at = chunk.bytes + gap;
      QV_ASSIGN(const MappedRun run, map.run_at(offset + at, bytes_max - at));
      if (!run.has_data) {
        gap += run.bytes;
        if (gap > gap_bytes_max) {
          break;
        }
        continue;
      }
      if (gap > 0) {
        chunk.pieces.push_back({block, offset + chunk.bytes, gap, false});
      }
      chunk.pieces.push_back({block, offset + at, run.bytes, true});
      chunk.bytes += gap + run.bytes;
      gap = 0;
    }
    QV_TRY(read_chunk(*buffer, chunk));
    return chunk.bytes;
  }

  /// Starts what can be read asynchronously and reads the rest.
  Result<void> read_chunk(io::Buffer &buffer, Chunk &chunk) {
    chunk.parts_left = 0;
    pool_.send_off(buffer, 1);
    queue_.push_back(buffer.index);
    Transfer transfer;
    for (const Piece &piece : chunk.pieces) {
      if (piece.has_data) {
        QV_TRY(read_piece(buffer, chunk, piece, transfer));
      }
    }
    return start(buffer, chunk, transfer);
  }

  /// Goes on with `transfer` where the piece follows it in the file as it does in the buffer; what
  /// is read into the gap between them is never looked at.
  Result<void> read_piece(io::Buffer &buffer, Chunk &chunk, const Piece &piece,
                          Transfer &transfer) {
    const StreamOffset pages = summary_.blocks[chunk.block].mapped->pages_offset;
    const uint64_t end = piece.offset + piece.bytes - chunk.offset;
    for (uint64_t at = piece.offset - chunk.offset; at < end;) {
      QV_ASSIGN(const StreamRun run, source_->run_at(pages + chunk.offset + at, end - at));
      const std::span<std::byte> part(buffer.data + at, run.bytes);
      if (run.kind == StreamRun::Kind::in_file) {
        if (transfer.bytes == 0 || run.host != transfer.host + (at - transfer.at)) {
          QV_TRY(start(buffer, chunk, transfer));
          transfer = {at, 0, run.host};
        }
        transfer.bytes = at + run.bytes - transfer.at;
      } else {
        // These bytes must not be read over.
        QV_TRY(start(buffer, chunk, transfer));
        transfer = {};
        if (run.kind == StreamRun::Kind::zeros) {
          std::memset(part.data(), 0, part.size());
        } else {
          QV_TRY(source_->read(pages + chunk.offset + at, part));
        }
      }
      at += run.bytes;
    }
    return {};
  }

  Result<void> start(const io::Buffer &buffer, Chunk &chunk, const Transfer &transfer) {
    if (transfer.bytes == 0) {
      return {};
    }
    chunk.parts_left += 1;
    return file_->start_read({buffer.data + transfer.at, transfer.bytes}, transfer.host,
                             buffer.index, buffer.index);
  }

  Result<io::Buffer *> free_buffer() {
    io::Buffer *buffer = pool_.take();
    if (buffer == nullptr) {
      QV_TRY(deliver_oldest());
      buffer = pool_.take();
    }
    return buffer;
  }

  Result<void> deliver_oldest() {
    io::Buffer &buffer = pool_.at(queue_.front());
    const Chunk &chunk = chunks_[buffer.index];
    while (chunk.parts_left > 0) {
      QV_ASSIGN(const uint64_t cookie, file_->wait_any());
      chunks_[cookie].parts_left -= 1;
    }
    for (const Piece &piece : chunk.pieces) {
      const std::span<const std::byte> data =
          piece.has_data
              ? std::span<const std::byte>(buffer.data + (piece.offset - chunk.offset), piece.bytes)
              : std::span<const std::byte>();
      QV_TRY(tell(piece, data));
    }
    queue_.pop_front();
    pool_.part_landed(buffer);
    return {};
  }

  Result<void> tell(const Piece &piece, std::span<const std::byte> data) {
    if (stop_.stopped()) {
      return {};
    }
    if (stop_.cancelled()) {
      return fail(ErrorCode::cancelled, "reading RAM: cancelled");
    }
    return hook_(number_, piece.block, piece.offset, data, piece.bytes);
  }

  size_t number_;
  const StreamSummary &summary_;
  io::BufferPool pool_;  // before the source: its file may have registered the memory
  std::unique_ptr<StreamSource> source_;
  io::File *file_;
  const ChunkHook &hook_;
  const Stop &stop_;
  std::vector<Chunk> chunks_;
  std::deque<unsigned> queue_;  ///< buffers to deliver, oldest first
};

void run_channel(Channel &channel, Portions &portions, Stop &stop) {
  if (auto done = channel.run(portions); !done) {
    stop.fail(std::move(done).error());
  }
}

}  // namespace

Result<void> read_mapped_ram(const StreamSummary &summary, const SourceOpener &open_source,
                             const ChunkHook &hook, const MappedReadOptions &options) {
  assert(summary.layout == Layout::mapped_ram);
  assert(options.blocks.empty() || options.blocks.back() < summary.blocks.size());
  if (options.channels < 1 || options.channels > mapped_channels_max) {
    return fail(ErrorCode::bad_argument, "cannot read RAM in " + std::to_string(options.channels) +
                                             " channels: choose 1 to " +
                                             std::to_string(mapped_channels_max));
  }
  Stop stop(options.cancelled);
  std::vector<std::unique_ptr<Channel>> channels;
  for (size_t i = 0; i < options.channels; ++i) {
    QV_ASSIGN(std::unique_ptr<StreamSource> source, open_source());
    QV_ASSIGN(auto channel,
              Channel::create(i, options.channels, summary, std::move(source), hook, stop));
    channels.push_back(std::move(channel));
  }
  Portions portions(summary, options.blocks);
  std::vector<std::thread> threads;
  std::optional<io::SignalsBlocked> blocked(std::in_place);
  try {
    for (size_t i = 1; i < channels.size(); ++i) {
      threads.emplace_back(run_channel, std::ref(*channels[i]), std::ref(portions), std::ref(stop));
    }
  } catch (const std::system_error &error) {
    stop.fail({ErrorCode::io, error.code().value(),
               std::string("cannot start threads to read RAM: ") + error.what() +
                   "; use fewer --channels"});
  } catch (const std::bad_alloc &) {
    stop.fail(fail_errno(ENOMEM, "cannot start threads to read RAM").value());
  }
  blocked.reset();
  run_channel(*channels[0], portions, stop);
  for (std::thread &thread : threads) {
    thread.join();
  }
  return stop.result();
}

}  // namespace qvmstate::vmstate
