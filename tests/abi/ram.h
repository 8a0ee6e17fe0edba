// The host's RAM: blocks of this process's memory, each at an address of the guest, and which of
// their pages were written since somebody asked.
//
// Threads: one at a time, except that data() may be read by others.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace unicorn_host {

class RamBlock {
 public:
  /// Zeros.
  RamBlock(std::string name, uint64_t address, uint64_t bytes, uint64_t page_bytes);

  const std::string &name() const { return name_; }
  uint64_t address() const { return address_; }
  uint64_t bytes() const { return bytes_; }
  uint8_t *data() const { return data_.get(); }

  /// As a machine finds it: by turns a MiB of random bytes, one of words that
  /// repeat, two of zeros.
  void fill(uint64_t seed);
  uint64_t hash() const;
  void write_to(const std::string &path) const;

  /// Notes the pages of these bytes if they lie in this block.
  void note_write(uint64_t address, uint64_t bytes);
  /// A bit for each page noted since the last call.
  std::vector<uint64_t> take_dirty();

 private:
  struct Unmap {
    size_t bytes;
    void operator()(uint8_t *data) const;
  };

  std::string name_;
  uint64_t address_;
  uint64_t bytes_;
  uint64_t page_bytes_;
  std::unique_ptr<uint8_t[], Unmap> data_;
  std::vector<uint64_t> dirty_;
};

}  // namespace unicorn_host
