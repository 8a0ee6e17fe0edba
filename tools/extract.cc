// extract: the contents of a snapshot or a VM state as a file.
//
// The file is written under a temporary name and appears when it is complete; zeros are holes.
// To standard output everything is written, in order.
#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <utility>

#include "tools/cancel.h"
#include "tools/commands.h"
#include "tools/extract_parts.h"
#include "tools/format.h"

namespace qvmstate::tools {

namespace {

const char *kind_name(ExtractKind kind) {
  switch (kind) {
    case ExtractKind::block:
      return "block";
    case ExtractKind::raw:
      return "raw";
    case ExtractKind::elf:
      return "elf";
    case ExtractKind::stream:
      return "stream";
    case ExtractKind::devices:
      return "devices";
    case ExtractKind::disk:
      return "disk";
  }
  return "";
}

Result<Extracted> extract_from(const ExtractCommand &command, StateSource &state,
                               Advance &advance) {
  switch (command.kind) {
    case ExtractKind::disk:
      break;  // it is not in the state
    case ExtractKind::devices:
      return extract_devices(command, state, advance);
    case ExtractKind::block:
    case ExtractKind::raw:
    case ExtractKind::elf:
      return extract_ram(command, state, advance);
    case ExtractKind::stream:
      return extract_stream(command, state, advance);
  }
  return Extracted();
}

Result<Extracted> extract(const ExtractCommand &command, Advance &advance) {
  if (command.kind == ExtractKind::disk) {
    return extract_disk(command, advance);
  }
  QV_ASSIGN(StateSource state,
            StateSource::open({command.path, command.name, command.offset, command.force_share}));
  auto extracted = extract_from(command, state, advance);
  if (!extracted && extracted.error().message.rfind(command.path, 0) != 0 &&
      extracted.error().message.rfind(command.output, 0) != 0) {
    return tl::unexpected(with_context(std::move(extracted).error(), state.name()));
  }
  return extracted;
}

}  // namespace

Result<void> Advance::tell(uint64_t bytes_done, uint64_t bytes_written) {
  if (cancelled_ != nullptr && *cancelled_) {
    return fail(ErrorCode::cancelled, "cancelled");
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  progress_.update({"extracting", bytes_done, total_bytes_, bytes_written, seconds});
  return {};
}

io::OpenOptions open_options(const ExtractCommand &command) {
  io::OpenOptions options;
  options.direct = command.direct;
  options.engine = command.engine;
  return options;
}

int run_extract(const ExtractCommand &command) {
  // Standard output cannot hold both.
  const bool to_stdout = command.output == "-";
  const Format format = to_stdout ? Format::human : command.format;
  const bool shows_line = format == Format::human && isatty(STDERR_FILENO) && !command.quiet;
  const auto begin = std::chrono::steady_clock::now();
  Result<Extracted> extracted;
  {
    // To standard output there is nothing to clean up.
    Advance advance(shows_line ? ProgressStyle::line : ProgressStyle::none,
                    to_stdout ? nullptr : &catch_cancel_signals());
    extracted = extract(command, advance);
  }
  if (!extracted) {
    return report_failure("extract", extracted.error(), format);
  }
  if (to_stdout || (command.quiet && format == Format::human)) {
    return exit_done;
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (format == Format::json) {
    Json event = {
        {"event", "completed"}, {"operation", "extract"}, {"as", kind_name(command.kind)}};
    if (command.kind == ExtractKind::block) {
      event["block"] = command.block;
    }
    if (*extracted->layout != '\0') {
      event["layout"] = extracted->layout;
    }
    event["output"] = command.output;
    event["size"] = extracted->bytes;
    event["data-bytes"] = extracted->data_bytes;
    event["total-seconds"] = seconds;
    return finish("extract", to_line(event));
  }
  return finish("extract", fmt::format("extracted {} to {}: {}, of which {} data, in {} ({})\n",
                                       command.kind == ExtractKind::block
                                           ? fmt::format("'{}'", printable(command.block))
                                           : kind_name(command.kind),
                                       printable(command.output), format_size(extracted->bytes),
                                       format_size(extracted->data_bytes), format_seconds(seconds),
                                       format_rate(extracted->data_bytes, seconds)));
}

}  // namespace qvmstate::tools
