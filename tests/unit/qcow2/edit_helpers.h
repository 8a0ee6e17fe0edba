// What the tests that change images share: saves and deletes as the program does them, and what an
// image holds, in a form that can be compared.
//
// Functions that can only fail through a mistake of the test throw, which fails the test.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "qcow2/image.h"
#include "qcow2/image_edit.h"
#include "qcow2/image_set.h"
#include "qcow2/io/file.h"
#include "qcow2/io/memory_backend.h"
#include "qcow2/io/result.h"
#include "qcow2/io/stream_buffer.h"
#include "test_images.h"

namespace qvmstate::qcow2::test {

/// Incompressible bytes that differ between seeds; every fourth 4 KiB page is zero.
Bytes seeded_bytes(size_t count, uint64_t seed);

/// The program and its arguments, where $QVMSTATE_QEMU_IMG and $QVMSTATE_QEMU_IO may name others
/// than those in PATH.
CommandResult qemu_img(std::vector<std::string> arguments);
/// The commands on one image, `options` before its name.
CommandResult qemu_io(const std::string &path, const std::vector<std::string> &commands);
bool have_qemu_img();

/// Empty if `qemu-img check` exits 0 and found nothing; otherwise what it said.
std::string check_complaint(const std::string &path);
/// As `qemu-img convert` reads the active disk, or, with a name, that of a snapshot.
Bytes converted(const std::string &path, const std::string &snapshot = {});

/// A part of a VM state as QEMU's tool reads it: in a copy whose header shows the L1 table of the
/// snapshot, and a disk that covers all of it, the state is ordinary disk data at its offset.
Bytes qemu_vmstate(const std::string &path, const Image &image, const std::string &name,
                   uint64_t offset, uint64_t bytes);

/// Opens for an edit; throws where that fails.
std::unique_ptr<io::File> open_writable(const std::string &path,
                                        io::Engine engine = io::Engine::automatic);

/// Writes `stream` through buffers of `buffer_bytes` to where `placement` says.
Result<void> write_stream(io::File &file, io::Placement &placement,
                          std::span<const std::byte> stream, size_t buffer_bytes = 1 * mib);

/// Writes the pages of `stream` that are not zero to fixed places, the last 1 MiB of it first.
Result<void> write_fixed_stream(io::File &file, VmstateArea &area,
                                std::span<const std::byte> stream);

/// A stream of which a part is shared with the VM state of another snapshot.
struct SharedStream {
  std::string base;  ///< name of that snapshot
  Bytes head;        ///< written; ends at a cluster's end
  uint64_t from = 0;
  uint64_t bytes = 0;  ///< of the base's stream from there on, between ends of clusters
  Bytes tail;          ///< written
};
/// As save() below, with or without replacing a snapshot of that name.
Result<void> save_sharing(Image &image, const std::string &name, const SharedStream &stream,
                          bool replace, uint32_t date_seconds = 1700000000);

struct SaveOptions {
  bool replace = false;
  bool fixed = false;  ///< write_fixed_stream instead of write_stream
  uint32_t date_seconds = 1700000000;
  size_t buffer_bytes = 1 * mib;
};
/// One image: a snapshot of the disk, with a vmstate unless `stream` is empty.
Result<void> save(Image &image, const std::string &name, std::span<const std::byte> stream,
                  const SaveOptions &options = {});
/// The stream, into `images[primary]`, between a first and a second switch of each image.
Result<void> save_in_two_steps(const std::vector<Image *> &images, size_t primary,
                               const NewSnapshot &snapshot, bool replace,
                               std::span<const std::byte> stream);
Result<void> remove(Image &image, const std::string &name, bool give_back_space = false);
Result<void> rename(Image &image, const std::string &name, const std::string &to);

/// What can be read of one disk: its bytes, and in which runs of clusters it lets a backing file
/// show through.
struct DiskView {
  Bytes bytes;
  std::vector<std::pair<uint64_t, uint64_t>> unallocated;  ///< offset, bytes
  bool operator==(const DiskView &) const = default;
};
struct SnapshotView {
  DiskView disk;
  Bytes vmstate;
  std::string id;
  uint32_t date_seconds = 0;
  Bytes more_extra = {};
  bool operator==(const SnapshotView &) const = default;
};
/// Everything an image holds, as our reader sees it.
struct ImageView {
  DiskView active;
  std::map<std::string, SnapshotView> snapshots;
  bool operator==(const ImageView &) const = default;
};
Result<ImageView> view(const Image &image);

/// The smallest image, written by hand: version 2, clusters of 512 bytes, 16-bit refcounts. Header,
/// refcount table, one refcount block (256 counts) and an empty L1 table of one entry lie in
/// clusters 0 to 3, whose counts come first in `counts`; the file reaches to the last of these.
Bytes tiny_image(const std::vector<uint16_t> &counts);

/// An image in memory, opened.
struct MemoryImage {
  explicit MemoryImage(Bytes contents, io::MemoryOptions options = {});
  const Bytes &contents() const { return backend->contents(); }

  io::MemoryBackend *backend;
  std::unique_ptr<io::File> file;
  std::unique_ptr<Image> image;
};

/// Bytes of an image in fixtures/.
Bytes fixture(const std::string &name);

/// Bytes of the vmstate of `name`, as long as the snapshot table says.
Result<Bytes> vmstate_of(const Image &image, const std::string &name);

}  // namespace qvmstate::qcow2::test
