// One refcount block: counts of 1 to 64 bits, packed.
//
// Format: QEMU docs/interop/qcow2.txt, "Host cluster management". Widths of 16 bits and more are
// big-endian; below 8 bits the first entry is in the least significant bits of its byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace qvmstate::qcow2 {

uint64_t refcount_get(std::span<const std::byte> block, uint32_t refcount_order, uint64_t index);
/// Precondition: `count` fits the width.
void refcount_set(std::span<std::byte> block, uint32_t refcount_order, uint64_t index,
                  uint64_t count);

}  // namespace qvmstate::qcow2
