#include "abi/machine.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <utility>

#include "abi/check.h"

namespace unicorn_host {
namespace {

constexpr size_t register_bytes = 16;
constexpr uint64_t program_address = 0x1000;
constexpr uint64_t table_address = 0x8000;
constexpr uint64_t work_address = 0x10000;  // below it: program, table and stack
constexpr uint64_t alarm_ticks = 50000;
constexpr uint64_t mib = 1 << 20;
constexpr uint64_t work_bytes_max = 16 * mib;  // of each block; most zeros behind it stay

using RegisterValue = uint8_t[register_bytes];

void check_engine(uc_err error, const char *what) {
  check(error == UC_ERR_OK, std::string(what) + ": " + uc_strerror(error));
}

std::string hex(uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016" PRIx64, value);
  return text;
}

}  // namespace

Machine::Machine(MachineKind kind, uint64_t extra_pages) : kind_(std::move(kind)) {
  const uint64_t page = kind_.page_bytes;
  ram_.reserve(4);
  ram_.emplace_back("low", 0, 640 << 10, page);
  ram_.emplace_back("main", 0x10000000, 68 * mib + (1 + extra_pages) * page, page);
  ram_.emplace_back("video", 0x40000000, 3 * mib + 5 * page, page);
  ram_.emplace_back("nvram", 0x50000000, page, page);
  open_engine();
}

void Machine::open_engine() {
  uc_engine *engine = nullptr;
  check_engine(uc_open(kind_.arch, kind_.mode, &engine), "uc_open");
  engine_.reset(engine);
  for (const RamBlock &block : ram_) {
    check_engine(uc_mem_map_ptr(engine, block.address(), block.bytes(), UC_PROT_ALL, block.data()),
                 "uc_mem_map_ptr");
  }
  check_engine(uc_mmio_map(engine, Device::address, Device::bytes, on_device_read, this,
                           on_device_write, this),
               "uc_mmio_map");
  uc_hook hook = 0;
  check_engine(uc_hook_add(engine, &hook, UC_HOOK_CODE, reinterpret_cast<void *>(on_instruction),
                           this, 1, 0),
               "uc_hook_add");
  check_engine(
      uc_hook_add(engine, &hook, UC_HOOK_MEM_WRITE, reinterpret_cast<void *>(on_write), this, 1, 0),
      "uc_hook_add");
}

void Machine::boot(const std::string &program_path, uint64_t rounds) {
  for (size_t i = 0; i < ram_.size(); ++i) {
    ram_[i].fill(i + 1);
  }
  std::ifstream file(program_path, std::ios::binary);
  const std::string program((std::istreambuf_iterator<char>(file)),
                            std::istreambuf_iterator<char>());
  check(!program.empty() && program.size() < table_address - program_address,
        program_path + ": cannot be read, or is no program");
  uint8_t *const low = ram_[0].data();
  std::memset(low, 0, work_address);
  std::memcpy(low + program_address, program.data(), program.size());
  std::vector<uint64_t> table = {Device::address, 0x9e3779b97f4a7c15, rounds, alarm_ticks,
                                 ram_.size()};
  for (const RamBlock &block : ram_) {
    const uint64_t start = block.address() == 0 ? work_address : 0;
    const uint64_t end = std::min(block.bytes(), work_bytes_max);
    table.insert(table.end(), {block.address() + start, (end - start) / sizeof(uint64_t)});
  }
  std::memcpy(low + table_address, table.data(), table.size() * sizeof table[0]);
  check_engine(uc_reg_write(engine_.get(), kind_.program_counter, &program_address),
               "uc_reg_write");
}

void Machine::run(uint64_t instructions) {
  stop_at_ = instructions > UINT64_MAX - executed_ ? UINT64_MAX : executed_ + instructions;
  uint64_t address = 0;
  check_engine(uc_reg_read(engine_.get(), kind_.program_counter, &address), "uc_reg_read");
  check_engine(uc_emu_start(engine_.get(), address, UINT64_MAX, 0, 0), "uc_emu_start");
}

std::vector<uint8_t> Machine::cpu() const {
  std::vector<uint8_t> state;
  for (const Register &one : kind_.registers) {
    RegisterValue value = {};
    check_engine(uc_reg_read(engine_.get(), one.id, value), "uc_reg_read");
    state.insert(state.end(), std::begin(value), std::end(value));
  }
  return state;
}

bool Machine::set_cpu(const std::vector<uint8_t> &state) {
  if (state.size() != kind_.registers.size() * register_bytes) {
    return false;
  }
  open_engine();
  for (size_t i = 0; i < kind_.registers.size(); ++i) {
    check_engine(uc_reg_write(engine_.get(), kind_.registers[i].id, &state[i * register_bytes]),
                 "uc_reg_write");
  }
  return true;
}

std::string Machine::describe() const {
  const std::vector<uint8_t> values = cpu();
  std::string text = "executed " + std::to_string(executed_) + "\n";
  for (size_t i = 0; i < kind_.registers.size(); ++i) {
    uint64_t halves[2];
    std::memcpy(halves, &values[i * register_bytes], sizeof halves);
    text += kind_.registers[i].name + " " + hex(halves[1]) + hex(halves[0]) + "\n";
  }
  for (const RamBlock &block : ram_) {
    text += "block " + block.name() + " " + hex(block.hash()) + "\n";
  }
  text += "device";
  for (const uint8_t byte : device_.registers()) {
    text += " " + std::to_string(byte);
  }
  return text + "\nconsole " + device_.console() + "\n";
}

void Machine::on_instruction(uc_engine *engine, uint64_t, uint32_t, void *machine) {
  auto &self = *static_cast<Machine *>(machine);
  if (self.executed_ == self.stop_at_ || self.device_.is_off()) {
    uc_emu_stop(engine);  // before this instruction
    return;
  }
  ++self.executed_;
}

void Machine::on_write(uc_engine *, uc_mem_type, uint64_t address, int size, int64_t,
                       void *machine) {
  for (RamBlock &block : static_cast<Machine *>(machine)->ram_) {
    block.note_write(address, static_cast<uint64_t>(size));
  }
}

uint64_t Machine::on_device_read(uc_engine *, uint64_t offset, unsigned, void *machine) {
  auto &self = *static_cast<Machine *>(machine);
  return self.device_.read(offset, self.executed_);
}

void Machine::on_device_write(uc_engine *, uint64_t offset, unsigned, uint64_t value,
                              void *machine) {
  auto &self = *static_cast<Machine *>(machine);
  self.device_.write(offset, static_cast<uint32_t>(value), self.executed_);
}

}  // namespace unicorn_host
