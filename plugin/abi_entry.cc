// What any emulator but QEMU sees of libqvmstate.so: the entry of the C ABI (qvmstate.h).
#include <type_traits>

#include "plugin/abi/api.h"
#include "plugin/qvmstate.h"

extern "C" {
__attribute__((visibility("default"))) const qvmstate_api *qvmstate_get_api(uint32_t version,
                                                                            qvmstate_error *error);
}

const qvmstate_api *qvmstate_get_api(uint32_t version, qvmstate_error *error) {
  return qvmstate::abi::get_api(version, error);
}

static_assert(std::is_same_v<decltype(&qvmstate_get_api), qvmstate_get_api_fn>);
