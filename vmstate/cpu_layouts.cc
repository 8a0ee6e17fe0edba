#include "vmstate/cpu_layouts.h"

namespace qvmstate::vmstate {

#define QV_WORD_64 R"("type": "uint64", "size": 8)"
#define QV_WORD_32 R"("type": "uint32", "size": 4)"
#define QV_SEGMENT(WORD, BYTES)                                       \
  R"("type": "struct", "size": )" BYTES R"(, "struct": {"fields": [)" \
  R"({"name": "selector", "type": "uint32", "size": 4},)"             \
  R"({"name": "base", )" WORD R"(},)"                                 \
  R"({"name": "limit", "type": "uint32", "size": 4},)"                \
  R"({"name": "flags", "type": "uint32", "size": 4}]}})"

// As far as it is the same for both widths.
#define QV_X86_CPU(WORD, REGISTERS, SEGMENT)                                            \
  R"({"name": "env.regs", )" WORD R"(, "array_len": )" REGISTERS R"(},)"                \
  R"({"name": "env.eip", )" WORD R"(},)"                                                \
  R"({"name": "env.eflags", )" WORD R"(},)"                                             \
  R"({"name": "env.hflags", "type": "uint32", "size": 4},)"                             \
  R"({"name": "env.fpuc", "type": "uint16", "size": 2},)"                               \
  R"({"name": "env.fpus_vmstate", "type": "uint16", "size": 2},)"                       \
  R"({"name": "env.fptag_vmstate", "type": "uint16", "size": 2},)"                      \
  R"({"name": "env.fpregs_format_vmstate", "type": "uint16", "size": 2},)"              \
  R"({"name": "env.fpregs", "type": "buffer", "size": 10, "array_len": 8},)"            \
  R"({"name": "env.segs", "array_len": 6, )" SEGMENT R"(,{"name": "env.ldt", )" SEGMENT \
  R"(,{"name": "env.tr", )" SEGMENT R"(,{"name": "env.gdt", )" SEGMENT                  \
  R"(,{"name": "env.idt", )" SEGMENT                                                    \
  R"(,{"name": "env.sysenter_cs", "type": "uint32", "size": 4},)"                       \
  R"({"name": "env.sysenter_esp", )" WORD R"(},)"                                       \
  R"({"name": "env.sysenter_eip", )" WORD R"(},)"                                       \
  R"({"name": "env.cr[0]", )" WORD R"(},)"                                              \
  R"({"name": "env.cr[2]", )" WORD R"(},)"                                              \
  R"({"name": "env.cr[3]", )" WORD R"(},)"                                              \
  R"({"name": "env.cr[4]", )" WORD R"(})"

const CpuLayout x86_64_cpu_layout = {
    11, 12, "[" QV_X86_CPU(QV_WORD_64, "16", QV_SEGMENT(QV_WORD_64, "20")) R"(,
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

const CpuLayout i386_cpu_layout = {
    11, 12, "[" QV_X86_CPU(QV_WORD_32, "8", QV_SEGMENT(QV_WORD_32, "16")) "]"};

#undef QV_X86_CPU
#undef QV_SEGMENT
#undef QV_WORD_32
#undef QV_WORD_64

const CpuLayout aarch64_cpu_layout = {22, 22, R"([
  {"name": "env.regs", "type": "uint32", "size": 4, "array_len": 16},
  {"name": "env.xregs", "type": "uint64", "size": 8, "array_len": 32},
  {"name": "env.pc", "type": "uint64", "size": 8},
  {"name": "cpsr", "type": "uint32", "size": 4}
])"};

}  // namespace qvmstate::vmstate
