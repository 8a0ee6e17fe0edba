// The functions of the C ABI.
#pragma once

#include "plugin/qvmstate.h"

namespace qvmstate::abi {

/// As qvmstate_get_api_fn.
const qvmstate_api *get_api(uint32_t version, qvmstate_error *error) noexcept;

}  // namespace qvmstate::abi
