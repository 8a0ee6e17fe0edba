// Reads what an L1 table maps through libqcow, which shares no line with this project.
//
// libqcow knows neither snapshots nor vmstate. It is shown the file through an I/O handle of ours
// that puts another L1 table into the header, and a disk size that covers the whole table: then any
// snapshot, its vmstate area included, is ordinary disk data. Backing files are hidden, so
// unallocated clusters read as zeros. libqcow refuses extended L2 and zstd images, and (in
// 20201213) does not know the zero flag: of a cluster that has it, it reads whatever is at the
// entry's host offset.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "qcow2/io/offsets.h"
#include "qcow2/io/result.h"

namespace qvmstate::tools {

/// Threads: one at a time.
class LibqcowReader {
 public:
  /// `l1_entries` entries at `l1_offset` of the image at `path`, which messages call `shown_name`
  /// if it is not empty.
  static Result<LibqcowReader> open(const std::string &path, HostOffset l1_offset,
                                    uint32_t l1_entries, const std::string &shown_name = {});
  LibqcowReader(LibqcowReader &&) noexcept;
  LibqcowReader &operator=(LibqcowReader &&) noexcept;
  ~LibqcowReader();

  Result<void> read(GuestOffset offset, std::span<std::byte> to);

 private:
  struct State;
  explicit LibqcowReader(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace qvmstate::tools
