// The descriptors of one file, and what both real backends do with them synchronously.
//
// A file is opened twice: the buffered descriptor serves synchronous calls and transfers that are
// not aligned; the direct one, a second open file description with O_DIRECT, serves aligned
// transfers. It is absent where the file system does not allow O_DIRECT or the user does not want
// it.
//
// Threads: for_transfer() and the accessors may be called from several at a time, the rest from
// one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "qcow2/io/backend.h"
#include "qcow2/io/file.h"
#include "qcow2/io/result.h"

namespace qvmstate::io {

class Descriptors {
 public:
  /// `name` is for error messages.
  static Result<Descriptors> open(const std::string &path, bool writable, DirectMode mode,
                                  const std::string &name);
  Descriptors(Descriptors &&other) noexcept;
  Descriptors &operator=(Descriptors &&other) noexcept;
  ~Descriptors();

  int buffered() const { return buffered_; }
  int direct() const { return direct_; }  ///< -1: absent
  uint32_t direct_alignment() const { return direct_alignment_; }
  bool is_block_device() const { return is_block_device_; }
  /// Whether this transfer takes the direct descriptor.
  bool takes_direct(const BackendOp &op) const;

 private:
  Descriptors() = default;
  Result<void> open_direct(const std::string &path, int flags, DirectMode mode,
                           const std::string &name);

  int buffered_ = -1;
  int direct_ = -1;
  uint32_t direct_alignment_ = 1;
  bool is_block_device_ = false;
};

/// A backend over real descriptors; what is left to its heirs is asynchronous transfers.
class DescriptorBackend : public Backend {
 public:
  explicit DescriptorBackend(Descriptors &&descriptors) : descriptors_(std::move(descriptors)) {}

  bool direct() const override { return descriptors_.direct() >= 0; }
  uint32_t direct_alignment() const override { return descriptors_.direct_alignment(); }
  int64_t read_some(void *data, size_t bytes, uint64_t offset) override;
  int64_t write_some(const void *data, size_t bytes, uint64_t offset) override;
  int sync() override;
  int64_t size() override;
  int resize(uint64_t bytes) override;
  int preallocate(uint64_t offset, uint64_t bytes) override;
  int punch_hole(uint64_t offset, uint64_t bytes) override;
  bool is_block_device() const override { return descriptors_.is_block_device(); }
  std::vector<int> descriptors() const override;

 protected:
  Descriptors descriptors_;
};

}  // namespace qvmstate::io
