// What a host's callback puts the bytes of one device section into.
#pragma once

#include <cstdint>
#include <optional>

#include "plugin/abi/failure.h"
#include "plugin/abi/section_list.h"
#include "plugin/qvmstate.h"
#include "vmstate/built_section.h"

namespace qvmstate::abi {

class Sink {
 public:
  Sink(const SectionList &list, vmstate::BuiltSection &section) : list_(list), section_(section) {}

  qvmstate_sink *handle() { return reinterpret_cast<qvmstate_sink *>(this); }
  static Sink *of(qvmstate_sink *handle) { return reinterpret_cast<Sink *>(handle); }

  /// After a failure only that.
  Outcome<void> put(const void *data, uint64_t bytes) {
    if (!failure_) {
      if (auto put = list_.put(section_, data, bytes); !put) {
        failure_ = put.error();
      }
    }
    return failure_ ? Outcome<void>(tl::unexpected(*failure_)) : Outcome<void>();
  }
  const std::optional<Failure> &failure() const { return failure_; }

 private:
  const SectionList &list_;
  vmstate::BuiltSection &section_;
  std::optional<Failure> failure_;
};

}  // namespace qvmstate::abi
