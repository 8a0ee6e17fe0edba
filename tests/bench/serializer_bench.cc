// How fast the legacy stream writer is by itself: RAM in, 1 MiB buffers out, and nothing behind
// them.
//
//   serializer_bench [--gib N] [--rounds N] [--format human|json]
//
// Six cases: RAM of this process seen in place, as the plugin sees it, and RAM of a forked child
// read by process_vm_readv, as attach mode reads it; each with random RAM, with a quarter of its
// pages zero, and with nine of ten. Every number is the median of the rounds, in GiB of guest RAM a
// second of processor time, user and system, so that other programs on the machine hardly matter.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <string>
#include <vector>

#include "qcow2/io/stream_buffer.h"
#include "vmstate/legacy_writer.h"

namespace {

using namespace qvmstate;

constexpr size_t page_bytes = 4096;

/// Takes every write and forgets it.
class DiscardingBackend : public io::Backend {
 public:
  std::string name() const override { return "discard"; }
  bool direct() const override { return false; }
  uint32_t direct_alignment() const override { return 1; }
  void register_buffers(std::span<const std::span<std::byte>>) override {}
  int start(const io::BackendOp &op) override {
    done_.push_back({op.cookie, static_cast<int64_t>(op.bytes)});
    return 0;
  }
  io::BackendCompletion reap() override {
    const io::BackendCompletion completion = done_.front();
    done_.pop_front();
    return completion;
  }
  int64_t read_some(void *, size_t, uint64_t) override { return 0; }
  int64_t write_some(const void *, size_t bytes, uint64_t) override {
    return static_cast<int64_t>(bytes);
  }
  int sync() override { return 0; }
  int64_t size() override { return 0; }
  int resize(uint64_t) override { return 0; }
  int preallocate(uint64_t, uint64_t) override { return 0; }
  int punch_hole(uint64_t, uint64_t) override { return 0; }
  bool is_block_device() const override { return false; }
  std::vector<int> descriptors() const override { return {}; }

 private:
  std::deque<io::BackendCompletion> done_;
};

class IdentityPlacement : public io::Placement {
 public:
  Result<void> place(StreamOffset from, uint64_t bytes, std::vector<io::HostRun> &runs) override {
    runs.push_back({HostOffset(from.value), bytes});
    return {};
  }
  uint64_t unit_bytes() const override { return page_bytes; }
};

/// One block of memory; with a process id, as that process's memory at the same address.
class MemorySource : public vmstate::RamSource {
 public:
  MemorySource(std::byte *memory, uint64_t bytes, pid_t pid)
      : memory_(memory), blocks_{{"pc.ram", bytes, page_bytes}}, pid_(pid) {}

  std::span<const vmstate::RamBlock> blocks() const override { return blocks_; }
  const std::byte *view(size_t) const override { return pid_ == 0 ? memory_ : nullptr; }
  Result<Presence> presence(size_t, uint64_t offset) override {
    return Presence{true, blocks_[0].used_bytes - offset};
  }
  Result<void> read_pages(size_t, uint64_t offset, size_t count, size_t bytes, std::byte *to,
                          size_t stride) override {
    iovec local[64];
    while (count > 0) {
      const size_t now = std::min(count, std::size(local));
      for (size_t i = 0; i < now; ++i) {
        local[i] = {to + i * stride, bytes};
      }
      iovec remote = {memory_ + offset, now * bytes};
      if (process_vm_readv(pid_, local, now, &remote, 1, 0) !=
          static_cast<ssize_t>(remote.iov_len)) {
        return fail_errno(errno, "serializer_bench: process_vm_readv");
      }
      to += now * stride;
      offset += now * bytes;
      count -= now;
    }
    return {};
  }

 private:
  std::byte *memory_;
  std::vector<vmstate::RamBlock> blocks_;
  pid_t pid_;
};

/// `zero_percent` of the pages stay zero, spread evenly; the others are random.
void fill(std::byte *memory, uint64_t bytes, unsigned zero_percent) {
  uint64_t state = 0x9e3779b97f4a7c15;
  for (uint64_t page = 0; page < bytes / page_bytes; ++page) {
    std::byte *to = memory + page * page_bytes;
    if (page * 7 % 100 < zero_percent) {
      std::memset(to, 0, page_bytes);
      continue;
    }
    for (size_t i = 0; i < page_bytes; i += sizeof state) {
      state ^= state << 13;
      state ^= state >> 7;
      state ^= state << 17;
      std::memcpy(to + i, &state, sizeof state);
    }
  }
}

double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

Result<double> run_once(vmstate::RamSource &source) {
  io::File file(std::make_unique<DiscardingBackend>(), "discard", 8);
  QV_ASSIGN(io::BufferPool pool, io::BufferPool::create());
  for (unsigned i = 0; i < pool.count(); ++i) {
    std::memset(pool.at(i).data, 0, pool.at(i).capacity);
  }
  IdentityPlacement placement;
  io::StreamBuffer out(file, pool, placement);
  const double begin = cpu_seconds();
  QV_ASSIGN(const auto stats,
            vmstate::write_legacy_stream(out, {"pc", {}, page_bytes}, source, {}, {}));
  const double seconds = cpu_seconds() - begin;
  return static_cast<double>(stats.ram_bytes) / static_cast<double>(gib) / seconds;
}

Result<double> median(vmstate::RamSource &source, unsigned rounds) {
  std::vector<double> rates;
  for (unsigned i = 0; i < rounds; ++i) {
    QV_ASSIGN(const double rate, run_once(source));
    rates.push_back(rate);
  }
  std::ranges::sort(rates);
  return rates[rates.size() / 2];
}

struct Case {
  const char *kind;
  unsigned zero_percent;
  double gib_per_second;
};

Result<std::vector<Case>> measure(uint64_t bytes, unsigned rounds) {
  void *mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    return fail_errno(errno, "serializer_bench: no memory for the guest RAM");
  }
  auto *memory = static_cast<std::byte *>(mapped);
  madvise(memory, bytes, MADV_HUGEPAGE);  // as QEMU does for guest RAM
  std::vector<Case> cases;
  for (const unsigned zero_percent : {0U, 25U, 90U}) {
    fill(memory, bytes, zero_percent);
    const pid_t child = fork();
    if (child == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      // A child that never touched the mapping has no page tables for it.
      volatile std::byte sink{};
      for (uint64_t at = 0; at < bytes; at += page_bytes) {
        sink = memory[at];
      }
      (void)sink;
      kill(getpid(), SIGSTOP);
      _exit(0);
    }
    if (child < 0) {
      return fail_errno(errno, "serializer_bench: fork");
    }
    waitpid(child, nullptr, WUNTRACED);
    MemorySource in_process(memory, bytes, 0);
    MemorySource other_process(memory, bytes, child);
    const auto view_rate = median(in_process, rounds);
    const auto attach_rate = median(other_process, rounds);
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    QV_TRY(view_rate);
    QV_TRY(attach_rate);
    cases.push_back({"in_process", zero_percent, *view_rate});
    cases.push_back({"process_vm_readv", zero_percent, *attach_rate});
  }
  munmap(mapped, bytes);
  return cases;
}

}  // namespace

int main(int argc, char **argv) {
  uint64_t bytes = 2 * gib;
  unsigned rounds = 5;
  bool json = false;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i];
    if (option == "--gib") {
      bytes = std::strtoul(argv[i + 1], nullptr, 10) * gib;
    } else if (option == "--rounds") {
      rounds = static_cast<unsigned>(std::strtoul(argv[i + 1], nullptr, 10));
    } else if (option == "--format") {
      json = std::strcmp(argv[i + 1], "json") == 0;
    }
  }
  if (bytes == 0 || rounds == 0 || argc % 2 == 0) {
    std::fprintf(stderr, "usage: %s [--gib N] [--rounds N] [--format human|json]\n", argv[0]);
    return 2;
  }
  const auto cases = measure(bytes, rounds);
  if (!cases) {
    std::fprintf(stderr, "%s\n", cases.error().message.c_str());
    return 1;
  }
  const char *separator = "[";
  for (const Case &c : *cases) {
    if (json) {
      std::printf("%s{\"ram\": \"%s\", \"zero_percent\": %u, \"gib_per_second\": %.3f}", separator,
                  c.kind, c.zero_percent, c.gib_per_second);
      separator = ",\n ";
    } else {
      std::printf("%-18s %3u %% zero  %7.2f GiB/s per core\n", c.kind, c.zero_percent,
                  c.gib_per_second);
    }
  }
  if (json) {
    std::printf("]\n");
  }
  return 0;
}
