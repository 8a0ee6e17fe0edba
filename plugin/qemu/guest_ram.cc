#include "plugin/qemu/guest_ram.h"

#include <unistd.h>

#include "plugin/qemu/attach_source.h"
#include "plugin/qemu/inprocess_source.h"

namespace qvmstate::qemu {

Result<void> check_seat(const LiveVm &vm, Seat seat) {
  if (seat == Seat::plugin && vm.pid != ::getpid()) {
    return fail(ErrorCode::bad_argument, "the plugin's qmp= socket '" + vm.qmp_path +
                                             "' belongs to process " + std::to_string(vm.pid) +
                                             ", not to this QEMU; give it this QEMU's own -qmp");
  }
  return {};
}

Result<std::vector<GuestRam>> open_ram(LiveVm &vm, Seat seat, unsigned count) {
  QV_ASSIGN(const std::vector<HostRamBlock> blocks, seat == Seat::plugin
                                                        ? ram_blocks_from_inside(*vm.qmp)
                                                        : ram_blocks_from_outside(*vm.qmp));
  std::vector<GuestRam> all;
  for (unsigned i = 0; i < count; ++i) {
    GuestRam ram;
    if (seat == Seat::plugin) {
      QV_ASSIGN(auto source, InProcessSource::open(blocks));
      ram.map = &source->map();
      ram.source = std::move(source);
    } else {
      QV_ASSIGN(auto source, AttachSource::open(vm.pid, blocks));
      ram.map = &source->map();
      ram.source = std::move(source);
    }
    all.push_back(std::move(ram));
  }
  return all;
}

}  // namespace qvmstate::qemu
