// XXH3_128bits_update() for CPUs with AVX2.
#pragma once

#include <stddef.h>

namespace qvmstate::vmstate {

/// `state` is an XXH3_state_t.
void xxh3_update_avx2(void *state, const void *bytes, size_t count);

}  // namespace qvmstate::vmstate
