// A machine's state out of an image.
#pragma once

#include <optional>
#include <string>

#include "abi/machine.h"
#include "abi/session.h"

namespace unicorn_host {

struct LoadOptions {
  std::string name;
  bool without_console = false;  ///< the host does not know this section
  bool skip_unknown = false;
};

std::optional<Failure> load(Session &session, Machine &machine, const LoadOptions &options);

}  // namespace unicorn_host
