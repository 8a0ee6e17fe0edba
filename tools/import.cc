// import: a migration file, or a file that libvirt saved a domain to, as a snapshot of the disk as
// it is now with that VM state.
#include <fmt/format.h>
#include <time.h>

#include <array>
#include <chrono>
#include <filesystem>
#include <utility>
#include <vector>

#include "qcow2/image_set.h"
#include "qcow2/io/endian.h"
#include "qcow2/suitability.h"
#include "tools/commands.h"
#include "tools/expanded_file.h"
#include "tools/format.h"
#include "tools/libvirt_save.h"
#include "tools/sparse_output.h"
#include "tools/state_source.h"
#include "tools/state_work.h"
#include "vmstate/file_source.h"
#include "vmstate/read_ahead_source.h"
#include "vmstate/stream_format.h"

namespace qvmstate::tools {

namespace {

/// A stream in a file that can be read anywhere.
struct StreamFile {
  std::unique_ptr<io::File> file;
  StreamOffset start;
  std::string xml;  ///< of a domain, if the file has one
};

struct Imported {
  vmstate::Layout layout = vmstate::Layout::legacy;
  uint64_t stream_bytes = 0;
  std::string id;
};

Result<bool> begins_stream(io::File &file, uint64_t offset) {
  std::array<std::byte, 4> magic;
  QV_TRY(file.read_or_zero_at(magic, HostOffset(offset)));
  return load_be<uint32_t>(magic.data()) == vmstate::stream_magic;
}

/// Where behind the head of a libvirt save file the stream begins: at once, or at a border that a
/// host with O_DIRECT needs.
Result<uint64_t> find_stream(io::File &file, uint64_t head_end) {
  for (const uint64_t alignment : {uint64_t{1}, 512 * uint64_t{1}, 4 * kib, 64 * kib, mib}) {
    const uint64_t offset = round_up(head_end, alignment);
    QV_ASSIGN(const bool found, begins_stream(file, offset));
    if (found) {
      return offset;
    }
  }
  return fail(ErrorCode::bad_stream,
              file.name() + ": libvirt save file: no stream of QEMU follows its XML");
}

Result<StreamFile> open_stream(const ImportCommand &command) {
  StreamFile stream;
  io::OpenOptions options;
  options.direct = io::DirectMode::off;
  QV_ASSIGN(stream.file, io::File::open(command.file, options));
  if (command.offset) {
    stream.start = StreamOffset(*command.offset);
    return stream;
  }
  uint64_t offset = 0;
  QV_ASSIGN(auto save, read_libvirt_save(*stream.file));
  if (save) {
    stream.xml = std::move(save->xml);
    offset = save->stream_offset;
    switch (save->format) {
      case LibvirtFormat::raw:
      case LibvirtFormat::sparse: {
        QV_ASSIGN(offset, find_stream(*stream.file, offset));
        stream.start = StreamOffset(offset);
        return stream;
      }
      case LibvirtFormat::gzip:
      case LibvirtFormat::zstd:
        break;
      case LibvirtFormat::bzip2:
      case LibvirtFormat::xz:
      case LibvirtFormat::lzop:
        return fail(
            ErrorCode::not_supported,
            command.file + ": libvirt save file compressed with bzip2, xz or lzop: take off the " +
                fmt::format("first {} bytes and expand the rest with that program", offset));
    }
  }
  QV_ASSIGN(const FileCompression compression, compression_at(*stream.file, offset));
  if (compression != FileCompression::none) {
    const auto folder = std::filesystem::path(command.image).parent_path();
    QV_ASSIGN(stream.file, expanded_file(*stream.file, offset, compression,
                                         folder.empty() ? "." : folder.string()));
  }
  return stream;
}

Result<void> write_xml(const std::string &path, const std::string &xml) {
  if (xml.empty()) {
    return fail(ErrorCode::not_found, "the file has no XML of a domain: leave out --save-xml");
  }
  QV_ASSIGN(const auto output, SparseOutput::create(path, xml.size()));
  io::OpenOptions options;
  options.writable = true;
  options.direct = io::DirectMode::off;
  QV_ASSIGN(const auto file, io::File::open(output->open_path(), options, path));
  QV_TRY(file->write_at(std::as_bytes(std::span(xml)), HostOffset(0)));
  return output->finish();
}

Result<void> check_images(const std::vector<qcow2::Image *> &images, const ImportCommand &command) {
  const auto bitmaps = command.allow_bitmaps ? qcow2::Bitmaps::allow : qcow2::Bitmaps::refuse;
  for (size_t i = 0; i < images.size(); ++i) {
    QV_TRY(qcow2::check_image_suits(
        *images[i], i == 0 ? qcow2::ImageRole::vmstate : qcow2::ImageRole::disk_only, bitmaps));
  }
  if (qcow2::needs_recovery(images)) {
    return fail(ErrorCode::bad_state,
                "the images hold a part of a save over several disks that was interrupted; "
                "`qvmstate resume` on the running VM settles it");
  }
  return qcow2::check_save_name(images, command.name, command.replace);
}

Result<Imported> import_state(const ImportCommand &command) {
  std::vector<OpenImage> opened;
  std::vector<qcow2::Image *> images;
  std::vector<std::string> paths = {command.image};
  paths.insert(paths.end(), command.disks.begin(), command.disks.end());
  opened.reserve(paths.size());
  for (const std::string &path : paths) {
    QV_ASSIGN(OpenImage image, open_image(path, true, true));
    opened.push_back(std::move(image));
    images.push_back(&opened.back().image);
  }
  QV_TRY(check_images(images, command));
  QV_ASSIGN(const StreamFile stream, open_stream(command));
  const vmstate::SourceOpener opener = [&]() -> Result<std::unique_ptr<vmstate::StreamSource>> {
    io::OpenOptions options;
    options.direct = io::DirectMode::off;
    QV_ASSIGN(auto file, vmstate::reopen_file(*stream.file, options));
    QV_ASSIGN(auto source, vmstate::FileSource::create(std::move(file)));
    return std::unique_ptr<vmstate::StreamSource>(std::move(source));
  };
  auto state = vmstate::StoredState::open(opener, stream.start);
  if (!state) {
    return tl::unexpected(with_context(std::move(state).error(), command.file));
  }
  const vmstate::StreamSummary &summary = (*state)->summary();
  Imported imported;
  imported.layout = command.layout.value_or(summary.layout);

  qcow2::NewSnapshot snapshot;
  snapshot.name = command.name;
  timespec now = {};
  ::clock_gettime(CLOCK_REALTIME, &now);
  snapshot.date_seconds = static_cast<uint32_t>(now.tv_sec);
  snapshot.date_nanos = static_cast<uint32_t>(now.tv_nsec);
  QV_ASSIGN(snapshot.clock_nanos, vmstate::vm_clock_nanos((*state)->devices()));
  QV_ASSIGN(const auto save, qcow2::SetSave::begin(images, 0, snapshot, command.replace));
  qcow2::VmstateArea &area = save->vmstate();
  const vmstate::TransferTarget target = {.file = opened.front().file.get(),
                                          .sequential = &area,
                                          .fixed = &area,
                                          .all_pages_present = true,
                                          .checksum = true};
  vmstate::StreamStats stats;
  if (vmstate::can_be_copied(summary, imported.layout)) {
    QV_ASSIGN(auto source, opener());
    QV_ASSIGN(const auto ahead, vmstate::ReadAheadSource::create(std::move(source)));
    save->expect_stream_bytes(summary.stream_bytes);
    QV_ASSIGN(stats, vmstate::copy_stream(*ahead, stream.start, summary.stream_bytes, target,
                                          cancel_hook()));
  } else {
    area.expect_fixed_bytes(vmstate::total_bytes((*state)->blocks()));
    QV_ASSIGN(stats, vmstate::write_state_anew(**state, imported.layout, target, cancel_hook()));
  }
  if (imported.layout == vmstate::Layout::mapped_ram) {
    QV_TRY(area.finish_fixed(stats.stream_bytes));
  }
  if (!command.save_xml.empty()) {
    QV_TRY(write_xml(command.save_xml, stream.xml));
  }
  save->set_more_extra(vmstate::format_checksum(*stats.checksum));
  QV_TRY(opened.front().file->sync());
  QV_TRY(save->commit(stats.stream_bytes));
  imported.stream_bytes = stats.stream_bytes;
  imported.id = save->id(0);
  return imported;
}

}  // namespace

int run_import(const ImportCommand &command) {
  const auto begin = std::chrono::steady_clock::now();
  const Result<Imported> imported = import_state(command);
  if (!imported) {
    return report_failure("import", imported.error(), command.format);
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (command.format == Format::json) {
    return finish("import", to_line({{"event", "completed"},
                                     {"operation", "import"},
                                     {"file", command.file},
                                     {"filename", command.image},
                                     {"name", command.name},
                                     {"id", imported->id},
                                     {"layout", vmstate::layout_name(imported->layout)},
                                     {"size", imported->stream_bytes},
                                     {"total-seconds", seconds}}));
  }
  return finish("import",
                fmt::format("imported {} to {} as '{}': {} layout, {}, in {}\n",
                            printable(command.file), printable(command.image),
                            printable(command.name), vmstate::layout_name(imported->layout),
                            format_size(imported->stream_bytes), format_seconds(seconds)));
}

}  // namespace qvmstate::tools
