// The bytes of a stream as QEMU or qvmstate wrote them, to the end of its description and no
// further.
//
// The stream is walked first: nothing else tells where it ends, and damage is found before anything
// is written.
#include <algorithm>
#include <vector>

#include "tools/disk_source.h"
#include "tools/extract_parts.h"
#include "tools/sparse_output.h"
#include "tools/stdout_writer.h"
#include "vmstate/read_ahead_source.h"
#include "vmstate/stream_reader.h"

namespace qvmstate::tools {

namespace {

constexpr uint64_t piece_bytes = 1 * mib;
constexpr size_t write_buffers = 8;

Result<std::unique_ptr<vmstate::ReadAheadSource>> read_ahead(const ExtractCommand &command,
                                                             const StateSource &state) {
  QV_ASSIGN(auto source, state.reopen(open_options(command)));
  return vmstate::ReadAheadSource::create(std::move(source));
}

/// Gives what is stored of a range to `put(offset in the range, data)`.
template <class Put>
Result<Extracted> copy(vmstate::StreamSource &source, StreamOffset start, uint64_t bytes,
                       Advance &advance, const Put &put) {
  Extracted extracted;
  extracted.bytes = bytes;
  std::vector<std::byte> piece;
  for (uint64_t at = 0; at < bytes;) {
    QV_ASSIGN(const vmstate::StreamRun run, source.run_at(start + at, bytes - at));
    const uint64_t end = at + run.bytes;
    while (run.kind != vmstate::StreamRun::Kind::zeros && at < end) {
      piece.resize(std::min(piece_bytes, end - at));
      QV_TRY(source.read(start + at, piece));
      QV_TRY(put(at, std::span<const std::byte>(piece)));
      at += piece.size();
      extracted.data_bytes += piece.size();
      QV_TRY(advance.tell(at, extracted.data_bytes));
    }
    at = end;
  }
  return extracted;
}

/// To the file or standard output.
Result<Extracted> copy_out(const ExtractCommand &command, vmstate::StreamSource &source,
                           StreamOffset start, uint64_t bytes, Advance &advance) {
  advance.expect(bytes);
  if (command.output == "-") {
    StdoutWriter out;
    QV_ASSIGN(const Extracted extracted,
              copy(source, start, bytes, advance,
                   [&](uint64_t at, auto data) { return out.write(at, data); }));
    QV_TRY(out.fill_up_to(bytes));
    return extracted;
  }
  QV_ASSIGN(const auto output, SparseOutput::create(command.output, bytes));
  QV_ASSIGN(const auto writer, SparseWriter::create(*output, open_options(command), write_buffers));
  QV_ASSIGN(const Extracted extracted,
            copy(source, start, bytes, advance,
                 [&](uint64_t at, auto data) { return writer->write(at, data); }));
  QV_TRY(writer->finish());
  QV_TRY(output->finish());
  return extracted;
}

}  // namespace

Result<Extracted> extract_stream(const ExtractCommand &command, StateSource &state,
                                 Advance &advance) {
  vmstate::StreamSummary stream;
  {
    QV_ASSIGN(const auto source, read_ahead(command, state));
    QV_ASSIGN(stream, vmstate::read_stream(*source, {}, state.start()));
  }
  QV_ASSIGN(const auto source, read_ahead(command, state));
  QV_ASSIGN(Extracted extracted,
            copy_out(command, *source, state.start(), stream.stream_bytes, advance));
  extracted.layout = vmstate::layout_name(stream.layout);
  return extracted;
}

Result<Extracted> extract_disk(const ExtractCommand &command, Advance &advance) {
  QV_ASSIGN(const auto source,
            DiskSource::open({command.path, command.name, command.offset, command.force_share}));
  return copy_out(command, *source, StreamOffset(0), source->bytes_max(), advance);
}

}  // namespace qvmstate::tools
