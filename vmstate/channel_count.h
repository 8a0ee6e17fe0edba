// How many channels RAM is written or read with where nobody says.
#pragma once

#include <cstdint>

namespace qvmstate::vmstate {

/// As many as the CPUs and the RAM are good for, at least 1.
unsigned default_channels(uint64_t ram_bytes);

}  // namespace qvmstate::vmstate
