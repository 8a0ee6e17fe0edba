#include "host.h"

#include <dlfcn.h>

#include <stdexcept>

namespace qvmstate::abi::test {

const qvmstate_api &api() {
  static const qvmstate_api *const table = [] {
    void *library = ::dlopen(QVMSTATE_PLUGIN, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      throw std::runtime_error(::dlerror());
    }
    const auto get_api = reinterpret_cast<qvmstate_get_api_fn>(::dlsym(library, QVMSTATE_ENTRY));
    return get_api(QVMSTATE_API_VERSION, nullptr);
  }();
  return *table;
}

}  // namespace qvmstate::abi::test
