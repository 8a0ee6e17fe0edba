// Compiled as C++20: the header of the C ABI, twice, and before anything else.
#include "plugin/qvmstate.h"

int abi_header_in_cxx(const qvmstate_api &api) {
  return api.version == QVMSTATE_API_VERSION ? QVMSTATE_OK : QVMSTATE_NOT_SUPPORTED;
}
