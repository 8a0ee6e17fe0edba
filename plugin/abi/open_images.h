// The images that sessions of this process have open.
//
// Locks of files keep other programs out, and sessions that opened an image by its name. They do
// not tell sessions apart that were given the same open file: that is what this is for.
//
// Threads: any.
#pragma once

#include <sys/stat.h>

#include <string>

#include "plugin/abi/failure.h"

namespace qvmstate::abi {

class OpenImage {
 public:
  OpenImage() = default;
  ~OpenImage();
  OpenImage(const OpenImage &) = delete;
  OpenImage &operator=(const OpenImage &) = delete;

  /// LOCKED if another one has the file, and either of them writes. Called once.
  Outcome<void> enter(int descriptor, bool writable, const std::string &image_name);

 private:
  bool is_same_file(const OpenImage &other) const;

  struct stat status_ = {};
  bool writable_ = false;
  bool entered_ = false;
  OpenImage *next_ = nullptr;  // in the list of all
};

}  // namespace qvmstate::abi
