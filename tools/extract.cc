// extract: the contents of a VM state as a file. Today the RAM of one block, as it lies in it.
//
// The file is written under a temporary name and appears when it is complete; zeros are holes.
// To standard output everything is written, in order.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <utility>
#include <vector>

#include "tools/cancel.h"
#include "tools/commands.h"
#include "tools/format.h"
#include "tools/sparse_output.h"
#include "tools/state_source.h"
#include "vmstate/mapped_ram_reader.h"
#include "vmstate/stream_reader.h"

namespace qvmstate::tools {

namespace {

constexpr size_t zeros_bytes = 64 * kib;
// Of all channels together; each has two at least.
constexpr size_t write_buffers_total = 64;
constexpr size_t write_buffers_max = 4;

struct Extracted {
  vmstate::Layout layout = vmstate::Layout::legacy;
  uint64_t bytes = 0;
  uint64_t data_bytes = 0;  ///< the rest is zeros
};

Error cancelled_error() {
  return {ErrorCode::cancelled, 0, "cancelled"};
}

Result<size_t> find_block(const vmstate::StreamSummary &stream, const std::string &idstr) {
  std::string known;
  for (size_t i = 0; i < stream.blocks.size(); ++i) {
    if (stream.blocks[i].idstr == idstr) {
      return i;
    }
    known += (i == 0 ? "" : ", ") + stream.blocks[i].idstr;
  }
  return fail(ErrorCode::not_found, fmt::format("has no RAM block '{}'; it has: {}", idstr, known));
}

/// Bytes in ascending order to standard output, what is left out as zeros.
class StdoutWriter {
 public:
  Result<void> write(uint64_t offset, std::span<const std::byte> data) {
    if (offset < position_) {
      return fail(ErrorCode::not_supported,
                  "a page was sent more than once (the guest ran meanwhile), and standard output "
                  "cannot be written out of order: extract to a file with -o FILE");
    }
    QV_TRY(fill_up_to(offset));
    position_ += data.size();
    return write_stdout({reinterpret_cast<const char *>(data.data()), data.size()});
  }
  Result<void> fill_up_to(uint64_t offset) {
    static const std::string zeros(zeros_bytes, '\0');
    while (position_ < offset) {
      const uint64_t part = std::min<uint64_t>(zeros_bytes, offset - position_);
      QV_TRY(write_stdout(std::string_view(zeros).substr(0, part)));
      position_ += part;
    }
    return {};
  }

 private:
  uint64_t position_ = 0;
};

/// What the pages of one legacy block are given to.
struct PageSink {
  std::function<Result<void>(uint64_t offset, std::span<const std::byte> data)> write;
  std::function<Result<void>(uint64_t offset, uint64_t bytes)> zero;
};

class Extraction {
 public:
  Extraction(const ExtractCommand &command, StateSource &state)
      : command_(command), state_(state) {}

  Result<Extracted> run() {
    QV_TRY(read_head());
    QV_ASSIGN(block_, find_block(stream_, command_.block));
    extracted_.layout = stream_.layout;
    extracted_.bytes = stream_.blocks[block_].used_bytes;
    QV_TRY(command_.output == "-" ? to_stdout() : to_file());
    return extracted_;
  }

 private:
  bool is_mapped() const { return stream_.layout == vmstate::Layout::mapped_ram; }

  /// To know the blocks it takes the beginning of a legacy stream, whose RAM is read only once; of
  /// a mapped-ram stream the whole, which reads no RAM and tells of damage before anything is
  /// written.
  Result<void> read_head() {
    bool is_legacy = false;
    auto whole = vmstate::read_stream(state_.stream(), {}, state_.start(),
                                      [&](const vmstate::StreamSummary &so_far) -> Result<void> {
                                        is_legacy = so_far.layout == vmstate::Layout::legacy;
                                        if (is_legacy) {
                                          stream_ = so_far;
                                          return tl::unexpected(cancelled_error());
                                        }
                                        return {};
                                      });
    if (is_legacy) {
      return {};
    }
    QV_ASSIGN(stream_, std::move(whole));
    return {};
  }

  Result<void> to_stdout() {
    StdoutWriter out;
    if (is_mapped()) {
      QV_TRY(mapped_in_order(out));
    } else {
      QV_TRY(legacy({[&](uint64_t offset, auto data) { return out.write(offset, data); },
                     [](uint64_t, uint64_t) { return Result<void>(); }}));
    }
    return out.fill_up_to(extracted_.bytes);
  }

  Result<void> to_file() {
    cancelled_ = &catch_cancel_signals();
    QV_ASSIGN(const auto output, SparseOutput::create(command_.output, extracted_.bytes));
    QV_TRY(is_mapped() ? mapped_to_file(*output) : legacy_to_file(*output));
    return output->finish();
  }

  Result<void> mapped_in_order(StdoutWriter &out) {
    const vmstate::StreamBlock &block = stream_.blocks[block_];
    vmstate::MappedBlockMap map(state_.stream(), *block.mapped, block.used_bytes);
    std::vector<std::byte> piece;
    for (uint64_t offset = 0; offset < block.used_bytes;) {
      QV_ASSIGN(
          const vmstate::MappedRun run,
          map.run_at(offset, std::min(vmstate::mapped_portion_bytes, block.used_bytes - offset)));
      for (uint64_t at = offset; run.has_data && at < offset + run.bytes; at += piece.size()) {
        piece.resize(std::min(vmstate::mapped_chunk_bytes, offset + run.bytes - at));
        QV_TRY(state_.stream().read(block.mapped->pages_offset + at, piece));
        QV_TRY(out.write(at, piece));
      }
      extracted_.data_bytes += run.has_data ? run.bytes : 0;
      offset += run.bytes;
    }
    return {};
  }

  Result<void> legacy(const PageSink &sink) {
    const auto hook = [&](size_t block, uint64_t offset, uint64_t page_bytes,
                          std::span<const std::byte> data) -> Result<void> {
      if (cancelled_ != nullptr && *cancelled_) {
        return tl::unexpected(cancelled_error());
      }
      if (block != block_) {
        return {};
      }
      extracted_.data_bytes += data.size();
      return data.empty() ? sink.zero(offset, page_bytes) : sink.write(offset, data);
    };
    QV_TRY(vmstate::read_stream(state_.stream(), hook, state_.start()));
    return {};
  }

  Result<void> legacy_to_file(const SparseOutput &output) {
    QV_ASSIGN(const auto writer, SparseWriter::create(output, open_options(), write_buffers_max));
    QV_TRY(legacy({[&](uint64_t offset, auto data) { return writer->write(offset, data); },
                   [&](uint64_t offset, uint64_t bytes) { return writer->zero(offset, bytes); }}));
    return writer->finish();
  }

  Result<void> mapped_to_file(const SparseOutput &output) {
    const size_t buffers = std::clamp(write_buffers_total / command_.channels, io::buffer_count_min,
                                      write_buffers_max);
    std::vector<std::unique_ptr<SparseWriter>> writers;
    for (unsigned i = 0; i < command_.channels; ++i) {
      QV_ASSIGN(auto writer, SparseWriter::create(output, open_options(), buffers));
      writers.push_back(std::move(writer));
    }
    std::atomic<uint64_t> data_bytes = 0;
    const vmstate::ChunkHook hook = [&](size_t channel, size_t, uint64_t offset,
                                        std::span<const std::byte> data, uint64_t) {
      data_bytes += data.size();
      return data.empty() ? Result<void>() : writers[channel]->write(offset, data);
    };
    QV_TRY(vmstate::read_mapped_ram(
        stream_, [&] { return state_.reopen(open_options()); }, hook,
        {.channels = command_.channels, .block = block_, .cancelled = cancelled_}));
    for (const auto &writer : writers) {
      QV_TRY(writer->finish());
    }
    extracted_.data_bytes = data_bytes;
    return {};
  }

  io::OpenOptions open_options() const {
    io::OpenOptions options;
    options.direct = command_.direct;
    options.engine = command_.engine;
    return options;
  }

  const ExtractCommand &command_;
  StateSource &state_;
  const std::atomic<bool> *cancelled_ = nullptr;
  vmstate::StreamSummary stream_;
  size_t block_ = 0;
  Extracted extracted_;
};

Result<Extracted> extract(const ExtractCommand &command) {
  QV_ASSIGN(StateSource state,
            StateSource::open({command.path, command.name, command.offset, command.force_share}));
  auto extracted = Extraction(command, state).run();
  if (!extracted && extracted.error().message.rfind(command.path, 0) != 0 &&
      extracted.error().message.rfind(command.output, 0) != 0) {
    return tl::unexpected(with_context(std::move(extracted).error(), state.name()));
  }
  return extracted;
}

}  // namespace

int run_extract(const ExtractCommand &command) {
  // Standard output cannot hold both.
  const bool to_stdout = command.output == "-";
  const Format format = to_stdout ? Format::human : command.format;
  const auto begin = std::chrono::steady_clock::now();
  const Result<Extracted> extracted = extract(command);
  if (!extracted) {
    return report_failure("extract", extracted.error(), format);
  }
  if (to_stdout) {
    return exit_done;
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (format == Format::json) {
    return finish("extract", to_line({{"event", "completed"},
                                      {"operation", "extract"},
                                      {"as", "block"},
                                      {"block", command.block},
                                      {"layout", vmstate::layout_name(extracted->layout)},
                                      {"output", command.output},
                                      {"size", extracted->bytes},
                                      {"data-bytes", extracted->data_bytes},
                                      {"total-seconds", seconds}}));
  }
  return finish("extract",
                fmt::format("extracted '{}' to {}: {}, of which {} data, in {} ({})\n",
                            printable(command.block), printable(command.output),
                            format_size(extracted->bytes), format_size(extracted->data_bytes),
                            format_seconds(seconds), format_rate(extracted->data_bytes, seconds)));
}

}  // namespace qvmstate::tools
