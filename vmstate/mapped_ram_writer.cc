#include "vmstate/mapped_ram_writer.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cassert>
#include <cerrno>
#include <mutex>
#include <new>
#include <optional>
#include <system_error>
#include <thread>

#include "qcow2/io/signals.h"
#include "vmstate/page_scan.h"
#include "vmstate/stream_format.h"

namespace qvmstate::vmstate {
namespace {

constexpr uint64_t chunk_bytes_min = 1 * mib;
constexpr uint64_t batch_bytes = 256 * kib;
// Zero pages between two others are written with them where that saves a write: a disk does about
// 100,000 a second, whatever their size. Of one page in ten this makes one in eight.
constexpr uint64_t bridged_bytes_max = 16 * kib;

// Written over pages that became zero.
alignas(4096) constexpr std::byte zero_page[page_bytes_max] = {};

uint64_t words_for(uint64_t pages) {
  return divide_up(pages, 64);
}

}  // namespace

Result<MappedRamWriter> MappedRamWriter::plan(const StreamConfiguration &configuration,
                                              std::span<const RamBlock> blocks,
                                              std::span<const DeviceSection> before_ram,
                                              const MappedWriteOptions &options) {
  QV_TRY(check_stream_arguments(configuration, blocks));
  MappedRamWriter writer;
  writer.configuration_ = configuration;
  writer.options_ = options;
  writer.stats_.ram_bytes = total_bytes(blocks);
  constexpr std::string_view capabilities[] = {mapped_ram_capability};
  writer.before_ram_.assign(before_ram.begin(), before_ram.end());
  add_stream_head(writer.head_, configuration, capabilities, before_ram);
  add_ram_start(writer.head_, writer.stats_.ram_bytes);
  uint64_t at = options.start_bytes + writer.head_.span().size();
  for (const RamBlock &ram : blocks) {
    Block block;
    block.ram = ram;
    block.present.resize(words_for(ram.used_bytes / configuration.page_bytes));
    block.header_offset = at;
    block.bitmap_offset = at + 1 + ram.idstr.size() + 8 + mapped_ram_header_bytes;
    block.pages_offset =
        round_up(block.bitmap_offset + block.present.size() * 8, mapped_ram_alignment_bytes);
    at = block.pages_offset + ram.used_bytes;
    writer.blocks_.push_back(std::move(block));
  }
  writer.tail_offset_ = at;
  if (options.checksum) {
    assert(options.start_bytes == 0 && !options.ram_changes);
    writer.digests_.emplace(writer.tail_offset_);
    for (Block &block : writer.blocks_) {
      block.rest.resize(block.ram.used_bytes % checksum_piece_bytes);
    }
  }
  return writer;
}

uint64_t MappedRamWriter::chunk_bytes(const io::FixedPlacement &placement) {
  return std::max(chunk_bytes_min, placement.place_unit_bytes());
}

/// What the channels of one write_pages() share.
class MappedRamWriter::Round {
 public:
  Round(MappedRamWriter &writer, io::FixedPlacement &placement, const ChannelHook &hook,
        const DirtyPages *dirty)
      : writer_(writer),
        placement_(placement),
        hook_(hook),
        dirty_(dirty),
        chunk_bytes_(chunk_bytes(placement)) {
    for (Block &block : writer.blocks_) {
      block.first_chunk = chunks_;
      // Chunks begin where the stream has a multiple of their size, so that they hold whole units.
      const uint64_t first = block.pages_offset / chunk_bytes_;
      const uint64_t end = divide_up(block.pages_offset + block.ram.used_bytes, chunk_bytes_);
      chunks_ += end - first;
    }
  }

  struct Chunk {
    size_t block;
    uint64_t offset;  ///< in the block
    uint64_t bytes;
  };
  /// The next one to do; none after an error of any channel.
  std::optional<Chunk> next() {
    const uint64_t index = next_.fetch_add(1, std::memory_order_relaxed);
    if (index >= chunks_ || failed_.load(std::memory_order_relaxed)) {
      return std::nullopt;
    }
    const auto after = std::ranges::upper_bound(writer_.blocks_, index, {}, &Block::first_chunk);
    const Block &block = *std::prev(after);
    const uint64_t begin =
        (block.pages_offset / chunk_bytes_ + (index - block.first_chunk)) * chunk_bytes_;
    const uint64_t from = std::max(begin, block.pages_offset);
    const uint64_t to = std::min(begin + chunk_bytes_, block.pages_offset + block.ram.used_bytes);
    return Chunk{static_cast<size_t>(after - writer_.blocks_.begin()) - 1,
                 from - block.pages_offset, to - from};
  }

  Result<void> place(std::span<const io::StreamRange> ranges, std::vector<io::HostRun> &runs) {
    const std::lock_guard lock(placement_mutex_);
    return placement_.place_at(ranges, runs);
  }

  Result<void> report(uint64_t ram_bytes, uint64_t queued_bytes) {
    const std::lock_guard lock(hook_mutex_);
    ram_bytes_done_ += ram_bytes;
    queued_bytes_ += queued_bytes;
    return hook_ ? hook_(ram_bytes_done_, queued_bytes_) : Result<void>{};
  }

  /// The first one is kept.
  void fail_with(Error error) {
    const std::lock_guard lock(hook_mutex_);
    if (!error_) {
      error_ = std::move(error);
      failed_ = true;
    }
  }
  const std::optional<Error> &error() const { return error_; }

  struct Pages {
    uint64_t first;
    uint64_t end;
  };
  /// The next pages of a block, from `first` and before `end`, that this round deals with.
  Pages next_wanted(size_t block, uint64_t first, uint64_t end) const {
    if (dirty_ == nullptr) {
      return {first, end};
    }
    const uint64_t from = dirty_->first_dirty(block, first, end);
    return {from, from == end ? end : dirty_->first_clean(block, from, end)};
  }
  bool is_first() const { return dirty_ == nullptr; }
  MappedRamWriter &writer() { return writer_; }

 private:
  MappedRamWriter &writer_;
  io::FixedPlacement &placement_;
  const ChannelHook &hook_;
  const DirtyPages *dirty_;
  const uint64_t chunk_bytes_;
  uint64_t chunks_ = 0;
  std::atomic<uint64_t> next_ = 0;
  std::atomic<bool> failed_ = false;
  std::mutex placement_mutex_;
  std::mutex hook_mutex_;
  uint64_t ram_bytes_done_ = 0;
  uint64_t queued_bytes_ = 0;
  std::optional<Error> error_;
};

/// One thread's work: chunk after chunk, several transfers in flight.
class MappedRamWriter::Channel {
 public:
  Channel(Round &round, const RamChannel &channel)
      : round_(round),
        file_(*channel.file),
        source_(*channel.source),
        pool_(*channel.pool),
        page_bytes_(round.writer().configuration_.page_bytes),
        depth_(round.writer().options_.depth),
        bridged_bytes_(round.is_first() && !round.writer().options_.ram_changes ? bridged_bytes_max
                                                                                : 0),
        on_landed_(round.writer().options_.on_landed) {}

  void run() {
    Result<void> done;
    try {
      done = write_chunks();
    } catch (const std::bad_alloc &) {
      done = fail_errno(ENOMEM, "writing RAM");
    }
    if (!done) {
      round_.fail_with(std::move(done).error());
    }
    // Guest memory and buffers are read until the last transfer ended, also after an error.
    if (auto drained = file_.drain(); !drained) {
      round_.fail_with(std::move(drained).error());
    }
    for (unsigned i = 0; i < pool_.count(); ++i) {
      if (pool_.at(i).state != io::BufferState::free) {
        pool_.give_back(pool_.at(i));
      }
    }
  }

  const StreamStats &stats() const { return stats_; }

 private:
  /// Pages beside each other that are written from one piece of memory.
  struct Piece {
    uint64_t offset;  ///< in the block
    uint64_t bytes;
    const std::byte *from;
  };

  /// A chunk whose transfers were started.
  struct Flight {
    Round::Chunk chunk;
    io::Buffer *buffer;  ///< or null: straight from guest memory
    size_t parts_left;   ///< transfers in flight; 0: the place is free
  };

  Result<void> write_chunks() {
    while (const auto chunk = round_.next()) {
      pieces_.clear();
      hashed_pieces_ = 0;
      hashed_to_ = chunk->offset;
      QV_ASSIGN(io::Buffer *const buffer, find_pieces(*chunk));
      QV_ASSIGN(const uint64_t queued_bytes, write_pieces(*chunk, buffer));
      QV_TRY(round_.report(chunk->bytes, queued_bytes));
    }
    while (file_.pending() > 0) {
      QV_TRY(land_one());
    }
    return {};
  }

  /// Looks at the pages of a chunk and notes what has to be written; the buffer that it was read
  /// into, or nullptr.
  Result<io::Buffer *> find_pieces(const Round::Chunk &chunk) {
    io::Buffer *buffer = nullptr;
    const uint64_t end_page = (chunk.offset + chunk.bytes) / page_bytes_;
    for (uint64_t page = chunk.offset / page_bytes_; page < end_page;) {
      const Round::Pages wanted = round_.next_wanted(chunk.block, page, end_page);
      QV_TRY(look_at_pages(chunk, wanted, buffer));
      page = wanted.end;
    }
    hash_up_to(chunk, chunk.offset + chunk.bytes);
    return buffer;
  }

  Result<void> look_at_pages(const Round::Chunk &chunk, const Round::Pages &pages,
                             io::Buffer *&buffer) {
    const uint64_t end = pages.end * page_bytes_;
    for (uint64_t at = pages.first * page_bytes_; at < end;) {
      QV_ASSIGN(const RamSource::Presence presence, source_.presence(chunk.block, at));
      uint64_t bytes = std::min(presence.bytes, end - at);
      if (bytes == 0) {
        return fail(ErrorCode::bad_argument, "vmstate stream: RAM block \"" +
                                                 source_.blocks()[chunk.block].idstr +
                                                 "\": its source names an empty range");
      }
      // A page only part of which is untouched counts as touched.
      if (presence.touched || bytes < page_bytes_) {
        bytes = std::min(round_up(bytes, page_bytes_), end - at);
        QV_TRY(look_at_touched(chunk, at, bytes, buffer));
      } else {
        bytes = round_down(bytes, page_bytes_);
        stats_.untouched_pages += round_.is_first() ? bytes / page_bytes_ : 0;
        for (uint64_t page = at / page_bytes_; page < (at + bytes) / page_bytes_; ++page) {
          note_zero(chunk.block, page);
        }
      }
      at += bytes;
    }
    return {};
  }

  /// In batches: small enough to be still in the L2 cache while they are looked at and hashed.
  Result<void> look_at_touched(const Round::Chunk &chunk, uint64_t offset, uint64_t bytes,
                               io::Buffer *&buffer) {
    const std::byte *const memory = source_.view(chunk.block);
    if (memory == nullptr && buffer == nullptr) {
      QV_ASSIGN(buffer, free_buffer());
    }
    for (const uint64_t end = offset + bytes; offset < end;) {
      const uint64_t part = std::min(batch_bytes, end - offset);
      if (memory == nullptr) {
        std::byte *const to = buffer->data + (offset - chunk.offset);
        QV_TRY(source_.read_pages(chunk.block, offset, part / page_bytes_, page_bytes_, to,
                                  page_bytes_));
        stats_.copied_bytes += part;
        scan(chunk.block, offset, part, to);
      } else {
        scan(chunk.block, offset, part, memory + offset);
      }
      offset += part;
      hash_up_to(chunk, offset);
    }
    return {};
  }

  void scan(size_t block, uint64_t offset, uint64_t bytes, const std::byte *memory) {
    const size_t first_piece = pieces_.size();
    for (uint64_t done = 0; done < bytes; done += page_bytes_) {
      const uint64_t page = (offset + done) / page_bytes_;
      if (is_zero(memory + done, page_bytes_)) {
        note_zero(block, page);
      } else {
        if (pieces_.size() > first_piece) {
          bridge_gap(offset + done);
        }
        note_piece(offset + done, memory + done);
        word_of(block, page).fetch_or(uint64_t{1} << page % 64, std::memory_order_relaxed);
      }
    }
  }

  /// A zero page is not written; unless an earlier round wrote it with data.
  void note_zero(size_t block, uint64_t page) {
    if (round_.is_first()) {
      return;
    }
    const uint64_t bit = uint64_t{1} << page % 64;
    if ((word_of(block, page).fetch_and(~bit, std::memory_order_relaxed) & bit) != 0) {
      note_piece(page * page_bytes_, zero_page);
    }
  }

  /// Lets the last piece reach up to `offset` if only a few zero pages lie between.
  void bridge_gap(uint64_t offset) {
    Piece &last = pieces_.back();
    if (offset - (last.offset + last.bytes) <= bridged_bytes_) {
      last.bytes = offset - last.offset;
    }
  }

  void note_piece(uint64_t offset, const std::byte *from) {
    if (!pieces_.empty()) {
      Piece &last = pieces_.back();
      if (last.offset + last.bytes == offset && last.from + last.bytes == from) {
        last.bytes += page_bytes_;
        return;
      }
    }
    pieces_.push_back({offset, page_bytes_, from});
  }

  std::atomic_ref<uint64_t> word_of(size_t block, uint64_t page) {
    return std::atomic_ref(round_.writer().blocks_[block].present[page / 64]);
  }

  /// Hashes the chunk up to `end_offset`: the pages noted so far, and zeros between them.
  void hash_up_to(const Round::Chunk &chunk, uint64_t end_offset) {
    static_assert(mapped_ram_alignment_bytes % checksum_piece_bytes == 0);
    if (!round_.writer().digests_) {
      return;
    }
    while (hashed_to_ < end_offset) {
      const uint64_t begin = round_down(hashed_to_, checksum_piece_bytes);
      const uint64_t to = std::min(begin + checksum_piece_bytes, end_offset);
      hash_data(chunk, to);
      hashed_to_ = to;
      if (to == begin + checksum_piece_bytes && digest_.bytes() > 0) {
        digest_.add_zeros(checksum_piece_bytes - digest_.bytes());
        const Block &block = round_.writer().blocks_[chunk.block];
        round_.writer().digests_->set((block.pages_offset + begin) / checksum_piece_bytes,
                                      digest_.finish());
      }
    }
  }

  /// Of the data between hashed_to_ and `to`, in one piece of the checksum.
  void hash_data(const Round::Chunk &chunk, uint64_t to) {
    Block &block = round_.writer().blocks_[chunk.block];
    const uint64_t begin = round_down(hashed_to_, checksum_piece_bytes);
    const bool is_rest = begin + checksum_piece_bytes > block.ram.used_bytes;
    for (; hashed_pieces_ < pieces_.size() && pieces_[hashed_pieces_].offset < to;
         ++hashed_pieces_) {
      const Piece &piece = pieces_[hashed_pieces_];
      const uint64_t from = std::max(piece.offset, hashed_to_);
      const uint64_t end = std::min(piece.offset + piece.bytes, to);
      if (from < end) {
        const std::span data(piece.from + (from - piece.offset), end - from);
        if (is_rest) {
          std::ranges::copy(data, block.rest.begin() + static_cast<ptrdiff_t>(from - begin));
        } else {
          digest_.add_zeros(from - begin - digest_.bytes());
          digest_.add(data);
        }
      }
      if (end == to) {
        break;  // it may go on, or grow
      }
    }
  }

  Result<uint64_t> write_pieces(const Round::Chunk &chunk, io::Buffer *buffer) {
    uint64_t queued_bytes = 0;
    if (pieces_.empty()) {
      if (buffer != nullptr) {
        pool_.give_back(*buffer);
      }
      tell_landed(chunk);
      return queued_bytes;
    }
    const uint64_t pages_offset = round_.writer().blocks_[chunk.block].pages_offset;
    ranges_.clear();
    for (const Piece &piece : pieces_) {
      ranges_.push_back({StreamOffset(pages_offset + piece.offset), piece.bytes});
    }
    runs_.clear();
    QV_TRY(round_.place(ranges_, runs_));
    if (buffer != nullptr) {
      buffer->used = chunk.bytes;
      pool_.send_off(*buffer, static_cast<unsigned>(runs_.size()));
    }
    const size_t flight = free_flight();
    flights_[flight] = {chunk, buffer, runs_.size()};
    auto run = runs_.begin();
    for (const Piece &piece : pieces_) {
      for (uint64_t done = 0; done < piece.bytes; done += run->bytes, ++run) {
        while (file_.pending() >= depth_) {
          QV_TRY(land_one());
        }
        QV_TRY(file_.start_write({piece.from + done, run->bytes}, run->offset,
                                 buffer == nullptr ? io::no_buffer : buffer->index, flight));
        queued_bytes += run->bytes;
      }
    }
    return queued_bytes;
  }

  Result<void> land_one() {
    QV_ASSIGN(const uint64_t cookie, file_.wait_any());
    Flight &flight = flights_[cookie];
    if (flight.buffer != nullptr) {
      pool_.part_landed(*flight.buffer);
    }
    if (--flight.parts_left == 0) {
      tell_landed(flight.chunk);
    }
    return {};
  }

  void tell_landed(const Round::Chunk &chunk) const {
    if (on_landed_) {
      on_landed_(chunk.block, chunk.offset, chunk.bytes);
    }
  }

  /// Of no chunk in flight.
  size_t free_flight() {
    const auto unused = std::ranges::find(flights_, size_t{0}, &Flight::parts_left);
    if (unused == flights_.end()) {
      flights_.push_back({});
      return flights_.size() - 1;
    }
    return static_cast<size_t>(unused - flights_.begin());
  }

  Result<io::Buffer *> free_buffer() {
    io::Buffer *buffer = pool_.take();
    while (buffer == nullptr) {
      QV_TRY(land_one());
      buffer = pool_.take();
    }
    return buffer;
  }

  Round &round_;
  io::File &file_;
  RamSource &source_;
  io::BufferPool &pool_;
  const uint64_t page_bytes_;
  const unsigned depth_;
  const uint64_t bridged_bytes_;
  const std::function<void(size_t, uint64_t, uint64_t)> &on_landed_;
  StreamStats stats_;
  std::vector<Flight> flights_;  ///< a transfer's cookie is the index of its chunk here
  PieceDigest digest_;
  uint64_t hashed_to_ = 0;    ///< in the block
  size_t hashed_pieces_ = 0;  ///< of pieces_, those that are done with
  std::vector<Piece> pieces_;
  std::vector<io::StreamRange> ranges_;
  std::vector<io::HostRun> runs_;
};

Result<void> MappedRamWriter::write_pages(std::span<const RamChannel> channels,
                                          io::FixedPlacement &placement, const ChannelHook &hook,
                                          const DirtyPages *dirty) {
  if (dirty != nullptr) {
    digests_.reset();  // of a chunk only some pages would be looked at
  }
  Round round(*this, placement, hook, dirty);
  std::vector<Channel> work;
  for (const RamChannel &channel : channels) {
    work.emplace_back(round, channel);
  }
  std::vector<std::thread> threads;
  std::optional<io::SignalsBlocked> blocked(std::in_place);
  try {
    for (size_t i = 1; i < work.size(); ++i) {
      threads.emplace_back([&work, i] { work[i].run(); });
    }
  } catch (const std::system_error &error) {
    round.fail_with({ErrorCode::io, error.code().value(),
                     std::string("starting a channel's thread: ") + error.what()});
  } catch (const std::bad_alloc &) {
    round.fail_with(fail_errno(ENOMEM, "starting a channel's thread").value());
  }
  blocked.reset();
  work[0].run();
  for (std::thread &thread : threads) {
    thread.join();
  }
  for (const Channel &channel : work) {
    stats_.copied_bytes += channel.stats().copied_bytes;
    stats_.untouched_pages += channel.stats().untouched_pages;
  }
  if (round.error()) {
    return tl::unexpected(*round.error());
  }
  return {};
}

void MappedRamWriter::add_block_head(StreamPart &part, const Block &block) const {
  part.add_short_text(block.ram.idstr);
  part.add(block.ram.used_bytes);
  part.add(mapped_ram_version);
  part.add(configuration_.page_bytes);
  part.add(block.bitmap_offset);
  part.add(block.pages_offset);
}

/// As the loader shall see them.
std::vector<uint64_t> MappedRamWriter::bitmap_words(const Block &block) const {
  if (!options_.all_pages_present) {
    return block.present;
  }
  std::vector<uint64_t> words(block.present.size(), ~uint64_t{0});
  if (const uint64_t rest = block.ram.used_bytes / configuration_.page_bytes % 64; rest != 0) {
    words.back() = (uint64_t{1} << rest) - 1;
  }
  return words;
}

/// Of the stream between [begin, end), which are multiples of a piece or the end: the rest of a
/// block's pages, the text that follows them, and zeros.
void MappedRamWriter::hash_between(uint64_t begin, uint64_t end, std::span<const std::byte> rest,
                                   std::span<const std::byte> text) {
  PieceDigest piece;
  uint64_t at = begin;
  const auto end_piece = [&] { digests_->set((at - 1) / checksum_piece_bytes, piece.finish()); };
  for (std::span<const std::byte> bytes : {rest, text}) {
    while (!bytes.empty()) {
      const auto part =
          bytes.first(std::min<uint64_t>(bytes.size(), checksum_piece_bytes - piece.bytes()));
      piece.add(part);
      at += part.size();
      bytes = bytes.subspan(part.size());
      if (piece.bytes() == checksum_piece_bytes) {
        end_piece();
      }
    }
  }
  if (piece.bytes() > 0) {
    piece.add_zeros(end - at);
    at = end;
    end_piece();
  }
}

Result<StreamStats> MappedRamWriter::finish(io::File &file, io::FixedPlacement &placement,
                                            std::span<const DeviceSection> after_ram) {
  auto write = [&](uint64_t offset, std::span<const std::byte> bytes) -> Result<void> {
    const io::StreamRange range{StreamOffset(offset), bytes.size()};
    std::vector<io::HostRun> runs;
    QV_TRY(placement.place_at(std::span(&range, 1), runs));
    for (const io::HostRun &run : runs) {
      QV_TRY(file.write_at(bytes.first(run.bytes), run.offset));
      bytes = bytes.subspan(run.bytes);
    }
    return {};
  };
  const uint64_t pages = stats_.ram_bytes / configuration_.page_bytes;
  uint64_t hashed_bytes = 0;
  std::span<const std::byte> rest;
  std::vector<std::byte> between(head_.span().begin(), head_.span().end());
  for (const Block &block : blocks_) {
    StreamPart part;
    add_block_head(part, block);
    std::vector<std::byte> bytes(part.span().begin(), part.span().end());
    const std::vector<uint64_t> words = bitmap_words(block);
    bytes.resize(bytes.size() + words.size() * 8);
    for (size_t i = 0; i < words.size(); ++i) {
      store_le(bytes.data() + part.span().size() + i * 8, words[i]);
      stats_.data_pages += static_cast<uint64_t>(std::popcount(block.present[i]));
    }
    QV_TRY(write(block.header_offset, bytes));
    if (digests_) {
      between.insert(between.end(), bytes.begin(), bytes.end());
      hash_between(hashed_bytes, block.pages_offset, rest, between);
      between.clear();
      rest = block.rest;
      hashed_bytes = block.pages_offset + block.ram.used_bytes - rest.size();
    }
  }
  QV_TRY(write(options_.start_bytes, head_.span()));
  StreamPart tail;
  add_ram_body_end(tail);
  add_ram_continuation(tail, section_end);
  add_ram_body_end(tail);
  add_stream_tail(tail, configuration_, {before_ram_, {after_ram.begin(), after_ram.end()}});
  QV_TRY(write(tail_offset_, tail.span()));
  if (digests_) {
    const uint64_t end_bytes = tail_offset_ + tail.span().size();
    digests_->set_end(end_bytes);
    between.insert(between.end(), tail.span().begin(), tail.span().end());
    hash_between(hashed_bytes, end_bytes, rest, between);
    stats_.checksum = digests_->checksum();
  }
  stats_.zero_pages =
      pages - stats_.data_pages - std::min(stats_.untouched_pages, pages - stats_.data_pages);
  stats_.stream_bytes = tail_offset_ + tail.span().size() - options_.start_bytes;
  return stats_;
}

}  // namespace qvmstate::vmstate
