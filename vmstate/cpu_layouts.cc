#include "vmstate/cpu_layouts.h"

namespace qvmstate::vmstate {

#define QV_SEGMENT                                          \
  R"("type": "struct", "size": 20, "struct": {"fields": [)" \
  R"({"name": "selector", "type": "uint32", "size": 4},)"   \
  R"({"name": "base", "type": "uint64", "size": 8},)"       \
  R"({"name": "limit", "type": "uint32", "size": 4},)"      \
  R"({"name": "flags", "type": "uint32", "size": 4}]}})"

const CpuLayout x86_64_cpu_layout = {11, 12, R"([
  {"name": "env.regs", "type": "uint64", "size": 8, "array_len": 16},
  {"name": "env.eip", "type": "uint64", "size": 8},
  {"name": "env.eflags", "type": "uint64", "size": 8},
  {"name": "env.hflags", "type": "uint32", "size": 4},
  {"name": "env.fpuc", "type": "uint16", "size": 2},
  {"name": "env.fpus_vmstate", "type": "uint16", "size": 2},
  {"name": "env.fptag_vmstate", "type": "uint16", "size": 2},
  {"name": "env.fpregs_format_vmstate", "type": "uint16", "size": 2},
  {"name": "env.fpregs", "type": "buffer", "size": 10, "array_len": 8},
  {"name": "env.segs", "array_len": 6, )" QV_SEGMENT R"(,
  {"name": "env.ldt", )" QV_SEGMENT R"(,
  {"name": "env.tr", )" QV_SEGMENT R"(,
  {"name": "env.gdt", )" QV_SEGMENT R"(,
  {"name": "env.idt", )" QV_SEGMENT R"(,
  {"name": "env.sysenter_cs", "type": "uint32", "size": 4},
  {"name": "env.sysenter_esp", "type": "uint64", "size": 8},
  {"name": "env.sysenter_eip", "type": "uint64", "size": 8},
  {"name": "env.cr[0]", "type": "uint64", "size": 8},
  {"name": "env.cr[2]", "type": "uint64", "size": 8},
  {"name": "env.cr[3]", "type": "uint64", "size": 8},
  {"name": "env.cr[4]", "type": "uint64", "size": 8},
  {"name": "env.dr", "type": "uint64", "size": 8, "array_len": 8},
  {"name": "env.a20_mask", "type": "int32", "size": 4},
  {"name": "env.mxcsr", "type": "uint32", "size": 4},
  {"name": "env.xmm_regs[0]", "type": "buffer", "size": 16, "array_len": 16},
  {"name": "env.efer", "type": "uint64", "size": 8},
  {"name": "env.star", "type": "uint64", "size": 8},
  {"name": "env.lstar", "type": "uint64", "size": 8},
  {"name": "env.cstar", "type": "uint64", "size": 8},
  {"name": "env.fmask", "type": "uint64", "size": 8},
  {"name": "env.kernelgsbase", "type": "uint64", "size": 8}
])"};

#undef QV_SEGMENT
#define QV_SEGMENT                                          \
  R"("type": "struct", "size": 16, "struct": {"fields": [)" \
  R"({"name": "selector", "type": "uint32", "size": 4},)"   \
  R"({"name": "base", "type": "uint32", "size": 4},)"       \
  R"({"name": "limit", "type": "uint32", "size": 4},)"      \
  R"({"name": "flags", "type": "uint32", "size": 4}]}})"

const CpuLayout i386_cpu_layout = {11, 12, R"([
  {"name": "env.regs", "type": "uint32", "size": 4, "array_len": 8},
  {"name": "env.eip", "type": "uint32", "size": 4},
  {"name": "env.eflags", "type": "uint32", "size": 4},
  {"name": "env.hflags", "type": "uint32", "size": 4},
  {"name": "env.fpuc", "type": "uint16", "size": 2},
  {"name": "env.fpus_vmstate", "type": "uint16", "size": 2},
  {"name": "env.fptag_vmstate", "type": "uint16", "size": 2},
  {"name": "env.fpregs_format_vmstate", "type": "uint16", "size": 2},
  {"name": "env.fpregs", "type": "buffer", "size": 10, "array_len": 8},
  {"name": "env.segs", "array_len": 6, )" QV_SEGMENT R"(,
  {"name": "env.ldt", )" QV_SEGMENT R"(,
  {"name": "env.tr", )" QV_SEGMENT R"(,
  {"name": "env.gdt", )" QV_SEGMENT R"(,
  {"name": "env.idt", )" QV_SEGMENT R"(,
  {"name": "env.sysenter_cs", "type": "uint32", "size": 4},
  {"name": "env.sysenter_esp", "type": "uint32", "size": 4},
  {"name": "env.sysenter_eip", "type": "uint32", "size": 4},
  {"name": "env.cr[0]", "type": "uint32", "size": 4},
  {"name": "env.cr[2]", "type": "uint32", "size": 4},
  {"name": "env.cr[3]", "type": "uint32", "size": 4},
  {"name": "env.cr[4]", "type": "uint32", "size": 4}
])"};

#undef QV_SEGMENT

const CpuLayout aarch64_cpu_layout = {22, 22, R"([
  {"name": "env.regs", "type": "uint32", "size": 4, "array_len": 16},
  {"name": "env.xregs", "type": "uint64", "size": 8, "array_len": 32},
  {"name": "env.pc", "type": "uint64", "size": 8},
  {"name": "cpsr", "type": "uint32", "size": 4}
])"};

}  // namespace qvmstate::vmstate
