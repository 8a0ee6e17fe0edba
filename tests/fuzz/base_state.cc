// The input is a qcow2 file whose snapshots are taken for the base of a save, as they are and with
// digests made up here. That must neither crash nor need much memory; a save that shares clusters
// leaves an image in which no count is too small.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "qcow2/findings.h"
#include "qcow2/image.h"
#include "qcow2/image_check.h"
#include "qcow2/image_edit.h"
#include "qcow2/io/file.h"
#include "qcow2/io/memory_backend.h"
#include "qcow2/suitability.h"
#include "vmstate/base_state.h"

namespace {

using namespace qvmstate;

constexpr size_t bases_max = 4;
constexpr uint64_t pieces_max = 16;

void require(bool condition) {
  if (!condition) {
    abort();
  }
}

uint64_t damages(const qcow2::Image &image) {
  qcow2::Findings findings;
  const auto checked = qcow2::check_image(image, findings);
  return checked ? findings.count(qcow2::FindingKind::damage) : UINT64_MAX;
}

/// Saves a state of nothing but what is shared with snapshot `index`.
Result<void> share_all(qcow2::Image &image, size_t index) {
  QV_TRY(qcow2::check_image_suits(image, qcow2::ImageRole::vmstate));
  vmstate::StateChecksum checksum;
  checksum.piece_bytes = std::max(64 * kib, image.geometry().cluster_bytes());
  checksum.stream_bytes = pieces_max * checksum.piece_bytes;
  std::vector<vmstate::Digest> digests(pieces_max);
  for (size_t i = 0; i < digests.size(); ++i) {
    digests[i][0] = static_cast<std::byte>(i);
  }
  QV_ASSIGN(const auto edit, qcow2::ImageEdit::begin(image));
  QV_TRY(edit->hold_vmstate(index, checksum.stream_bytes));
  vmstate::BaseState base(checksum, digests, edit->vmstate());
  qcow2::NewSnapshot snapshot;
  snapshot.name = "fuzz";
  QV_TRY(edit->add_snapshot(snapshot));
  for (const vmstate::Digest &digest : digests) {
    (void)base.share(digest);
  }
  QV_TRY(base.place());
  return edit->commit(base.shared_pieces() * checksum.piece_bytes);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const auto *bytes = reinterpret_cast<const std::byte *>(data);
  const std::vector<std::byte> contents(bytes, bytes + size);
  for (size_t i = 0; i < bases_max; ++i) {
    io::File file(std::make_unique<io::MemoryBackend>(contents), "fuzz.qcow2", 4);
    Result<qcow2::Image> image = qcow2::Image::open(file);
    if (!image || i >= image->snapshots().size()) {
      return 0;
    }
    const qcow2::Snapshot &snapshot = image->snapshots()[i];
    if (const auto checksum = vmstate::check_base(*image, snapshot)) {
      (void)vmstate::read_kept_digests(*image, snapshot, *checksum);
    }
    const bool was_sound = damages(*image) == 0;
    if (share_all(*image, i) && was_sound) {
      require(damages(*image) == 0);
    }
  }
  return 0;
}
