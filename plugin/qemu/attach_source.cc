#include "plugin/qemu/attach_source.h"

#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <climits>

namespace qvmstate::qemu {
namespace {

Result<void> explain(int error, pid_t pid, const std::string &block) {
  const std::string process = "QEMU (process " + std::to_string(pid) + ")";
  const std::string what = "reading RAM block '" + block + "' of " + process;
  switch (error) {
    case EPERM:
      return fail(ErrorCode::permission,
                  what +
                      ": not allowed; run as root, or as QEMU's user with "
                      "kernel.yama.ptrace_scope=0, or use the plugin",
                  error);
    case ESRCH:
      return fail(ErrorCode::peer, what + ": the process is gone", error);
    case EFAULT:
      return fail(ErrorCode::peer, what + ": the memory is gone (has QEMU ended?)", error);
    case ENOSYS:
      return fail(ErrorCode::not_supported,
                  what + ": this kernel has no process_vm_readv; use the plugin", error);
    default:
      return fail_errno(error, what);
  }
}

}  // namespace

Result<void> read_pages_of_file(int file, uint64_t file_offset, size_t count, size_t page_bytes,
                                std::byte *to, size_t stride, const std::string &block) {
  for (size_t page = 0; page < count; ++page) {
    size_t done = 0;
    while (done < page_bytes) {
      const ssize_t bytes = ::pread(file, to + page * stride + done, page_bytes - done,
                                    static_cast<off_t>(file_offset + page * page_bytes + done));
      if (bytes < 0 && errno == EINTR) {
        continue;
      }
      if (bytes <= 0) {
        return fail_errno(bytes < 0 ? errno : EIO, "reading RAM block '" + block + "'");
      }
      done += static_cast<size_t>(bytes);
    }
  }
  return {};
}

Result<std::unique_ptr<AttachSource>> AttachSource::open(pid_t pid,
                                                         std::vector<HostRamBlock> blocks) {
  QV_ASSIGN(MemoryMap map, MemoryMap::read(pid, blocks));
  std::unique_ptr<AttachSource> source(new AttachSource(pid, std::move(map)));
  for (HostRamBlock &block : blocks) {
    source->addresses_.push_back(*block.address);
    source->blocks_.push_back(std::move(block.block));
  }
  for (size_t block = 0; block < source->blocks_.size(); ++block) {
    QV_ASSIGN(const Presence first, source->presence(block, 0));
    std::byte probe;
    if (first.touched) {
      QV_TRY(source->read_pages(block, 0, 1, 1, &probe, 1));
    }
  }
  return source;
}

Result<void> AttachSource::read_pages(size_t block, uint64_t offset, size_t count,
                                      size_t page_bytes, std::byte *to, size_t stride) {
  while (count > 0) {
    const Segment &segment = map_.segment_at(block, offset);
    const size_t pages =
        std::min<uint64_t>(count, std::max<uint64_t>(1, (segment.end - offset) / page_bytes));
    if (segment.kind == MemoryKind::shared_huge && segment.file >= 0) {
      QV_TRY(read_pages_of_file(map_.descriptor(segment),
                                segment.file_offset + (offset - segment.start), pages, page_bytes,
                                to, stride, blocks_[block].idstr));
      offset += pages * page_bytes;
      to += pages * stride;
      count -= pages;
      continue;
    }
    iovec local[IOV_MAX];
    // Pages that lie beside each other are one piece for the kernel.
    const bool adjacent = stride == page_bytes;
    const size_t batch = std::min<size_t>(pages, IOV_MAX);
    size_t batch_bytes = batch * page_bytes;
    const size_t pieces = adjacent ? 1 : batch;
    const size_t piece_bytes = adjacent ? batch_bytes : page_bytes;
    for (size_t i = 0; i < pieces; ++i) {
      local[i] = {to + i * stride, piece_bytes};
    }
    // NOLINTNEXTLINE(performance-no-int-to-ptr): an address in another process
    iovec remote = {reinterpret_cast<void *>(addresses_[block] + offset), batch_bytes};
    iovec *first = local;
    while (batch_bytes > 0) {
      const ssize_t bytes = ::process_vm_readv(
          pid_, first, static_cast<unsigned long>(local + pieces - first), &remote, 1, 0);
      if (bytes <= 0) {
        return explain(bytes < 0 ? errno : EFAULT, pid_, blocks_[block].idstr);
      }
      // A partial read ends somewhere in the list; go on from there.
      batch_bytes -= static_cast<size_t>(bytes);
      remote.iov_base = static_cast<char *>(remote.iov_base) + bytes;
      remote.iov_len -= static_cast<size_t>(bytes);
      for (size_t left = static_cast<size_t>(bytes); left > 0;) {
        const size_t part = std::min(left, first->iov_len);
        first->iov_base = static_cast<char *>(first->iov_base) + part;
        first->iov_len -= part;
        left -= part;
        first += first->iov_len == 0 ? 1 : 0;
      }
    }
    offset += batch * page_bytes;
    to += batch * stride;
    count -= batch;
  }
  return {};
}

}  // namespace qvmstate::qemu
