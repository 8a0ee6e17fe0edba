// A machine's state into an image: while the machine stands, or in rounds while it runs on.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "abi/machine.h"
#include "abi/session.h"

namespace unicorn_host {

/// Where the host kills itself (SIGKILL).
enum class Death { none, in_ram, between_rounds, in_sections };

struct SaveOptions {
  std::string name;
  bool mapped_ram = false;
  bool replace = false;
  bool may_free = false;
  unsigned rounds = 0;              ///< 0: the machine stands
  uint64_t round_instructions = 0;  ///< that it executes while a round is written
  bool forget_last_round = false;   ///< a mistake of the host
  Death death = Death::none;
};

/// Prints a line about what was saved.
std::optional<Failure> save(Session &session, Machine &machine, const SaveOptions &options);

}  // namespace unicorn_host
