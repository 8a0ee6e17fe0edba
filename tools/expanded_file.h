// A compressed stream made readable anywhere: expanded to a file without a name.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "qcow2/io/file.h"
#include "qcow2/io/result.h"

namespace qvmstate::tools {

enum class FileCompression { none, gzip, zstd };

/// What the first bytes at `offset` say.
Result<FileCompression> compression_at(io::File &file, uint64_t offset);

/// All from `offset` to the end, expanded to a file in `folder`, which goes away with the result.
Result<std::unique_ptr<io::File>> expanded_file(io::File &file, uint64_t offset,
                                                FileCompression compression,
                                                const std::string &folder);

}  // namespace qvmstate::tools
