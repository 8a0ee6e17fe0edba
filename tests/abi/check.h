// What the emulator host does about what cannot go wrong in a test: it says so and ends.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

namespace unicorn_host {

[[noreturn]] inline void die(const std::string &why) {
  std::fprintf(stderr, "unicorn_host: %s\n", why.c_str());
  std::exit(2);
}

inline void check(bool good, const std::string &what) {
  if (!good) {
    die(what);
  }
}

}  // namespace unicorn_host
