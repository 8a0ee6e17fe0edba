// The input is a qcow2 file. Opening it, reading its snapshots' vmstates, and adding a snapshot
// must neither crash nor take long; an image that takes the snapshot must open again and list it,
// and one that refuses it must keep its header.

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include "qcow2/cluster_reader.h"
#include "qcow2/image.h"
#include "qcow2/image_edit.h"
#include "qcow2/io/file.h"
#include "qcow2/io/memory_backend.h"
#include "qcow2/suitability.h"

namespace {

using namespace qvmstate;

constexpr uint64_t file_bytes_max = 256 * mib;  // a small file may tell of a huge one
constexpr size_t header_bytes = 104;
constexpr size_t vmstates_read_max = 4;

/// A disk that is full at file_bytes_max.
class SmallDisk : public io::MemoryBackend {
 public:
  using MemoryBackend::MemoryBackend;
  int start(const io::BackendOp &op) override {
    return fits(op.offset, op.bytes) ? MemoryBackend::start(op) : -ENOSPC;
  }
  int64_t write_some(const void *data, size_t bytes, uint64_t offset) override {
    return fits(offset, bytes) ? MemoryBackend::write_some(data, bytes, offset) : -ENOSPC;
  }
  int resize(uint64_t bytes) override {
    return fits(0, bytes) ? MemoryBackend::resize(bytes) : -ENOSPC;
  }
  int preallocate(uint64_t offset, uint64_t bytes) override {
    return fits(offset, bytes) ? MemoryBackend::preallocate(offset, bytes) : -ENOSPC;
  }

 private:
  static bool fits(uint64_t offset, uint64_t bytes) {
    return offset <= file_bytes_max && bytes <= file_bytes_max - offset;
  }
};

void require(bool condition) {
  if (!condition) {
    abort();
  }
}

void read_vmstates(const qcow2::Image &image) {
  std::array<std::byte, 4096> data;
  const size_t count = std::min(image.snapshots().size(), vmstates_read_max);
  for (size_t i = 0; i < count; ++i) {
    qcow2::VmstateReader reader(image, image.snapshots()[i]);
    for (const uint64_t offset : {uint64_t{0}, uint64_t{5000}, reader.mapped_bytes() / 2}) {
      if (offset <= reader.mapped_bytes() && reader.mapped_bytes() - offset >= data.size()) {
        (void)reader.read(StreamOffset(offset), data);
        (void)reader.extent_at(StreamOffset(offset));
      }
    }
  }
}

Result<void> add_snapshot(qcow2::Image &image, bool &committed) {
  QV_TRY(qcow2::check_image_suits(image, qcow2::ImageRole::disk_only));
  QV_ASSIGN(const std::unique_ptr<qcow2::ImageEdit> edit, qcow2::ImageEdit::begin(image));
  qcow2::NewSnapshot snapshot;
  snapshot.name = "fuzz";
  Result<void> done = edit->add_snapshot(snapshot);
  if (done) {
    done = edit->commit(0);
  }
  committed = edit->committed();
  return done;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const auto *bytes = reinterpret_cast<const std::byte *>(data);
  auto backend = std::make_unique<SmallDisk>(std::vector<std::byte>(bytes, bytes + size));
  const SmallDisk &disk = *backend;
  io::File file(std::move(backend), "fuzz.qcow2", 4);
  Result<qcow2::Image> image = qcow2::Image::open(file);
  if (!image) {
    return 0;
  }
  read_vmstates(*image);
  const size_t snapshots_before = image->snapshots().size();
  bool committed = false;
  const Result<void> added = add_snapshot(*image, committed);
  if (!committed) {
    require(!added);
    require(disk.contents().size() >= std::min(size, header_bytes));
    require(std::memcmp(disk.contents().data(), data, std::min(size, header_bytes)) == 0);
  } else if (added) {
    const Result<qcow2::Image> again = qcow2::Image::open(file);
    require(again.has_value());
    require(again->snapshots().size() == snapshots_before + 1);
    require(again->snapshots().back().name == "fuzz");
  }
  return 0;
}
