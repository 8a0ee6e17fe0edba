#include "tools/libqcow_reader.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cstring>

// Debian's libqcow.h leaves its functions on I/O handles undeclared unless told of libbfio.
#define HAVE_LIBBFIO 1
#include <libbfio.h>
#include <libqcow.h>

#include "qcow2/geometry.h"
#include "qcow2/header.h"

namespace qvmstate::tools {
namespace {

using qcow2::RawHeader;

/// The file with another header, as libbfio sees it. Callbacks follow libbfio's conventions: 1 or a
/// count is success, -1 an error.
struct Overlay {
  int descriptor = -1;
  uint64_t file_bytes = 0;
  RawHeader header;
  uint64_t position = 0;
};

constexpr size_t overlaid_bytes = qcow2::switch_offset + 12;  // up to and with the L1 offset

Overlay *overlay_of(intptr_t *handle) {
  return reinterpret_cast<Overlay *>(handle);
}

int free_overlay(intptr_t **handle, libbfio_error_t **) {
  *handle = nullptr;  // owned by LibqcowReader::State
  return 1;
}

int clone_overlay(intptr_t **copy, intptr_t *handle, libbfio_error_t **) {
  *copy = handle;
  return 1;
}

int open_overlay(intptr_t *, int, libbfio_error_t **) {
  return 1;
}

int close_overlay(intptr_t *handle, libbfio_error_t **) {
  overlay_of(handle)->position = 0;
  return 0;
}

ssize_t read_overlay(intptr_t *handle, uint8_t *buffer, size_t bytes, libbfio_error_t **) {
  Overlay &overlay = *overlay_of(handle);
  if (overlay.position >= overlay.file_bytes) {
    return 0;
  }
  bytes = std::min<uint64_t>(bytes, overlay.file_bytes - overlay.position);
  // The file may end inside its last cluster; the rest of that reads as zeros.
  std::memset(buffer, 0, bytes);
  for (size_t done = 0; done < bytes;) {
    const ssize_t count = pread(overlay.descriptor, buffer + done, bytes - done,
                                static_cast<off_t>(overlay.position + done));
    if (count < 0) {
      return -1;
    }
    if (count == 0) {
      break;
    }
    done += count;
  }
  if (overlay.position < overlaid_bytes) {
    const auto *header = reinterpret_cast<const uint8_t *>(&overlay.header);
    std::memcpy(buffer, header + overlay.position,
                std::min<uint64_t>(bytes, overlaid_bytes - overlay.position));
  }
  overlay.position += bytes;
  return static_cast<ssize_t>(bytes);
}

ssize_t write_overlay(intptr_t *, const uint8_t *, size_t, libbfio_error_t **) {
  return -1;
}

off64_t seek_overlay(intptr_t *handle, off64_t offset, int whence, libbfio_error_t **) {
  Overlay &overlay = *overlay_of(handle);
  const uint64_t base = whence == SEEK_SET   ? 0
                        : whence == SEEK_CUR ? overlay.position
                                             : overlay.file_bytes;
  const int64_t position = static_cast<int64_t>(base) + offset;
  if (position < 0) {
    return -1;
  }
  overlay.position = position;
  return position;
}

int overlay_exists(intptr_t *, libbfio_error_t **) {
  return 1;
}

int overlay_is_open(intptr_t *, libbfio_error_t **) {
  return 1;
}

int overlay_size(intptr_t *handle, size64_t *bytes, libbfio_error_t **) {
  *bytes = overlay_of(handle)->file_bytes;
  return 1;
}

}  // namespace

struct LibqcowReader::State {
  std::string path;
  Overlay overlay;
  libbfio_handle_t *handle = nullptr;
  libqcow_file_t *file = nullptr;
  bool file_open = false;

  ~State() {
    if (file_open) {
      libqcow_file_close(file, nullptr);
    }
    if (file) {
      libqcow_file_free(&file, nullptr);
    }
    if (handle) {
      libbfio_handle_free(&handle, nullptr);
    }
    if (overlay.descriptor >= 0) {
      ::close(overlay.descriptor);
    }
  }

  tl::unexpected<Error> failed(const char *operation, libqcow_error_t *error) const {
    char text[512] = "unknown error";
    if (error) {
      libqcow_error_sprint(error, text, sizeof text);
      libqcow_error_free(&error);
    }
    return fail(ErrorCode::bad_image, path + ": libqcow cannot " + operation + ": " + text);
  }
};

Result<LibqcowReader> LibqcowReader::open(const std::string &path, HostOffset l1_offset,
                                          uint32_t l1_entries, const std::string &shown_name) {
  auto state = std::make_unique<State>();
  state->path = shown_name.empty() ? path : shown_name;
  Overlay &overlay = state->overlay;
  overlay.descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (overlay.descriptor < 0) {
    return fail_errno(errno, state->path + ": cannot be opened");
  }
  const off_t end = lseek(overlay.descriptor, 0, SEEK_END);
  if (end < 0 || pread(overlay.descriptor, &overlay.header, sizeof overlay.header, 0) !=
                     static_cast<ssize_t>(sizeof overlay.header)) {
    return fail(ErrorCode::bad_image, state->path + ": is too short for a qcow2 image");
  }
  qcow2::Geometry geometry;
  geometry.cluster_bits = overlay.header.cluster_bits;
  if (overlay.header.magic != qcow2::header_magic || geometry.cluster_bits < 9 ||
      geometry.cluster_bits > 21) {
    return fail(ErrorCode::bad_image, state->path + ": is not a qcow2 image");
  }
  overlay.file_bytes = round_up(static_cast<uint64_t>(end), geometry.cluster_bytes());
  overlay.header.backing_name_offset = uint64_t{0};
  overlay.header.backing_name_bytes = uint32_t{0};
  overlay.header.disk_bytes = l1_entries * geometry.span_bytes();
  overlay.header.l1_entries = l1_entries;
  overlay.header.l1_offset = l1_offset.value;

  libbfio_error_t *handle_error = nullptr;
  if (libbfio_handle_initialize(
          &state->handle, reinterpret_cast<intptr_t *>(&overlay), free_overlay, clone_overlay,
          open_overlay, close_overlay, read_overlay, write_overlay, seek_overlay, overlay_exists,
          overlay_is_open, overlay_size, LIBBFIO_FLAG_IO_HANDLE_NON_MANAGED, &handle_error) != 1) {
    return state->failed("start", reinterpret_cast<libqcow_error_t *>(handle_error));
  }
  libqcow_error_t *error = nullptr;
  if (libqcow_file_initialize(&state->file, &error) != 1) {
    return state->failed("start", error);
  }
  if (libqcow_file_open_file_io_handle(state->file, state->handle, LIBQCOW_OPEN_READ, &error) !=
      1) {
    return state->failed("open it", error);
  }
  state->file_open = true;
  return LibqcowReader(std::move(state));
}

LibqcowReader::LibqcowReader(std::unique_ptr<State> state) : state_(std::move(state)) {}
LibqcowReader::LibqcowReader(LibqcowReader &&) noexcept = default;
LibqcowReader &LibqcowReader::operator=(LibqcowReader &&) noexcept = default;
LibqcowReader::~LibqcowReader() = default;

Result<void> LibqcowReader::read(GuestOffset offset, std::span<std::byte> to) {
  while (!to.empty()) {
    libqcow_error_t *error = nullptr;
    const ssize_t count = libqcow_file_read_buffer_at_offset(
        state_->file, to.data(), to.size(), static_cast<off64_t>(offset.value), &error);
    if (count <= 0) {
      return state_->failed(("read at offset " + std::to_string(offset.value)).c_str(), error);
    }
    offset += count;
    to = to.subspan(count);
  }
  return {};
}

}  // namespace qvmstate::tools
