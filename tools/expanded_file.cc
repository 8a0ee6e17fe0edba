#include "tools/expanded_file.h"

#include <fcntl.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <functional>
#include <span>
#include <vector>

#include "plugin/qemu/descriptor.h"
#include "qcow2/io/endian.h"
#include "qcow2/io/offsets.h"

namespace qvmstate::tools {

namespace {

constexpr size_t piece_bytes = 1 * mib;
constexpr int gzip_window_bits = 15 + 16;

using Sink = std::function<Result<void>(std::span<const std::byte>)>;

tl::unexpected<Error> damaged(const io::File &file) {
  return fail(ErrorCode::bad_stream,
              file.name() + ": the compressed stream is damaged or cut short");
}

Result<void> inflate_all(io::File &file, uint64_t offset, uint64_t end, const Sink &sink) {
  std::vector<std::byte> in(piece_bytes);
  std::vector<std::byte> out(piece_bytes);
  z_stream stream = {};
  if (inflateInit2(&stream, gzip_window_bits) != Z_OK) {
    return fail_errno(ENOMEM, file.name() + ": cannot inflate it");
  }
  const std::unique_ptr<z_stream, int (*)(z_stream *)> ended(&stream, inflateEnd);
  int status = Z_STREAM_END;
  while (offset < end || stream.avail_in > 0) {
    if (stream.avail_in == 0) {
      const size_t part = std::min<uint64_t>(in.size(), end - offset);
      QV_TRY(file.read_at(std::span(in).first(part), HostOffset(offset)));
      offset += part;
      stream.next_in = reinterpret_cast<Bytef *>(in.data());
      stream.avail_in = static_cast<uInt>(part);
    }
    stream.next_out = reinterpret_cast<Bytef *>(out.data());
    stream.avail_out = static_cast<uInt>(out.size());
    status = inflate(&stream, Z_NO_FLUSH);
    QV_TRY(sink(std::span(out).first(out.size() - stream.avail_out)));
    if (status == Z_STREAM_END) {
      inflateReset(&stream);  // one member may follow another
    } else if (status != Z_OK) {
      return damaged(file);
    }
  }
  return status == Z_STREAM_END ? Result<void>() : damaged(file);
}

Result<void> unzstd_all(io::File &file, uint64_t offset, uint64_t end, const Sink &sink) {
  const std::unique_ptr<ZSTD_DCtx, size_t (*)(ZSTD_DCtx *)> context(ZSTD_createDCtx(),
                                                                    ZSTD_freeDCtx);
  if (!context) {
    return fail_errno(ENOMEM, file.name() + ": cannot expand it");
  }
  std::vector<std::byte> bytes(piece_bytes);
  std::vector<std::byte> expanded(piece_bytes);
  size_t status = 0;
  while (offset < end) {
    ZSTD_inBuffer in = {bytes.data(), std::min<uint64_t>(bytes.size(), end - offset), 0};
    QV_TRY(file.read_at(std::span(bytes).first(in.size), HostOffset(offset)));
    offset += in.size;
    for (bool more = true; more;) {
      ZSTD_outBuffer out = {expanded.data(), expanded.size(), 0};
      status = ZSTD_decompressStream(context.get(), &out, &in);
      if (ZSTD_isError(status) != 0) {
        return damaged(file);
      }
      QV_TRY(sink(std::span(expanded).first(out.pos)));
      more = in.pos < in.size || out.pos == out.size;
    }
  }
  return status == 0 ? Result<void>() : damaged(file);
}

}  // namespace

Result<FileCompression> compression_at(io::File &file, uint64_t offset) {
  std::array<std::byte, 4> head;
  QV_TRY(file.read_or_zero_at(head, HostOffset(offset)));
  const auto word = load_be<uint32_t>(head.data());
  return word >> 16 == 0x1f8b ? FileCompression::gzip
         : word == 0x28b52ffd ? FileCompression::zstd
                              : FileCompression::none;
}

Result<std::unique_ptr<io::File>> expanded_file(io::File &file, uint64_t offset,
                                                FileCompression compression,
                                                const std::string &folder) {
  const qemu::Descriptor made(::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  if (made.get() < 0) {
    return fail_errno(errno,
                      folder + ": cannot make a file there to expand " + file.name() + " to");
  }
  io::OpenOptions options;
  options.writable = true;
  options.direct = io::DirectMode::off;
  QV_ASSIGN(auto expanded, io::File::open("/proc/self/fd/" + std::to_string(made.get()), options,
                                          file.name() + " (expanded)"));
  QV_ASSIGN(const uint64_t end, file.size());
  uint64_t written = 0;
  const Sink sink = [&](std::span<const std::byte> bytes) -> Result<void> {
    if (!bytes.empty()) {
      QV_TRY(expanded->write_at(bytes, HostOffset(written)));
      written += bytes.size();
    }
    return {};
  };
  QV_TRY(compression == FileCompression::gzip ? inflate_all(file, offset, end, sink)
                                              : unzstd_all(file, offset, end, sink));
  return expanded;
}

}  // namespace qvmstate::tools
