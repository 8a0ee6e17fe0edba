// The head of a file that libvirt's `virsh save` writes: a header, the domain's XML, perhaps a
// cookie and padding; the stream of QEMU follows, compressed or not.
//
// Integers are in the order of the host that wrote it; a version that is too large says that the
// order is the other one. Source of the facts: libvirt src/qemu/qemu_saveimage.h and .c.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "qcow2/io/file.h"
#include "qcow2/io/result.h"

namespace qvmstate::tools {

/// The numbers that the header has for them.
enum class LibvirtFormat : uint32_t {
  raw = 0,
  gzip = 1,
  bzip2 = 2,
  xz = 3,
  lzop = 4,
  zstd = 5,
  sparse = 6,  ///< mapped-ram, whose offsets count from the start of the file
};

struct LibvirtSave {
  LibvirtFormat format = LibvirtFormat::raw;
  std::string xml;
  uint64_t stream_offset = 0;  ///< of what follows the head
};

/// Nothing if the file is none; an error if it is one that cannot be read.
Result<std::optional<LibvirtSave>> read_libvirt_save(io::File &file);

/// The head for a stream of that format; of a domain that was running. As libvirt does it leaves
/// 64 KiB for a longer XML; its length is a multiple of 4096.
Result<std::vector<std::byte>> format_libvirt_save(LibvirtFormat format, const std::string &xml);

}  // namespace qvmstate::tools
