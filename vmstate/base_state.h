// An earlier state in the same image, in the layout stream-aligned, whose groups a new one can
// share instead of writing them again.
//
// A group is known again by its digest alone, which covers the name of its block and the numbers of
// its pages, so that nothing else of the earlier state is read.
//
// Threads: one at a time.
#pragma once

#include <cstdint>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "qcow2/image.h"
#include "qcow2/io/result.h"
#include "qcow2/vmstate_area.h"
#include "vmstate/state_checksum.h"

namespace qvmstate::vmstate {

/// What a state must have to be the base of another one in its image, or why it has not. Looks at
/// the snapshot's entry only.
Result<StateChecksum> check_base(const qcow2::Image &image, const qcow2::Snapshot &snapshot);

/// The digests that are kept behind the stream, if they are those of the checksum.
Result<std::vector<Digest>> read_kept_digests(const qcow2::Image &image,
                                              const qcow2::Snapshot &snapshot,
                                              const StateChecksum &checksum);

class BaseState {
 public:
  /// `area` has the base's clusters (ImageEdit::hold_vmstate) and outlives this.
  BaseState(const StateChecksum &checksum, std::span<const Digest> digests,
            qcow2::VmstateArea &area);

  /// Whether the base has this group and its clusters can be shared; then they are.
  bool share(const Digest &digest);
  uint64_t shared_pieces() const { return shared_.size(); }
  /// What is shared follows in the stream, in the order of the calls.
  Result<void> place();

 private:
  struct DigestHash {
    size_t operator()(const Digest &digest) const {
      size_t word;
      std::memcpy(&word, digest.data(), sizeof word);
      return word;
    }
  };

  qcow2::VmstateArea &area_;
  uint64_t piece_bytes_;
  std::unordered_map<Digest, uint64_t, DigestHash> piece_of_;
  std::vector<uint64_t> shared_;  // pieces of the base
};

}  // namespace qvmstate::vmstate
