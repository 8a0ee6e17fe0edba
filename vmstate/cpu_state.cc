#include "vmstate/cpu_state.h"

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include "vmstate/section_decoder.h"

namespace qvmstate::vmstate {
namespace {

constexpr uint64_t cpu_bytes_max = 1 * mib;     // QEMU's have some KiB
constexpr uint64_t hflags_long_mode = 1 << 14;  // QEMU's copy of EFER.LMA
constexpr size_t arm_r15 = 15;
constexpr uint64_t arm_state_32_bit = 0x10;  // of pstate

/// Numbers of decoded fields; remembers whether one was missing.
class Fields {
 public:
  explicit Fields(const DecodedJson &fields) : fields_(fields) {}

  uint64_t number(const char *name) { return as_number(find(fields_, name)); }
  template <size_t N>
  void numbers(const char *name, std::array<uint64_t, N> &to) {
    const DecodedJson *const array = find(fields_, name);
    // 32-bit CPUs have fewer.
    if (array == nullptr || !array->is_array() || array->size() > N) {
      complete_ = false;
      return;
    }
    for (size_t i = 0; i < array->size(); ++i) {
      to[i] = as_number(&(*array)[i]);
    }
  }
  X86Segment segment(const char *name) { return as_segment(find(fields_, name)); }
  void segments(const char *name, std::array<X86Segment, 6> &to) {
    const DecodedJson *const array = find(fields_, name);
    if (array == nullptr || !array->is_array() || array->size() != to.size()) {
      complete_ = false;
      return;
    }
    for (size_t i = 0; i < to.size(); ++i) {
      to[i] = as_segment(&(*array)[i]);
    }
  }
  bool complete() const { return complete_; }

 private:
  const DecodedJson *find(const DecodedJson &object, const char *name) {
    const auto found = object.find(name);
    return found == object.end() ? nullptr : &*found;
  }
  uint64_t as_number(const DecodedJson *value) {
    if (value == nullptr || !value->is_number_unsigned()) {
      complete_ = false;
      return 0;
    }
    return value->get<uint64_t>();
  }
  X86Segment as_segment(const DecodedJson *value) {
    if (value == nullptr || !value->is_object()) {
      complete_ = false;
      return {};
    }
    return {static_cast<uint32_t>(as_number(find(*value, "selector"))),
            static_cast<uint32_t>(as_number(find(*value, "limit"))),
            static_cast<uint32_t>(as_number(find(*value, "flags"))),
            as_number(find(*value, "base"))};
  }

  const DecodedJson &fields_;
  bool complete_ = true;
};

std::optional<X86Cpu> x86_cpu(Fields fields) {
  X86Cpu cpu;
  fields.numbers("env.regs", cpu.registers);
  cpu.rip = fields.number("env.eip");
  cpu.rflags = fields.number("env.eflags");
  fields.segments("env.segs", cpu.segments);
  cpu.ldt = fields.segment("env.ldt");
  cpu.tr = fields.segment("env.tr");
  cpu.gdt = fields.segment("env.gdt");
  cpu.idt = fields.segment("env.idt");
  cpu.in_long_mode = (fields.number("env.hflags") & hflags_long_mode) != 0;
  cpu.control = {fields.number("env.cr[0]"), 0, fields.number("env.cr[2]"),
                 fields.number("env.cr[3]"), fields.number("env.cr[4]")};
  if (!fields.complete()) {
    return std::nullopt;
  }
  // QEMU for 32-bit CPUs alone has none.
  cpu.kernel_gs_base = fields.number("env.kernelgsbase");
  return cpu;
}

std::optional<ArmCpu> arm_cpu(Fields fields, const DecodedJson &cpsr) {
  ArmCpu cpu;
  std::array<uint64_t, 16> registers = {};
  fields.numbers("env.xregs", cpu.x);
  fields.numbers("env.regs", registers);
  cpu.pc = fields.number("env.pc");
  if (!fields.complete()) {
    return std::nullopt;
  }
  // A type of its own in QEMU's description: four bytes in hexadecimal.
  if (cpsr.is_string() && cpsr.get_ref<const std::string &>().size() == 8) {
    cpu.pstate = std::strtoull(cpsr.get_ref<const std::string &>().c_str(), nullptr, 16);
  } else if (cpsr.is_number_unsigned()) {
    cpu.pstate = cpsr.get<uint64_t>();
  } else {
    return std::nullopt;
  }
  if ((cpu.pstate & arm_state_32_bit) != 0) {
    cpu.x = {};
    std::ranges::copy(std::span(registers).first(arm_r15), cpu.x.begin());
    cpu.pc = registers[arm_r15];
  }
  return cpu;
}

}  // namespace

Result<std::vector<CpuState>> read_cpus(StreamSource &source, const StreamSummary &stream) {
  const SectionDecoder decoder(stream);
  std::vector<CpuState> cpus;
  std::vector<std::byte> body;
  for (const StreamSection &section : stream.devices) {
    if (section.idstr != "cpu") {
      continue;
    }
    std::optional<CpuState> cpu;
    if (section.bytes <= cpu_bytes_max) {
      body.resize(section.bytes);
      QV_TRY(source.read(StreamOffset(section.offset), body));
      const DecodedJson decoded = decoder.decode(section, body);
      const auto fields = decoded.find("fields");
      if (fields != decoded.end() && fields->contains("env.eip")) {
        if (auto found = x86_cpu(Fields(*fields))) {
          cpu = {section.instance, *found};
        }
      } else if (fields != decoded.end() && fields->contains("cpsr")) {
        if (auto found = arm_cpu(Fields(*fields), (*fields)["cpsr"])) {
          cpu = {section.instance, *found};
        }
      }
    }
    if (!cpu || (!cpus.empty() && cpu->registers.index() != cpus[0].registers.index())) {
      return fail(ErrorCode::not_supported,
                  "section \"cpu\" " + std::to_string(section.instance) + " of machine type '" +
                      stream.machine_type +
                      "' is none of an x86-64 or aarch64 CPU that is known here");
    }
    cpus.push_back(*cpu);
  }
  if (cpus.empty()) {
    return fail(ErrorCode::not_supported, "machine type '" + stream.machine_type +
                                              "' has no section \"cpu\", as x86 and arm have");
  }
  return cpus;
}

}  // namespace qvmstate::vmstate
