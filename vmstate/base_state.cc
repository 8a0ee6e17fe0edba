#include "vmstate/base_state.h"

#include <algorithm>
#include <span>
#include <string>

#include "qcow2/cluster_reader.h"
#include "vmstate/aligned_group.h"

namespace qvmstate::vmstate {
namespace {

std::string named(const qcow2::Image &image, const qcow2::Snapshot &snapshot) {
  return image.name() + ": snapshot '" + snapshot.name + "'";
}

}  // namespace

Result<StateChecksum> check_base(const qcow2::Image &image, const qcow2::Snapshot &snapshot) {
  if (snapshot.vmstate_bytes == 0) {
    return fail(ErrorCode::not_supported,
                named(image, snapshot) + " has no VM state in this image and cannot be a base");
  }
  const auto checksum = parse_checksum(snapshot.more_extra);
  if (!checksum || checksum->kept_offset == 0 ||
      checksum->piece_bytes != std::max(group_bytes_min, image.geometry().cluster_bytes())) {
    return fail(ErrorCode::not_supported,
                named(image, snapshot) +
                    " cannot be a base: it was not saved with --layout stream-aligned; save a "
                    "first one with that, and later ones with --base");
  }
  return *checksum;
}

Result<std::vector<Digest>> read_kept_digests(const qcow2::Image &image,
                                              const qcow2::Snapshot &snapshot,
                                              const StateChecksum &checksum) {
  const auto damaged = [&](const std::string &why) {
    return fail(ErrorCode::bad_image, named(image, snapshot) +
                                          " cannot be a base: the digests of its groups " + why +
                                          "; save with --layout stream-aligned and without --base");
  };
  QV_ASSIGN(const uint64_t file_bytes, image.file().size());
  qcow2::VmstateReader reader(image, snapshot);
  const uint64_t bytes = checksum.pieces() * sizeof(Digest);
  // Each piece has clusters of its own, so that the file is longer than all of them.
  if (checksum.stream_bytes > file_bytes || bytes > file_bytes ||
      checksum.kept_offset < checksum.stream_bytes ||
      checksum.kept_offset > reader.mapped_bytes() ||
      bytes > reader.mapped_bytes() - checksum.kept_offset) {
    return damaged("do not lie in the image");
  }
  std::vector<Digest> digests(checksum.pieces());
  const std::span<std::byte> raw = std::as_writable_bytes(std::span(digests));
  QV_TRY(reader.read(StreamOffset(checksum.kept_offset), raw));
  if (PieceDigest::of(raw) != checksum.digest) {
    return damaged("are others than those it was saved with");
  }
  return digests;
}

BaseState::BaseState(const StateChecksum &checksum, std::span<const Digest> digests,
                     qcow2::VmstateArea &area)
    : area_(area), piece_bytes_(checksum.piece_bytes) {
  const std::span<const Digest> whole =
      digests.first(std::min<uint64_t>(digests.size(), checksum.stream_bytes / piece_bytes_));
  piece_of_.reserve(whole.size());
  for (size_t i = 0; i < whole.size(); ++i) {
    piece_of_.emplace(whole[i], i);
  }
}

bool BaseState::share(const Digest &digest) {
  const auto found = piece_of_.find(digest);
  if (found == piece_of_.end() ||
      !area_.can_share(StreamOffset(found->second * piece_bytes_), piece_bytes_)) {
    return false;
  }
  shared_.push_back(found->second);
  piece_of_.erase(found);  // each once, as its clusters are held once
  return true;
}

Result<void> BaseState::place() {
  for (const uint64_t piece : shared_) {
    QV_TRY(area_.share(StreamOffset(piece * piece_bytes_), piece_bytes_));
  }
  return {};
}

}  // namespace qvmstate::vmstate
