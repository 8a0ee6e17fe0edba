// The beginning of the section "cpu", as a vmdescription would tell it, for streams whose own does
// not: those of qvmstate name only sections and sizes.
//
// Source of the facts: the vmdescriptions of QEMU 7.2, 10.0 and 11.1, which agree in these fields.
#pragma once

namespace qvmstate::vmstate {

struct CpuLayout {
  unsigned version_min;  ///< of the section
  unsigned version_max;
  const char *fields;  ///< JSON, the field list of a vmdescription
};

extern const CpuLayout x86_64_cpu_layout;
extern const CpuLayout i386_cpu_layout;  ///< of qemu-system-i386
extern const CpuLayout aarch64_cpu_layout;

}  // namespace qvmstate::vmstate
