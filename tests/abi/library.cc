#include "abi/library.h"

#include <dlfcn.h>

#include "abi/check.h"

namespace unicorn_host {

const qvmstate_api &load_library(const std::string &path) {
  void *const library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    die(::dlerror());
  }
  const auto get_api = reinterpret_cast<qvmstate_get_api_fn>(::dlsym(library, QVMSTATE_ENTRY));
  check(get_api != nullptr, path + " has no " QVMSTATE_ENTRY);
  qvmstate_error error;
  const qvmstate_api *const api = get_api(QVMSTATE_API_VERSION, &error);
  if (api == nullptr) {
    die(error.message);
  }
  return *api;
}

}  // namespace unicorn_host
