#include "tools/stdout_writer.h"

#include <algorithm>
#include <string>

#include "qcow2/io/offsets.h"
#include "tools/output.h"

namespace qvmstate::tools {

namespace {

constexpr size_t zeros_bytes = 64 * kib;

}  // namespace

Result<void> StdoutWriter::write(uint64_t offset, std::span<const std::byte> data) {
  if (offset < position_) {
    return fail(ErrorCode::not_supported,
                "RAM does not come in the order in which it is to be written (a page was sent more "
                "than once, or blocks lie in another order), and standard output cannot be written "
                "out of order: extract to a file with -o FILE");
  }
  QV_TRY(fill_up_to(offset));
  position_ += data.size();
  return write_stdout({reinterpret_cast<const char *>(data.data()), data.size()});
}

Result<void> StdoutWriter::fill_up_to(uint64_t offset) {
  static const std::string zeros(zeros_bytes, '\0');
  while (position_ < offset) {
    const uint64_t part = std::min<uint64_t>(zeros_bytes, offset - position_);
    QV_TRY(write_stdout(std::string_view(zeros).substr(0, part)));
    position_ += part;
  }
  return {};
}

}  // namespace qvmstate::tools
