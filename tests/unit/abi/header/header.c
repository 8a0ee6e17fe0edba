/* Compiled as C99 and as C11: the header of the C ABI, twice, and before anything else. */
#include "plugin/qvmstate.h"
#include "plugin/qvmstate.h"

int abi_header_in_c(const struct qvmstate_api *api);

int abi_header_in_c(const struct qvmstate_api *api) {
  return api->version == QVMSTATE_API_VERSION ? QVMSTATE_OK : QVMSTATE_NOT_SUPPORTED;
}
