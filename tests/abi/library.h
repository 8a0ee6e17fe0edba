// libqvmstate.so, loaded as any emulator loads it.
#pragma once

#include <string>

#include "plugin/qvmstate.h"

namespace unicorn_host {

/// Never unloaded.
const qvmstate_api &load_library(const std::string &path);

}  // namespace unicorn_host
