// A machine: a CPU (Unicorn's), RAM in four blocks, the device. It does the same in each run, also
// when it runs in pieces.
//
// Threads: one at a time; the RAM may be read by others while it runs.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "abi/device.h"
#include "abi/machine_kind.h"
#include "abi/ram.h"

namespace unicorn_host {

class Machine {
 public:
  /// extra_pages: by how much the largest block is larger than usual. The RAM is zero, and the
  /// machine cannot run before boot() or a load.
  Machine(MachineKind kind, uint64_t extra_pages);

  /// Fills RAM, loads the program and gives it `rounds` of work.
  void boot(const std::string &program_path, uint64_t rounds);
  /// Executes so many instructions, or fewer if the guest switches off.
  void run(uint64_t instructions);

  const MachineKind &kind() const { return kind_; }
  std::vector<RamBlock> &ram() { return ram_; }
  Device &device() { return device_; }
  uint64_t executed() const { return executed_; }
  void set_executed(uint64_t instructions) { executed_ = instructions; }

  /// The registers, 16 bytes each.
  std::vector<uint8_t> cpu() const;
  /// Also forgets what was translated of the program. False: these are not bytes of cpu().
  bool set_cpu(const std::vector<uint8_t> &state);

  /// All of the state, a line each, for people and to compare.
  std::string describe() const;

 private:
  struct Close {
    void operator()(uc_engine *engine) const { uc_close(engine); }
  };

  void open_engine();
  static void on_instruction(uc_engine *engine, uint64_t address, uint32_t size, void *machine);
  static void on_write(uc_engine *engine, uc_mem_type type, uint64_t address, int size,
                       int64_t value, void *machine);
  static uint64_t on_device_read(uc_engine *engine, uint64_t offset, unsigned size, void *machine);
  static void on_device_write(uc_engine *engine, uint64_t offset, unsigned size, uint64_t value,
                              void *machine);

  MachineKind kind_;
  std::vector<RamBlock> ram_;
  Device device_;
  std::unique_ptr<uc_engine, Close> engine_;  // its memory is ram_
  uint64_t executed_ = 0;
  uint64_t stop_at_ = 0;
};

}  // namespace unicorn_host
