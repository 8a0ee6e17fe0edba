#include "edit_helpers.h"

#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>

#include "qcow2/cluster_reader.h"
#include "qcow2/io/buffer_pool.h"

namespace qvmstate::qcow2::test {
namespace {

std::string program(const char *variable, const char *otherwise) {
  const char *named = std::getenv(variable);
  return named ? named : otherwise;
}

Result<DiskView> disk_view(const Image &image, HostOffset l1_offset, uint32_t l1_entries,
                           uint64_t disk_bytes) {
  ClusterReader reader(image, l1_offset, l1_entries);
  DiskView disk;
  disk.bytes.resize(disk_bytes);
  for (uint64_t at = 0; at < disk_bytes;) {
    QV_ASSIGN(const ClusterReader::Extent extent, reader.extent_at(GuestOffset(at)));
    const uint64_t bytes = std::min(extent.bytes, disk_bytes - at);
    if (bytes == 0) {
      throw std::runtime_error("an extent of no bytes");
    }
    if (extent.kind == ClusterKind::unallocated) {
      if (!disk.unallocated.empty() &&
          disk.unallocated.back().first + disk.unallocated.back().second == at) {
        disk.unallocated.back().second += bytes;
      } else {
        disk.unallocated.emplace_back(at, bytes);
      }
    } else if (extent.kind == ClusterKind::data || extent.kind == ClusterKind::compressed) {
      QV_TRY(reader.read(GuestOffset(at), std::span(disk.bytes).subspan(at, bytes)));
    }
    at += bytes;
  }
  return disk;
}

}  // namespace

Bytes seeded_bytes(size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  Bytes bytes(count);
  for (size_t at = 0; at < count; at += 8) {
    const uint64_t word = at / 4096 % 4 == 3 ? 0 : random();
    std::memcpy(bytes.data() + at, &word, std::min<size_t>(8, count - at));
  }
  return bytes;
}

CommandResult qemu_img(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), program("QVMSTATE_QEMU_IMG", "qemu-img"));
  return run_command(arguments);
}

CommandResult qemu_io(const std::string &path, const std::vector<std::string> &commands) {
  std::vector<std::string> words{program("QVMSTATE_QEMU_IO", "qemu-io"), "-f", "qcow2"};
  for (const std::string &command : commands) {
    words.insert(words.end(), {"-c", command});
  }
  words.push_back(path);
  return run_command(words);
}

bool have_qemu_img() {
  return have_tool(program("QVMSTATE_QEMU_IMG", "qemu-img"));
}

std::string check_complaint(const std::string &path) {
  const CommandResult result = qemu_img({"check", "-f", "qcow2", path});
  if (result.status == 0 && result.output.starts_with("No errors were found on the image.")) {
    return {};
  }
  return "exit " + std::to_string(result.status) + ": " + result.output;
}

Bytes converted(const std::string &path, const std::string &snapshot) {
  const std::string to = path + ".converted";
  std::vector<std::string> arguments{"convert", "-f", "qcow2", "-O", "raw"};
  if (!snapshot.empty()) {
    arguments.insert(arguments.end(), {"-l", "snapshot.name=" + snapshot});
  }
  arguments.insert(arguments.end(), {path, to});
  const CommandResult result = qemu_img(arguments);
  if (result.status != 0) {
    throw std::runtime_error("qemu-img convert " + path + " " + snapshot + ": " + result.output);
  }
  Bytes bytes = read_file(to);
  std::filesystem::remove(to);
  return bytes;
}

Bytes qemu_vmstate(const std::string &path, const Image &image, const std::string &name,
                   uint64_t offset, uint64_t bytes) {
  const Snapshot &snapshot =
      image.snapshots().at(static_cast<size_t>(find_snapshot(image.snapshots(), name)));
  const uint64_t span_bytes = image.geometry().span_bytes();
  const std::string shown = path + ".shown";
  const std::string raw = path + ".vmstate";
  Bytes copy = read_file(path);
  store_be<uint64_t>(&copy[24], snapshot.l1_entries * span_bytes);  // virtual size
  store_be<uint32_t>(&copy[36], snapshot.l1_entries);
  store_be<uint64_t>(&copy[40], snapshot.l1_offset.value);
  write_file(shown, copy);
  offset += image.geometry().vmstate_l1_index(snapshot.disk_bytes) * span_bytes;
  const CommandResult result =
      qemu_img({"convert", "-O", "raw", "--image-opts",
                "driver=raw,offset=" + std::to_string(offset) +
                    ",size=" + std::to_string(round_up(bytes, 512)) +
                    ",file.driver=qcow2,file.file.driver=file,file.file.filename=" + shown,
                raw});
  if (result.status != 0) {
    throw std::runtime_error("qemu-img convert " + shown + ": " + result.output);
  }
  Bytes state = read_file(raw);
  state.resize(bytes);
  return state;
}

std::unique_ptr<io::File> open_writable(const std::string &path, io::Engine engine) {
  io::OpenOptions options;
  options.writable = true;
  options.engine = engine;
  auto file = io::File::open(path, options);
  if (!file) {
    throw std::runtime_error(file.error().message);
  }
  return std::move(*file);
}

Result<void> write_stream(io::File &file, io::Placement &placement,
                          std::span<const std::byte> stream, size_t buffer_bytes) {
  QV_ASSIGN(io::BufferPool pool, io::BufferPool::create(4, buffer_bytes));
  io::StreamBuffer buffer(file, pool, placement);
  QV_TRY(buffer.put(stream));
  return buffer.finish();
}

Result<void> write_fixed_stream(io::File &file, VmstateArea &area,
                                std::span<const std::byte> stream) {
  constexpr uint64_t page_bytes = 4096;
  constexpr uint64_t part_bytes = 1 * mib;
  const Bytes zeros(page_bytes);
  for (uint64_t part = divide_up(stream.size(), part_bytes); part-- > 0;) {
    const uint64_t end = std::min<uint64_t>(stream.size(), (part + 1) * part_bytes);
    std::vector<io::StreamRange> ranges;
    for (uint64_t at = part * part_bytes; at < end; at += page_bytes) {
      const uint64_t bytes = std::min(page_bytes, end - at);
      if (std::memcmp(&stream[at], zeros.data(), bytes) == 0) {
        continue;
      }
      if (!ranges.empty() && ranges.back().from.value + ranges.back().bytes == at) {
        ranges.back().bytes += bytes;
      } else {
        ranges.push_back({StreamOffset(at), bytes});
      }
    }
    std::vector<io::HostRun> runs;
    QV_TRY(area.place_at(ranges, runs));
    auto run = runs.begin();
    for (const io::StreamRange &range : ranges) {
      for (uint64_t done = 0; done < range.bytes; done += run++->bytes) {
        QV_TRY(file.write_at(stream.subspan(range.from.value + done, run->bytes), run->offset));
      }
    }
  }
  return area.finish_fixed(stream.size());
}

Result<void> save_sharing(Image &image, const std::string &name, const SharedStream &stream,
                          bool replace, uint32_t date_seconds) {
  NewSnapshot snapshot;
  snapshot.name = name;
  snapshot.date_seconds = date_seconds;
  QV_ASSIGN(auto set, SetSave::begin({&image}, 0, snapshot, replace,
                                     SetBase{stream.base, stream.from + stream.bytes}));
  QV_ASSIGN(io::BufferPool pool, io::BufferPool::create(io::buffer_count_min, 64 * kib));
  io::StreamBuffer out(image.file(), pool, set->vmstate());
  QV_TRY(out.put(stream.head));
  QV_TRY(out.skip(stream.bytes));
  QV_TRY(set->vmstate().share(StreamOffset(stream.from), stream.bytes));
  QV_TRY(out.put(stream.tail));
  const uint64_t stream_bytes = out.tell();
  QV_TRY(out.finish());
  QV_TRY(image.file().sync());
  return set->commit(stream_bytes);
}

Result<void> save(Image &image, const std::string &name, std::span<const std::byte> stream,
                  const SaveOptions &options) {
  NewSnapshot snapshot;
  snapshot.name = name;
  snapshot.date_seconds = options.date_seconds;
  snapshot.clock_nanos = 5'000'000'000;
  QV_TRY(check_save_name({&image}, name, options.replace));
  QV_ASSIGN(auto edit, ImageEdit::begin(image));
  const int old = find_snapshot(image.snapshots(), name);
  if (old >= 0) {
    QV_TRY(edit->remove_snapshot(static_cast<size_t>(old)));
  }
  QV_TRY(edit->add_snapshot(snapshot));
  if (!stream.empty()) {
    edit->expect_stream_bytes(stream.size());
    QV_TRY(options.fixed
               ? write_fixed_stream(image.file(), edit->vmstate(), stream)
               : write_stream(image.file(), edit->vmstate(), stream, options.buffer_bytes));
  }
  return edit->commit(stream.size());
}

namespace {

Result<void> finish_two_steps(const std::vector<Image *> &images, const Reservation &reservation,
                              bool replace, std::span<const std::byte> stream) {
  const Image &image = *images[reservation.primary];
  ReservedArea area(reservation.runs, image.geometry(), image.name());
  QV_TRY(write_stream(image.file(), area, stream, 64 * kib));
  QV_TRY(image.file().sync());
  QV_ASSIGN(const auto set, SetSave::begin_finish(images, reservation, replace, stream.size()));
  return set->commit(stream.size());
}

}  // namespace

Result<void> save_in_two_steps(const std::vector<Image *> &images, size_t primary,
                               const NewSnapshot &snapshot, bool replace,
                               std::span<const std::byte> stream) {
  const uint64_t reserved_bytes = stream.size() + 100 * kib;
  QV_ASSIGN(const Reservation reservation,
            reserve_set(images, primary, snapshot, replace, reserved_bytes));
  auto done = finish_two_steps(images, reservation, replace, stream);
  if (!done) {
    QV_TRY(drop_reservation(images, snapshot.name));
  }
  return done;
}

Result<void> remove(Image &image, const std::string &name, bool give_back_space) {
  const int index = find_snapshot(image.snapshots(), name);
  if (index < 0) {
    return fail(ErrorCode::not_found, name);
  }
  QV_ASSIGN(auto edit, ImageEdit::begin(image));
  QV_TRY(edit->remove_snapshot(static_cast<size_t>(index)));
  QV_TRY(edit->commit(0));
  if (give_back_space) {
    edit->give_back_space();
  }
  return {};
}

Result<void> rename(Image &image, const std::string &name, const std::string &to) {
  const int index = find_snapshot(image.snapshots(), name);
  if (index < 0) {
    return fail(ErrorCode::not_found, name);
  }
  QV_ASSIGN(auto edit, ImageEdit::begin(image));
  QV_TRY(edit->rename_snapshot(static_cast<size_t>(index), to));
  return edit->commit(0);
}

Result<ImageView> view(const Image &image) {
  ImageView seen;
  const Header &header = image.header();
  QV_ASSIGN(seen.active, disk_view(image, header.l1_offset, header.l1_entries, header.disk_bytes));
  for (const Snapshot &snapshot : image.snapshots()) {
    SnapshotView &entry = seen.snapshots[snapshot.name];
    if (!entry.id.empty()) {
      throw std::runtime_error("two snapshots are named " + snapshot.name);
    }
    QV_ASSIGN(entry.disk,
              disk_view(image, snapshot.l1_offset, snapshot.l1_entries, snapshot.disk_bytes));
    entry.vmstate.resize(snapshot.vmstate_bytes);
    if (!entry.vmstate.empty()) {
      VmstateReader reader(image, snapshot);
      QV_TRY(reader.read(StreamOffset(0), entry.vmstate));
    }
    entry.id = snapshot.id;
    entry.date_seconds = snapshot.date_seconds;
    entry.more_extra = snapshot.more_extra;
  }
  return seen;
}

Bytes tiny_image(const std::vector<uint16_t> &counts) {
  Bytes bytes(counts.size() * 512);
  const auto put32 = [&](size_t at, uint32_t value) { store_be(bytes.data() + at, value); };
  const auto put64 = [&](size_t at, uint64_t value) { store_be(bytes.data() + at, value); };
  put32(0, 0x514649fb);     // magic
  put32(4, 2);              // version
  put32(20, 9);             // cluster bits
  put64(24, 32 * kib);      // disk size: one L1 entry
  put32(36, 1);             // L1 entries
  put64(40, 3 * 512);       // L1 table
  put64(48, 1 * 512);       // refcount table
  put32(56, 1);             // its clusters
  put64(1 * 512, 2 * 512);  // the refcount block
  for (size_t i = 0; i < counts.size(); ++i) {
    store_be<uint16_t>(bytes.data() + 2 * 512 + i * 2, counts[i]);
  }
  return bytes;
}

MemoryImage::MemoryImage(Bytes contents, io::MemoryOptions options) {
  auto owned = std::make_unique<io::MemoryBackend>(std::move(contents), std::move(options));
  backend = owned.get();
  file = std::make_unique<io::File>(std::move(owned), "disk.qcow2", 4);
  auto opened = Image::open(*file);
  if (!opened) {
    throw std::runtime_error(opened.error().message);
  }
  image = std::make_unique<Image>(std::move(*opened));
}

Bytes fixture(const std::string &name) {
  return read_file(std::string(QVMSTATE_SOURCE_DIR) + "/fixtures/" + name);
}

Result<Bytes> vmstate_of(const Image &image, const std::string &name) {
  const int index = find_snapshot(image.snapshots(), name);
  if (index < 0) {
    return fail(ErrorCode::not_found, name);
  }
  const Snapshot &snapshot = image.snapshots()[static_cast<size_t>(index)];
  Bytes bytes(snapshot.vmstate_bytes);
  VmstateReader reader(image, snapshot);
  QV_TRY(reader.read(StreamOffset(0), bytes));
  return bytes;
}

}  // namespace qvmstate::qcow2::test
