// Guest RAM as it was at one moment, read while the guest runs on and writes to it.
//
// At that moment, while the guest stands, all RAM is write-protected. It is handed out in units; a
// unit that was handed out is released. A thread of ours serves the guest's writes to units that
// are still protected: it copies the unit into a pool and releases it. Once reading has begun the
// pool is bounded: when it is full, the writer waits until the one who reads has taken a unit out
// of it. (Before, the reader may still wait for QEMU, so that nothing in QEMU may wait for the
// reader.) What is in the pool is handed out first, so reading has an order of its own.
//
// What cannot be held back, memory that is taken from the guest (a balloon), makes the reading fail
// if it was not read yet.
//
// The serving thread calls nothing of QEMU's and takes no lock of QEMU's: QEMU's threads may hold
// any while they wait for it.
//
// Threads: as for every source one at a time; the serving thread is inside.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "plugin/qemu/descriptor.h"
#include "plugin/qemu/inprocess_source.h"
#include "plugin/qemu/write_protection.h"
#include "vmstate/ram_source.h"

namespace qvmstate::qemu {

/// Memory of this process, in huge pages where that can be had.
class PagePool {
 public:
  static Result<PagePool> create(uint64_t bytes);
  PagePool() = default;
  PagePool(PagePool &&other) noexcept : memory_(std::exchange(other.memory_, {})) {}
  PagePool &operator=(PagePool &&other) noexcept {
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~PagePool();
  std::byte *data() const { return memory_.data(); }

 private:
  std::span<std::byte> memory_;
};

class LiveRam : public vmstate::RamSource, private vmstate::RamOrder {
 public:
  /// Protects memory that can be (protectable_ram.h). The guest stands.
  static Result<std::unique_ptr<LiveRam>> begin(std::vector<HostRamBlock> blocks,
                                                WriteProtection protection);
  /// Releases everything.
  ~LiveRam() override;

  std::span<const vmstate::RamBlock> blocks() const override { return memory_->blocks(); }
  const std::byte *view(size_t) const override { return nullptr; }
  Result<Presence> presence(size_t block, uint64_t offset) override;
  Result<void> read_pages(size_t block, uint64_t offset, size_t count, size_t page_bytes,
                          std::byte *to, size_t stride) override;
  vmstate::RamOrder *order() override { return this; }

  struct Statistics {
    uint64_t writes_served = 0;   ///< units copied because the guest wrote to them
    uint64_t writes_delayed = 0;  ///< of them, those for which the pool had no room at first
  };
  /// All was read: releases everything, and tells whether it was the RAM of that moment.
  Result<Statistics> finish();

 private:
  struct UnitId {
    size_t block = 0;
    uint64_t index = 0;
    bool operator==(const UnitId &) const = default;
  };
  enum class State : uint8_t { waiting, pooled, done };
  struct Unit {
    State state = State::waiting;
    uint32_t slot = 0;
  };

  LiveRam(std::unique_ptr<InProcessSource> memory, std::vector<uint64_t> addresses,
          WriteProtection protection);

  Result<std::optional<vmstate::RamRange>> next() override;
  Result<void> leave_current();
  std::optional<UnitId> choose();

  void serve();
  void stop_serving();
  void wake_server();
  Result<void> serve_events();
  Result<void> serve_event(const WriteProtection::Event &event);
  Result<void> serve_write(UnitId id);
  Result<void> release(UnitId id);
  bool has_slot() const;
  uint32_t take_slot();
  Result<void> pool(UnitId id);
  void note_removal(const MemoryRange &range);

  std::optional<UnitId> find(uint64_t address) const;
  UnitId unit_at(size_t block, uint64_t offset) const;
  Unit &unit(UnitId id) { return units_[id.block][id.index]; }
  /// Bytes in the block.
  vmstate::RamRange range_of(UnitId id) const;
  MemoryRange memory_of(UnitId id) const;

  std::unique_ptr<InProcessSource> memory_;
  std::vector<uint64_t> addresses_;  // of the blocks
  WriteProtection protection_;
  Descriptor wake_;  // an eventfd for the serving thread: deferred_ or ending_ changed

  std::mutex mutex_;  // for all below
  std::vector<std::vector<Unit>> units_;
  PagePool pool_;  // a slot for each unit, of which few are ever used
  std::vector<uint32_t> free_slots_;
  uint32_t next_slot_ = 0;  // from here on none was used yet
  uint64_t slots_max_ = 0;  // in use at a time, once reading has begun
  bool reading_ = false;
  std::deque<UnitId> pooled_;                    // to be handed out, oldest first
  std::deque<UnitId> delayed_;                   // written to, without room in the pool
  std::deque<WriteProtection::Event> deferred_;  // read while something else was being done
  std::optional<UnitId> current_;
  UnitId cursor_;
  Statistics statistics_;
  std::optional<Error> failure_;
  bool ending_ = false;

  std::thread server_;
};

}  // namespace qvmstate::qemu
