// RAM of a state as one file: pieces of RAM blocks, each at its place in the output.
//
// A legacy stream is read once, ahead of its use; a mapped-ram stream in parallel. Pages come in
// any order and more than once; what is written last counts.
#include <algorithm>
#include <atomic>
#include <map>
#include <utility>
#include <vector>

#include "tools/extract_parts.h"
#include "tools/sparse_output.h"
#include "tools/stdout_writer.h"
#include "vmstate/cpu_state.h"
#include "vmstate/elf_core.h"
#include "vmstate/mapped_ram_reader.h"
#include "vmstate/ram_map.h"
#include "vmstate/read_ahead_source.h"
#include "vmstate/stream_reader.h"

namespace qvmstate::tools {

namespace {

// Of all channels together; each has two at least.
constexpr size_t write_buffers_total = 16;
constexpr size_t write_buffers_max = 8;

/// A part of a block and where it goes.
struct Part {
  uint64_t block_offset;
  uint64_t bytes;
  uint64_t output_offset;
};

/// All parts, by block and in ascending order of their offsets in it.
class Plan {
 public:
  void add(size_t block, const Part &part) {
    std::vector<Part> &parts = parts_[block];
    parts.insert(std::ranges::upper_bound(parts, part.block_offset, {}, &Part::block_offset), part);
    wanted_bytes_ += part.bytes;
    output_bytes_ = std::max(output_bytes_, part.output_offset + part.bytes);
  }
  uint64_t wanted_bytes() const { return wanted_bytes_; }
  uint64_t output_bytes() const { return output_bytes_; }
  std::vector<size_t> blocks() const {
    std::vector<size_t> blocks;
    blocks.reserve(parts_.size());
    for (const auto &[block, parts] : parts_) {
      blocks.push_back(block);
    }
    return blocks;
  }
  /// Calls `use(output offset, offset in the range, bytes)` for what of a range of a block is
  /// wanted.
  template <class Use>
  Result<void> for_range(size_t block, uint64_t offset, uint64_t bytes, const Use &use) const {
    const auto found = parts_.find(block);
    if (found == parts_.end()) {
      return {};
    }
    for (const Part &part : found->second) {
      const uint64_t from = std::max(offset, part.block_offset);
      const uint64_t to = std::min(offset + bytes, part.block_offset + part.bytes);
      if (from < to) {
        QV_TRY(use(part.output_offset + (from - part.block_offset), from - offset, to - from));
      }
    }
    return {};
  }

 private:
  std::map<size_t, std::vector<Part>> parts_;
  uint64_t wanted_bytes_ = 0;
  uint64_t output_bytes_ = 0;
};

Result<size_t> find_block(const vmstate::StreamSummary &stream, const std::string &idstr) {
  std::string known;
  for (size_t i = 0; i < stream.blocks.size(); ++i) {
    if (stream.blocks[i].idstr == idstr) {
      return i;
    }
    known += (i == 0 ? "" : ", ") + stream.blocks[i].idstr;
  }
  return fail(ErrorCode::not_found, "has no RAM block '" + idstr + "'; it has: " + known);
}

class Extraction {
 public:
  Extraction(const ExtractCommand &command, StateSource &state, Advance &advance)
      : command_(command), state_(state), advance_(advance) {}

  Result<Extracted> run() {
    QV_TRY(read_head());
    QV_TRY(make_plan());
    advance_.expect(plan_.wanted_bytes());
    extracted_.layout = vmstate::layout_name(stream_.layout);
    extracted_.bytes = plan_.output_bytes();
    QV_TRY(command_.output == "-" ? to_stdout() : to_file());
    return extracted_;
  }

 private:
  bool is_mapped() const { return stream_.layout == vmstate::Layout::mapped_ram; }

  /// To know the blocks it takes the beginning of a legacy stream, whose RAM is read only once; of
  /// a mapped-ram stream the whole, which reads no RAM and tells of damage before anything is
  /// written.
  Result<void> read_head() {
    // Of an ELF core the head comes first and needs what a stream tells last.
    const bool needs_whole = command_.kind == ExtractKind::elf && command_.output == "-";
    bool is_legacy = false;
    auto whole = vmstate::read_stream(state_.stream(), {}, state_.start(),
                                      [&](const vmstate::StreamSummary &so_far) -> Result<void> {
                                        is_legacy = so_far.layout == vmstate::Layout::legacy;
                                        if (is_legacy && !needs_whole) {
                                          stream_ = so_far;
                                          return fail(ErrorCode::cancelled, "seen enough");
                                        }
                                        return {};
                                      });
    if (is_legacy && !needs_whole) {
      return {};
    }
    QV_ASSIGN(stream_, std::move(whole));
    return {};
  }

  Result<void> make_plan() {
    if (command_.kind == ExtractKind::block) {
      QV_ASSIGN(const size_t block, find_block(stream_, command_.block));
      plan_.add(block, {0, stream_.blocks[block].used_bytes, 0});
      return {};
    }
    QV_ASSIGN(pieces_, command_.ram_map.empty()
                           ? vmstate::ram_of_machine(stream_)
                           : vmstate::ram_of_places(stream_, command_.ram_map));
    uint64_t core_offset = vmstate::elf_head_bytes;
    for (const vmstate::RamPiece &piece : pieces_) {
      plan_.add(piece.block, {piece.block_offset, piece.bytes,
                              command_.kind == ExtractKind::elf ? core_offset : piece.address});
      core_offset += piece.bytes;
    }
    return {};
  }

  /// Once the whole stream is known. Nothing for other kinds.
  Result<std::vector<std::byte>> head() {
    if (command_.kind != ExtractKind::elf) {
      return std::vector<std::byte>();
    }
    QV_ASSIGN(const std::vector<vmstate::CpuState> cpus,
              vmstate::read_cpus(state_.stream(), stream_));
    return vmstate::format_elf_head(pieces_, cpus);
  }

  Result<void> to_stdout() {
    StdoutWriter out;
    QV_ASSIGN(const std::vector<std::byte> head, this->head());
    QV_TRY(out.write(0, head));
    if (is_mapped()) {
      QV_TRY(check_all_there());
      QV_TRY(mapped_in_order(out));
    } else {
      QV_TRY(legacy([&](uint64_t at, std::span<const std::byte> data,
                        uint64_t) { return data.empty() ? Result<void>() : out.write(at, data); },
                    [](uint64_t, std::span<std::byte>) -> Result<void> {
                      return fail(
                          ErrorCode::not_supported,
                          "a page comes as its difference to an earlier one (XBZRLE), and standard "
                          "output cannot be read back: extract to a file with -o FILE");
                    }));
    }
    return out.fill_up_to(plan_.output_bytes());
  }

  Result<void> to_file() {
    if (is_mapped()) {
      QV_TRY(check_all_there());
    }
    QV_ASSIGN(const auto output, SparseOutput::create(command_.output, plan_.output_bytes()));
    QV_TRY(is_mapped() ? mapped_to_file(*output) : legacy_to_file(*output));
    QV_ASSIGN(const std::vector<std::byte> head, this->head());
    QV_ASSIGN(const auto writer,
              SparseWriter::create(*output, open_options(command_), io::buffer_count_min));
    QV_TRY(writer->write(0, head));
    QV_TRY(writer->finish());
    return output->finish();
  }

  Result<void> mapped_in_order(StdoutWriter &out) {
    struct Piece {
      size_t block;
      Part part;
    };
    std::vector<Piece> pieces;
    for (const size_t block : plan_.blocks()) {
      QV_TRY(plan_.for_range(block, 0, stream_.blocks[block].used_bytes,
                             [&](uint64_t at, uint64_t offset, uint64_t bytes) -> Result<void> {
                               pieces.push_back({block, {offset, bytes, at}});
                               return {};
                             }));
    }
    std::ranges::sort(pieces, {}, [](const Piece &piece) { return piece.part.output_offset; });
    for (const Piece &piece : pieces) {
      QV_TRY(mapped_piece(out, stream_.blocks[piece.block], piece.part));
    }
    return {};
  }

  Result<void> mapped_piece(StdoutWriter &out, const vmstate::StreamBlock &block,
                            const Part &part) {
    vmstate::MappedBlockMap map(state_.stream(), *block.mapped, block.used_bytes);
    std::vector<std::byte> data;
    for (uint64_t done = 0; done < part.bytes;) {
      QV_ASSIGN(const vmstate::MappedRun run,
                map.run_at(part.block_offset + done,
                           std::min(vmstate::mapped_portion_bytes, part.bytes - done)));
      for (uint64_t at = done; run.has_data && at < done + run.bytes; at += data.size()) {
        data.resize(std::min(vmstate::mapped_chunk_bytes, done + run.bytes - at));
        QV_TRY(state_.stream().read(block.mapped->pages_offset + part.block_offset + at, data));
        QV_TRY(out.write(part.output_offset + at, data));
      }
      done += run.bytes;
      done_bytes_ += run.bytes;
      extracted_.data_bytes += run.has_data ? run.bytes : 0;
      QV_TRY(advance_.tell(done_bytes_, extracted_.data_bytes));
    }
    return {};
  }

  /// Gives every page record that is wanted to `put(output offset, data or empty, bytes)`, and asks
  /// `get(output offset, bytes)` for what was put.
  template <class Put, class Get>
  Result<void> legacy(const Put &put, const Get &get) {
    const auto hook = [&](size_t block, uint64_t offset, uint64_t page_bytes,
                          std::span<const std::byte> data) -> Result<void> {
      QV_TRY(plan_.for_range(
          block, offset, page_bytes, [&](uint64_t at, uint64_t in_page, uint64_t bytes) {
            done_bytes_ += bytes;
            extracted_.data_bytes += data.empty() ? 0 : bytes;
            return put(at, data.empty() ? data : data.subspan(in_page, bytes), bytes);
          }));
      // Asking for the time of each page would cost more than the page.
      if (++pages_ % pages_per_step == 0) {
        return advance_.tell(done_bytes_, extracted_.data_bytes);
      }
      return {};
    };
    const auto page_now = [&](size_t block, uint64_t offset, std::span<std::byte> to) {
      return plan_.for_range(block, offset, to.size(),
                             [&](uint64_t at, uint64_t in_page, uint64_t bytes) {
                               return get(at, to.subspan(in_page, bytes));
                             });
    };
    QV_ASSIGN(auto source, state_.reopen(open_options(command_)));
    QV_ASSIGN(const auto ahead, vmstate::ReadAheadSource::create(std::move(source)));
    QV_ASSIGN(stream_, vmstate::read_stream(*ahead, state_.start(), {hook, {}, page_now}));
    return check_all_there();
  }

  Result<void> check_all_there() const {
    for (const size_t block : plan_.blocks()) {
      if (vmstate::is_left_out(stream_, block)) {
        return fail(
            ErrorCode::not_found,
            "RAM block '" + stream_.blocks[block].idstr +
                "' was left out (x-ignore-shared): it is in the file of its memory backend");
      }
    }
    return {};
  }

  Result<void> legacy_to_file(const SparseOutput &output) {
    QV_ASSIGN(const auto writer,
              SparseWriter::create(output, open_options(command_), write_buffers_max));
    QV_TRY(legacy(
        [&](uint64_t at, std::span<const std::byte> data, uint64_t bytes) {
          return data.empty() ? writer->zero(at, bytes) : writer->write(at, data);
        },
        [&](uint64_t at, std::span<std::byte> to) { return writer->read_back(at, to); }));
    return writer->finish();
  }

  Result<void> mapped_to_file(const SparseOutput &output) {
    const size_t buffers = std::clamp(write_buffers_total / command_.channels, io::buffer_count_min,
                                      write_buffers_max);
    struct Channel {
      std::unique_ptr<SparseWriter> writer;
      size_t block = SIZE_MAX;  ///< where the last piece
      uint64_t end = 0;         ///< ended
    };
    std::vector<Channel> channels(command_.channels);
    for (Channel &channel : channels) {
      QV_ASSIGN(channel.writer, SparseWriter::create(output, open_options(command_), buffers));
    }
    std::atomic<uint64_t> done_bytes = 0;
    std::atomic<uint64_t> data_bytes = 0;
    const vmstate::ChunkHook hook = [&](size_t number, size_t block, uint64_t offset,
                                        std::span<const std::byte> data,
                                        uint64_t bytes) -> Result<void> {
      Channel &channel = channels[number];
      if (std::exchange(channel.block, block) != block ||
          std::exchange(channel.end, offset + bytes) != offset) {
        // What lies between belongs to other channels.
        channel.writer->leave_gap();
      }
      QV_TRY(plan_.for_range(
          block, offset, bytes, [&](uint64_t at, uint64_t in_range, uint64_t part) -> Result<void> {
            done_bytes += part;
            data_bytes += data.empty() ? 0 : part;
            return data.empty() ? Result<void>()
                                : channel.writer->write(at, data.subspan(in_range, part));
          }));
      return number == 0 ? advance_.tell(done_bytes, data_bytes) : Result<void>();
    };
    QV_TRY(vmstate::read_mapped_ram(stream_, [&] { return state_.reopen(open_options(command_)); },
                                    hook,
                                    {.channels = command_.channels,
                                     .blocks = plan_.blocks(),
                                     .cancelled = advance_.cancelled()}));
    for (const Channel &channel : channels) {
      QV_TRY(channel.writer->finish());
    }
    extracted_.data_bytes = data_bytes;
    return {};
  }

  static constexpr uint64_t pages_per_step = 256;

  const ExtractCommand &command_;
  StateSource &state_;
  Advance &advance_;
  vmstate::StreamSummary stream_;
  std::vector<vmstate::RamPiece> pieces_;  ///< of raw and elf
  Plan plan_;
  Extracted extracted_;
  uint64_t done_bytes_ = 0;
  uint64_t pages_ = 0;
};

}  // namespace

Result<Extracted> extract_ram(const ExtractCommand &command, StateSource &state, Advance &advance) {
  return Extraction(command, state, advance).run();
}

}  // namespace qvmstate::tools
