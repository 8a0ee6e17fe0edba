#include "tools/disk_source.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <optional>
#include <string_view>
#include <utility>

#include "qcow2/io/endian.h"

namespace qvmstate::tools {

namespace {

constexpr size_t layers_max = 256;  // a chain that leads into itself ends
constexpr uint32_t extension_backing_format = 0xe2792aca;

/// "qcow2" or "raw" as the image says, or empty.
std::string backing_format(const qcow2::Header &header) {
  const qcow2::HeaderExtension *const extension = header.extension(extension_backing_format);
  if (extension == nullptr) {
    return {};
  }
  return {reinterpret_cast<const char *>(extension->data.data()), extension->data.size()};
}

/// Where the backing file of the image at `path` lies.
Result<std::string> backing_path(const std::string &path, std::string_view name) {
  if (name.starts_with("file:")) {
    name.remove_prefix(5);
  }
  // A protocol (nbd:, json:, ssh://) ends in a colon before any slash.
  const size_t colon = name.find(':');
  if (colon != std::string_view::npos && colon < name.find('/')) {
    return fail(ErrorCode::not_supported,
                path + ": its backing file '" + std::string(name) +
                    "' is not a plain file: convert the snapshot with `qemu-img convert -l`");
  }
  return (std::filesystem::path(path).parent_path() / name).string();
}

}  // namespace

Result<std::unique_ptr<DiskSource>> DiskSource::open(const StateLocation &location) {
  auto source = std::make_unique<DiskSource>();
  const bool locked = !location.force_share;
  Layer top;
  top.image = std::make_unique<OpenImage>();
  QV_ASSIGN(*top.image, open_image(location.path, false, locked));
  const qcow2::Image &image = top.image->image;
  QV_ASSIGN(const qcow2::Snapshot *const snapshot, named_snapshot(image, location.name));
  top.reader =
      std::make_unique<qcow2::ClusterReader>(image, snapshot->l1_offset, snapshot->l1_entries);
  top.bytes = snapshot->disk_bytes;
  source->layers_.push_back(std::move(top));
  std::string path = location.path;
  while (source->layers_.back().image != nullptr &&
         !source->layers_.back().image->image.header().backing_name.empty()) {
    QV_ASSIGN(path, backing_path(path, source->layers_.back().image->image.header().backing_name));
    if (source->layers_.size() >= layers_max) {
      return fail(ErrorCode::bad_image, location.path + ": more than " +
                                            std::to_string(layers_max) +
                                            " backing files; the chain may lead into itself");
    }
    QV_TRY(source->add_backing(path, locked));
  }
  return source;
}

Result<void> DiskSource::add_backing(const std::string &path, bool locked) {
  std::string format = backing_format(layers_.back().image->image.header());
  io::OpenOptions options;
  options.direct = io::DirectMode::off;
  Layer layer;
  if (format.empty()) {
    QV_ASSIGN(const auto file, io::File::open(path, options));
    std::array<std::byte, 4> magic;
    QV_TRY(file->read_or_zero_at(magic, HostOffset(0)));
    format = load_be<uint32_t>(magic.data()) == qcow2::header_magic ? "qcow2" : "raw";
  }
  if (format == "qcow2") {
    layer.image = std::make_unique<OpenImage>();
    QV_ASSIGN(*layer.image, open_image(path, false, locked));
    const qcow2::Header &header = layer.image->image.header();
    layer.reader = std::make_unique<qcow2::ClusterReader>(layer.image->image, header.l1_offset,
                                                          header.l1_entries);
    layer.bytes = header.disk_bytes;
  } else if (format == "raw" || format == "file" || format == "host_device") {
    QV_ASSIGN(auto file, io::File::open(path, options));
    if (locked) {
      QV_ASSIGN(layer.raw_lock,
                qcow2::ImageLock::take(file->descriptors(), qcow2::LockRole::stable_reader, path));
    }
    QV_ASSIGN(layer.raw, vmstate::FileSource::create(std::move(file)));
    layer.bytes = layer.raw->bytes_max();
  } else {
    return fail(ErrorCode::not_supported,
                path + ": a backing file in the format " + format +
                    " cannot be read: convert the snapshot with `qemu-img convert -l`");
  }
  layers_.push_back(std::move(layer));
  return {};
}

Result<DiskSource::Found> DiskSource::find(uint64_t offset, uint64_t bytes) {
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer &layer = layers_[i];
    if (offset >= layer.bytes) {
      return Found{true, bytes, i};
    }
    bytes = std::min(bytes, layer.bytes - offset);
    if (layer.raw != nullptr) {
      QV_ASSIGN(const vmstate::StreamRun run, layer.raw->run_at(StreamOffset(offset), bytes));
      return Found{run.kind == vmstate::StreamRun::Kind::zeros, run.bytes, i};
    }
    QV_ASSIGN(const qcow2::ClusterReader::Run run,
              layer.reader->run_at(GuestOffset(offset), bytes));
    bytes = run.bytes;
    switch (run.kind) {
      case qcow2::ClusterKind::unallocated:
        break;
      case qcow2::ClusterKind::zero:
      case qcow2::ClusterKind::zero_allocated:
        return Found{true, bytes, i};
      case qcow2::ClusterKind::data:
      case qcow2::ClusterKind::compressed:
        return Found{false, bytes, i};
    }
  }
  return Found{true, bytes, 0};
}

Result<vmstate::StreamRun> DiskSource::run_at(StreamOffset offset, uint64_t bytes) {
  QV_ASSIGN(const Found found, find(offset.value, bytes));
  return vmstate::StreamRun{
      found.is_zero ? vmstate::StreamRun::Kind::zeros : vmstate::StreamRun::Kind::other,
      found.bytes, HostOffset(0)};
}

Result<void> DiskSource::read(StreamOffset offset, std::span<std::byte> to) {
  while (!to.empty()) {
    QV_ASSIGN(const Found found, find(offset.value, to.size()));
    const std::span<std::byte> part = to.first(found.bytes);
    if (found.is_zero) {
      std::ranges::fill(part, std::byte{0});
    } else if (layers_[found.layer].raw != nullptr) {
      QV_TRY(layers_[found.layer].raw->read(offset, part));
    } else {
      QV_TRY(layers_[found.layer].reader->read(GuestOffset(offset.value), part));
    }
    offset += found.bytes;
    to = to.subspan(found.bytes);
  }
  return {};
}

}  // namespace qvmstate::tools
