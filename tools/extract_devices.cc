// The device sections of a state as JSON, one a line, decoded where something says what they hold.
//
// Sections are dealt with one after the other, so memory does not depend on how many there are;
// what is too large for a device's fields comes as hexadecimal, in pieces.
#include <algorithm>
#include <string_view>
#include <vector>

#include "tools/extract_parts.h"
#include "tools/output.h"
#include "tools/sparse_output.h"
#include "vmstate/section_decoder.h"
#include "vmstate/stream_reader.h"

namespace qvmstate::tools {

namespace {

constexpr uint64_t decoded_bytes_max = 4 * mib;
constexpr uint64_t piece_bytes = 1 * mib;

std::string dump(const vmstate::DecodedJson &json) {
  return json.dump(-1, ' ', false, vmstate::DecodedJson::error_handler_t::replace);
}

/// Gives the document to `put(text)`.
template <class Put>
Result<void> write_document(StateSource &state, const vmstate::StreamSummary &stream,
                            Advance &advance, const Put &put) {
  vmstate::DecodedJson about = {{"machine-type", stream.machine_type},
                                {"layout", vmstate::layout_name(stream.layout)},
                                {"page-size", stream.page_bytes},
                                {"capabilities", stream.capabilities}};
  if (stream.target_page_bits) {
    about["target-page-bits"] = *stream.target_page_bits;
  }
  std::string text = dump(about);
  text.back() = ',';
  QV_TRY(put(text + "\n\"devices\": [\n"));
  const vmstate::SectionDecoder decoder(stream);
  std::vector<std::byte> body;
  uint64_t done_bytes = 0;
  bool first = true;
  for (const vmstate::StreamSection &section : stream.devices) {
    QV_TRY(put(first ? "" : ",\n"));
    first = false;
    const bool is_large = section.bytes > decoded_bytes_max;
    body.resize(is_large ? 0 : section.bytes);
    QV_TRY(state.stream().read(StreamOffset(section.offset), body));
    std::string line = dump(decoder.decode(section, body));
    if (is_large) {
      line.resize(line.find("\"size\":"));
      QV_TRY(put(line + "\"size\":" + std::to_string(section.bytes) + ",\"raw\":\""));
      for (uint64_t at = 0; at < section.bytes; at += body.size()) {
        body.resize(std::min(piece_bytes, section.bytes - at));
        QV_TRY(state.stream().read(StreamOffset(section.offset + at), body));
        QV_TRY(put(vmstate::to_hex(body)));
      }
      line = "\"}";
    }
    QV_TRY(put(line));
    done_bytes += section.bytes;
    QV_TRY(advance.tell(done_bytes, done_bytes));
  }
  return put("\n]}\n");
}

}  // namespace

Result<Extracted> extract_devices(const ExtractCommand &command, StateSource &state,
                                  Advance &advance) {
  QV_ASSIGN(const vmstate::StreamSummary stream,
            vmstate::read_stream(state.stream(), {}, state.start()));
  Extracted extracted;
  extracted.layout = vmstate::layout_name(stream.layout);
  if (command.output == "-") {
    QV_TRY(write_document(state, stream, advance, write_stdout));
    return extracted;
  }
  QV_ASSIGN(const auto output, SparseOutput::create(command.output, 0));
  QV_ASSIGN(const auto writer,
            SparseWriter::create(*output, open_options(command), io::buffer_count_min));
  QV_TRY(write_document(state, stream, advance, [&](std::string_view text) {
    auto written = writer->write(extracted.bytes, std::as_bytes(std::span(text)));
    extracted.bytes += text.size();
    return written;
  }));
  QV_TRY(writer->finish());
  QV_TRY(output->finish());
  extracted.data_bytes = extracted.bytes;
  return extracted;
}

}  // namespace qvmstate::tools
