#include "abi/device.h"

#include <cstring>

namespace unicorn_host {
namespace {

enum class Register : uint64_t {
  ticks_low = 0,
  ticks_high = 4,
  alarm = 8,
  console = 12,
  power = 16
};

// Of registers(): alarm_at_, latched_high_, off_.
constexpr size_t high_at = 8;
constexpr size_t off_at = 12;
constexpr size_t state_bytes = 13;

}  // namespace

uint32_t Device::read(uint64_t offset, uint64_t ticks) {
  switch (static_cast<Register>(offset)) {
    case Register::ticks_low:
      latched_high_ = static_cast<uint32_t>(ticks >> 32);
      return static_cast<uint32_t>(ticks);
    case Register::ticks_high:
      return latched_high_;
    case Register::alarm:
      return ticks >= alarm_at_ ? 1 : 0;
    default:
      return 0;
  }
}

void Device::write(uint64_t offset, uint32_t value, uint64_t ticks) {
  switch (static_cast<Register>(offset)) {
    case Register::alarm:
      alarm_at_ = ticks + value;
      break;
    case Register::console:
      console_ += static_cast<char>(value);
      break;
    case Register::power:
      off_ = true;
      break;
    default:
      break;
  }
}

std::vector<uint8_t> Device::registers() const {
  std::vector<uint8_t> state(state_bytes);
  std::memcpy(state.data(), &alarm_at_, sizeof alarm_at_);
  std::memcpy(state.data() + high_at, &latched_high_, sizeof latched_high_);
  state[off_at] = off_ ? 1 : 0;
  return state;
}

bool Device::set_registers(const std::vector<uint8_t> &state) {
  if (state.size() != state_bytes) {
    return false;
  }
  std::memcpy(&alarm_at_, state.data(), sizeof alarm_at_);
  std::memcpy(&latched_high_, state.data() + high_at, sizeof latched_high_);
  off_ = state[off_at] != 0;
  return true;
}

}  // namespace unicorn_host
