#include "host.h"

#include <dlfcn.h>

#include <stdexcept>

#ifdef __SANITIZE_THREAD__
// liburing maps and unmaps its rings by system calls that ThreadSanitizer does not see: two rings
// that had one address, one after the other and in two threads, look like one.
extern "C" __attribute__((visibility("default"))) const char *__tsan_default_suppressions() {
  return "race:^io_uring_\nrace:^__io_uring_\n";
}
#endif

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
