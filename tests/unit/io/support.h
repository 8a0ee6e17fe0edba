// What the tests of qcow2/io share: patterned bytes, a temporary file, a loop device, a backend
// that watches another.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "qcow2/io/backend.h"
#include "qcow2/io/file.h"

namespace qvmstate::io {

using Bytes = std::vector<std::byte>;

/// Bytes without a period, so that a shifted or repeated block is noticed.
inline Bytes random_bytes(size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  Bytes bytes(count);
  for (std::byte &byte : bytes) {
    byte = static_cast<std::byte>(random() >> 32);
  }
  return bytes;
}

/// Memory at an address that O_DIRECT accepts.
class AlignedMemory {
 public:
  explicit AlignedMemory(size_t bytes)
      : data_(static_cast<std::byte *>(std::aligned_alloc(4096, round_up(bytes, 4096)))),
        bytes_(bytes) {
    std::fill_n(data_, bytes_, std::byte{0});
  }
  explicit AlignedMemory(const Bytes &contents) : AlignedMemory(contents.size()) {
    std::ranges::copy(contents, data_);
  }
  AlignedMemory(const AlignedMemory &) = delete;
  AlignedMemory &operator=(const AlignedMemory &) = delete;
  ~AlignedMemory() { std::free(data_); }
  std::span<std::byte> span() { return {data_, bytes_}; }
  Bytes copy() const { return {data_, data_ + bytes_}; }

 private:
  std::byte *data_;
  size_t bytes_;
};

class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string &directory = std::filesystem::temp_directory_path()) {
    path_ = directory + "/qvmstate-io-XXXXXX";
    const int descriptor = ::mkstemp(path_.data());
    EXPECT_GE(descriptor, 0) << path_;
    ::close(descriptor);
  }
  TemporaryFile(const TemporaryFile &) = delete;
  TemporaryFile &operator=(const TemporaryFile &) = delete;
  ~TemporaryFile() { ::unlink(path_.c_str()); }
  const std::string &path() const { return path_; }

 private:
  std::string path_;
};

/// A loop device over a file; path() is empty where none can be made.
class LoopDevice {
 public:
  explicit LoopDevice(const std::string &backing) {
    const int control = ::open("/dev/loop-control", O_RDWR | O_CLOEXEC);
    const int number = control < 0 ? -1 : ::ioctl(control, LOOP_CTL_GET_FREE);
    ::close(control);
    const std::string path = "/dev/loop" + std::to_string(number);
    const int file = ::open(backing.c_str(), O_RDWR | O_CLOEXEC);
    device_ = number < 0 ? -1 : ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (device_ >= 0 && ::ioctl(device_, LOOP_SET_FD, file) == 0) {
      path_ = path;
    }
    ::close(file);
  }
  ~LoopDevice() {
    if (!path_.empty()) {
      ::ioctl(device_, LOOP_CLR_FD, 0);
    }
    ::close(device_);
  }
  LoopDevice(const LoopDevice &) = delete;
  LoopDevice &operator=(const LoopDevice &) = delete;
  const std::string &path() const { return path_; }

 private:
  int device_ = -1;
  std::string path_;
};

struct Watched {
  unsigned in_flight = 0;
  unsigned in_flight_max = 0;
  uint64_t started = 0;
  uint64_t direct_started = 0;
  uint64_t buffered_started = 0;
  uint64_t mixed = 0;                ///< direct ones started while buffered were in flight, or back
  uint64_t synchronous_overlap = 0;  ///< synchronous calls while something was in flight
};

/// Hands every call on and keeps count.
class WatchingBackend : public Backend {
 public:
  WatchingBackend(std::unique_ptr<Backend> inner, Watched &watched)
      : inner_(std::move(inner)), watched_(watched) {}

  std::string name() const override { return inner_->name(); }
  bool direct() const override { return inner_->direct(); }
  uint32_t direct_alignment() const override { return inner_->direct_alignment(); }
  void register_buffers(std::span<const std::span<std::byte>> buffers) override {
    inner_->register_buffers(buffers);
  }
  int start(const BackendOp &op) override {
    const int result = inner_->start(op);
    if (result == 0) {
      const bool direct = inner_->direct() && is_aligned(op, inner_->direct_alignment());
      ++(direct ? watched_.direct_started : watched_.buffered_started);
      for (const auto &[cookie, other_direct] : directs_) {
        watched_.mixed += other_direct != direct;
      }
      directs_[op.cookie] = direct;
      ++watched_.started;
      watched_.in_flight_max = std::max(watched_.in_flight_max, ++watched_.in_flight);
    }
    return result;
  }
  BackendCompletion reap() override {
    const BackendCompletion completion = inner_->reap();
    directs_.erase(completion.cookie);
    --watched_.in_flight;
    return completion;
  }
  int64_t read_some(void *data, size_t bytes, uint64_t offset) override {
    note();
    return inner_->read_some(data, bytes, offset);
  }
  int64_t write_some(const void *data, size_t bytes, uint64_t offset) override {
    note();
    return inner_->write_some(data, bytes, offset);
  }
  int sync() override {
    note();
    return inner_->sync();
  }
  int64_t size() override {
    note();
    return inner_->size();
  }
  int resize(uint64_t bytes) override {
    note();
    return inner_->resize(bytes);
  }
  int preallocate(uint64_t offset, uint64_t bytes) override {
    note();
    return inner_->preallocate(offset, bytes);
  }
  int punch_hole(uint64_t offset, uint64_t bytes) override {
    note();
    return inner_->punch_hole(offset, bytes);
  }
  bool is_block_device() const override { return inner_->is_block_device(); }
  std::vector<int> descriptors() const override { return inner_->descriptors(); }

 private:
  void note() { watched_.synchronous_overlap += watched_.in_flight > 0; }

  std::unique_ptr<Backend> inner_;
  Watched &watched_;
  std::map<uint64_t, bool> directs_;
};

}  // namespace qvmstate::io
