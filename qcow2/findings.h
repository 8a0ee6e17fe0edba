// What a check finds: counted exactly, described up to a bound.
//
// Threads: one at a time.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace qvmstate::qcow2 {

enum class FindingKind : uint8_t {
  leak,     ///< clusters that nothing uses: space is lost, and nothing else
  damage,   ///< something contradicts the format, or is not what was saved
  refusal,  ///< valid, but QEMU will not load it
  note,     ///< nothing wrong, but good to know
};

struct Finding {
  FindingKind kind;
  std::string message;
};

class Findings {
 public:
  static constexpr size_t described_max = 200;  ///< of each kind; others are only counted

  /// `count`: of clusters, entries or pages that it is about.
  void add(FindingKind kind, std::string message, uint64_t count = 1) {
    counts_[static_cast<size_t>(kind)] += count;
    if (described_[static_cast<size_t>(kind)]++ < described_max) {
      list_.push_back({kind, std::move(message)});
    }
  }
  const std::vector<Finding> &list() const { return list_; }
  uint64_t count(FindingKind kind) const { return counts_[static_cast<size_t>(kind)]; }
  /// Findings of the kind that are not in the list.
  uint64_t left_out(FindingKind kind) const {
    const uint64_t all = described_[static_cast<size_t>(kind)];
    return all - std::min<uint64_t>(all, described_max);
  }

 private:
  std::vector<Finding> list_;
  std::array<uint64_t, 4> counts_ = {};
  std::array<uint64_t, 4> described_ = {};
};

}  // namespace qvmstate::qcow2
