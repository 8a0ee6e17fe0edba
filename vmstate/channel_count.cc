#include "vmstate/channel_count.h"

#include <sched.h>

#include <algorithm>

#include "qcow2/io/offsets.h"

namespace qvmstate::vmstate {
namespace {

// One thread fills about 2 GiB/s through process_vm_readv; four do for the fastest disks.
constexpr unsigned channels_default_max = 4;
// Writes into holes of a file keep their thread waiting for the file system, with nothing else to
// do for its CPU: scattered pages took a quarter less time with two threads a CPU than with one.
constexpr unsigned channels_per_cpu = 2;
constexpr uint64_t ram_bytes_per_channel_min = 64 * mib;

}  // namespace

unsigned default_channels(uint64_t ram_bytes) {
  cpu_set_t cpus;
  const int count = ::sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
  const unsigned of_cpus = channels_per_cpu * static_cast<unsigned>(count);
  const uint64_t of_use = std::max<uint64_t>(1, ram_bytes / ram_bytes_per_channel_min);
  return static_cast<unsigned>(
      std::min<uint64_t>(of_use, std::clamp<unsigned>(of_cpus, 1, channels_default_max)));
}

}  // namespace qvmstate::vmstate
