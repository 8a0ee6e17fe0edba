// export: the VM state of a snapshot as a file that QEMU (`-incoming file:FILE`, or exec:"cat
// FILE") or libvirt (`virsh restore FILE`) loads.
//
// The file is written under a temporary name and appears when it is complete.
#include <fmt/format.h>

#include <chrono>
#include <fstream>
#include <iterator>
#include <utility>

#include "qcow2/io/file_placement.h"
#include "tools/commands.h"
#include "tools/format.h"
#include "tools/libvirt_save.h"
#include "tools/sparse_output.h"
#include "tools/state_source.h"
#include "tools/state_work.h"
#include "vmstate/read_ahead_source.h"

namespace qvmstate::tools {

namespace {

struct Exported {
  vmstate::Layout layout = vmstate::Layout::legacy;
  uint64_t file_bytes = 0;
};

/// What comes before the stream in the file.
Result<std::vector<std::byte>> head_of(const ExportCommand &command, vmstate::Layout layout) {
  if (!command.as_libvirt_save) {
    return std::vector<std::byte>();
  }
  std::ifstream file(command.xml, std::ios::binary);
  std::string xml((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file.good() && !file.eof()) {
    return fail_errno(errno, command.xml + ": cannot be read");
  }
  if (xml.find("<domain") == std::string::npos) {
    return fail(ErrorCode::bad_argument,
                command.xml + ": is not the XML of a domain; `virsh dumpxml` prints it");
  }
  return format_libvirt_save(
      layout == vmstate::Layout::mapped_ram ? LibvirtFormat::sparse : LibvirtFormat::raw, xml);
}

Result<Exported> export_state(const ExportCommand &command) {
  QV_ASSIGN(const OpenImage opened, open_image(command.image, false, !command.force_share));
  QV_ASSIGN(const CheckedSnapshot state, checked_snapshot(opened.image, command.name));
  Exported exported;
  exported.layout = command.layout.value_or(state.stream.layout);
  QV_ASSIGN(const std::vector<std::byte> head, head_of(command, exported.layout));
  QV_ASSIGN(const auto output, SparseOutput::create(command.output, 0));
  io::OpenOptions options;
  options.writable = true;
  options.direct = io::DirectMode::off;
  QV_ASSIGN(const auto file, io::File::open(output->open_path(), options, command.output));
  if (!head.empty()) {
    QV_TRY(file->write_at(head, HostOffset(0)));
  }
  io::FilePlacement placement(head.size());
  const vmstate::TransferTarget target = {.file = file.get(),
                                          .sequential = &placement,
                                          .fixed = &placement,
                                          .start_bytes = head.size()};
  vmstate::StreamStats stats;
  if (vmstate::can_be_copied(state.stream, exported.layout)) {
    QV_ASSIGN(auto source, state.opener());
    QV_ASSIGN(const auto ahead, vmstate::ReadAheadSource::create(std::move(source)));
    QV_ASSIGN(stats, vmstate::copy_stream(*ahead, StreamOffset(0), state.stream.stream_bytes,
                                          target, cancel_hook()));
  } else {
    QV_ASSIGN(const auto stored, stored_state(state));
    QV_ASSIGN(stats, vmstate::write_state_anew(*stored, exported.layout, target, cancel_hook()));
  }
  exported.file_bytes = head.size() + stats.stream_bytes;
  QV_TRY(file->resize(exported.file_bytes));
  QV_TRY(output->finish());
  return exported;
}

}  // namespace

int run_export(const ExportCommand &command) {
  const auto begin = std::chrono::steady_clock::now();
  const Result<Exported> exported = export_state(command);
  if (!exported) {
    return report_failure("export", exported.error(), command.format);
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (command.format == Format::json) {
    return finish("export", to_line({{"event", "completed"},
                                     {"operation", "export"},
                                     {"name", command.name},
                                     {"output", command.output},
                                     {"layout", vmstate::layout_name(exported->layout)},
                                     {"size", exported->file_bytes},
                                     {"total-seconds", seconds}}));
  }
  return finish("export",
                fmt::format("exported '{}' to {}: {} layout, {}, in {}\n", printable(command.name),
                            printable(command.output), vmstate::layout_name(exported->layout),
                            format_size(exported->file_bytes), format_seconds(seconds)));
}

}  // namespace qvmstate::tools
