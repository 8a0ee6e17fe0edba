// The host's only device: a console, a power switch and a timer that counts executed instructions,
// so that a guest that looks at the time does the same in each run. guest_x86_64.s lists its
// registers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace unicorn_host {

class Device {
 public:
  static constexpr uint64_t address = 0xf0000000;
  static constexpr uint64_t bytes = 4096;

  uint32_t read(uint64_t offset, uint64_t ticks);
  void write(uint64_t offset, uint32_t value, uint64_t ticks);

  bool is_off() const { return off_; }
  const std::string &console() const { return console_; }
  void set_console(std::string text) { console_ = std::move(text); }

  /// All but the console.
  std::vector<uint8_t> registers() const;
  /// False: these are not bytes of registers().
  bool set_registers(const std::vector<uint8_t> &state);

 private:
  uint64_t alarm_at_ = 0;
  uint32_t latched_high_ = 0;
  bool off_ = false;
  std::string console_;
};

}  // namespace unicorn_host
