// The descriptors of one file, and what both real backends do with them synchronously.
//
// A file is opened twice: the buffered descriptor serves synchronous calls and transfers that are
// not aligned; the direct one, a second open file description with O_DIRECT, serves aligned
// transfers. It is absent where the file system does not allow O_DIRECT or the user does not want
// it. The buffered one is absent only if somebody passed nothing but an O_DIRECT one for reading
// and it cannot be opened anew; reads that are not aligned then go through a buffer of their own.
//
// Threads: for_transfer() and the accessors may be called from several at a time, the rest from
// one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
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
  /// Over descriptors that somebody else opened. They belong to the result from the call on, and
  /// are closed when it ends as well as on every refusal. For writing two are needed, one with
  /// O_DIRECT and one without, in any order; for reading one of either kind will do. Refused, each
  /// by its own message (ErrorCode::bad_argument): another number of them, one that is not open,
  /// that is neither a regular file nor a block device, duplicates of one open file description,
  /// different files, not exactly one with O_DIRECT, the wrong access mode, O_APPEND.
  /// `mode` on: refused if O_DIRECT does not work there; off: the O_DIRECT one is not used, if
  /// there is another.
  static Result<Descriptors> adopt(std::span<const int> passed, bool writable, DirectMode mode,
                                   const std::string &name);
  Descriptors() = default;  ///< none
  Descriptors(Descriptors &&other) noexcept;
  Descriptors &operator=(Descriptors &&other) noexcept;
  ~Descriptors();

  /// More descriptors of the same open file descriptions, for another File over the same file.
  Result<Descriptors> duplicate(const std::string &name) const;

  int buffered() const { return buffered_; }  ///< -1: absent
  int direct() const { return direct_; }      ///< -1: absent
  uint32_t direct_alignment() const { return direct_alignment_; }
  /// The one for what is neither a read nor a write.
  int any() const { return buffered_ >= 0 ? buffered_ : direct_; }
  bool is_block_device() const { return is_block_device_; }
  bool on_fuse() const;
  /// pread() of anything, aligned or not: a count of bytes, 0 at the end, or -errno.
  int64_t read(void *data, size_t bytes, uint64_t offset) const;
  /// Whether this transfer takes the direct descriptor.
  bool takes_direct(const BackendOp &op) const;

 private:
  Result<void> open_direct(const std::string &path, int flags, DirectMode mode,
                           const std::string &name);
  Result<void> adopt_direct(DirectMode mode, const std::string &name);
  void adopt_only_direct();
  int64_t read_bounced(std::byte *data, size_t bytes, uint64_t offset) const;

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
