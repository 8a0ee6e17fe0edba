// Finding zero pages.
#pragma once

#include <cstddef>

namespace qvmstate::vmstate {

/// Whether all bytes are zero. AVX2 where the CPU has it, portable words otherwise.
/// Any address and size.
bool is_zero(const std::byte *data, size_t bytes);

/// The portable version, for tests and other CPUs.
bool is_zero_portable(const std::byte *data, size_t bytes);

}  // namespace qvmstate::vmstate
