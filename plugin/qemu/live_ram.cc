#include "plugin/qemu/live_ram.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstring>

#include "qcow2/io/offsets.h"
#include "qcow2/io/signals.h"

namespace qvmstate::qemu {
namespace {

// Units lie on multiples of this in the address space, as huge pages do: releasing a part of one
// would split it, and memory of split pages takes much longer to protect the next time.
constexpr uint64_t unit_bytes = 2 * mib;
constexpr uint64_t slots_most = 128;
constexpr uint64_t slots_min = 8;
constexpr uint64_t slots_share = 8;  // of the RAM's units

}  // namespace

Result<PagePool> PagePool::create(uint64_t bytes) {
  void *memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    return fail_errno(errno, "memory for pages that the guest writes to");
  }
  (void)::madvise(memory, bytes, MADV_HUGEPAGE);
  PagePool pool;
  pool.memory_ = {static_cast<std::byte *>(memory), bytes};
  return pool;
}

PagePool::~PagePool() {
  if (!memory_.empty()) {
    ::munmap(memory_.data(), memory_.size());
  }
}

LiveRam::LiveRam(std::unique_ptr<InProcessSource> memory, std::vector<uint64_t> addresses,
                 WriteProtection protection)
    : memory_(std::move(memory)),
      addresses_(std::move(addresses)),
      protection_(std::move(protection)) {}

Result<std::unique_ptr<LiveRam>> LiveRam::begin(std::vector<HostRamBlock> blocks,
                                                WriteProtection protection) {
  std::vector<uint64_t> addresses;
  std::vector<MemoryRange> ranges;
  for (const HostRamBlock &block : blocks) {
    addresses.push_back(*block.address);
    ranges.push_back({*block.address, block.block.used_bytes});
  }
  QV_ASSIGN(auto memory, InProcessSource::open(std::move(blocks)));
  std::unique_ptr<LiveRam> ram(
      new LiveRam(std::move(memory), std::move(addresses), std::move(protection)));
  for (size_t i = 0; i < ram->addresses_.size(); ++i) {
    const uint64_t last = ram->blocks()[i].used_bytes - 1;
    ram->units_.emplace_back(ram->unit_at(i, last).index + 1);
  }
  uint64_t units = 0;
  for (const auto &of_block : ram->units_) {
    units += of_block.size();
  }
  QV_ASSIGN(ram->pool_, PagePool::create(units * unit_bytes));
  ram->slots_max_ = std::clamp(units / slots_share, slots_min, slots_most);
  ram->wake_ = Descriptor(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!ram->wake_) {
    return fail_errno(errno, "creating an eventfd");
  }
  // Served before anything can wait for it.
  const io::SignalsBlocked blocked;
  ram->server_ = std::thread([live = ram.get()] { live->serve(); });
  QV_TRY(ram->protection_.protect(ranges));
  return ram;
}

LiveRam::~LiveRam() {
  stop_serving();
}

void LiveRam::stop_serving() {
  if (server_.joinable()) {
    {
      const std::lock_guard lock(mutex_);
      ending_ = true;
    }
    wake_server();
    server_.join();
  }
  protection_.end();
}

void LiveRam::wake_server() {
  const uint64_t one = 1;
  // It has room for more ones than there can be events.
  [[maybe_unused]] const ssize_t written = ::write(wake_.get(), &one, sizeof one);
}

Result<LiveRam::Statistics> LiveRam::finish() {
  stop_serving();
  const std::lock_guard lock(mutex_);
  if (failure_) {
    return tl::unexpected(*failure_);
  }
  return statistics_;
}

// ---- where a unit is

LiveRam::UnitId LiveRam::unit_at(size_t block, uint64_t offset) const {
  const uint64_t address = addresses_[block];
  return {block, (address + offset) / unit_bytes - address / unit_bytes};
}

std::optional<LiveRam::UnitId> LiveRam::find(uint64_t address) const {
  for (size_t block = 0; block < addresses_.size(); ++block) {
    if (address >= addresses_[block] &&
        address - addresses_[block] < memory_->blocks()[block].used_bytes) {
      return unit_at(block, address - addresses_[block]);
    }
  }
  return std::nullopt;
}

vmstate::RamRange LiveRam::range_of(UnitId id) const {
  const uint64_t address = addresses_[id.block];
  const uint64_t first = round_down(address, unit_bytes) + id.index * unit_bytes;
  const uint64_t begin = std::max(first, address) - address;
  const uint64_t end =
      std::min(first + unit_bytes - address, memory_->blocks()[id.block].used_bytes);
  return {id.block, begin, end - begin};
}

MemoryRange LiveRam::memory_of(UnitId id) const {
  const vmstate::RamRange range = range_of(id);
  return {addresses_[id.block] + range.offset, range.bytes};
}

// ---- the one who reads

Result<vmstate::RamSource::Presence> LiveRam::presence(size_t block, uint64_t offset) {
  const std::lock_guard lock(mutex_);
  const UnitId id = unit_at(block, offset);
  const vmstate::RamRange range = range_of(id);
  const uint64_t left = range.offset + range.bytes - offset;
  if (unit(id).state == State::pooled) {
    return Presence{true, left};
  }
  // What is untouched now was so at the moment of the protection: memory that is taken away is
  // noticed.
  QV_ASSIGN(Presence presence, memory_->presence(block, offset));
  presence.bytes = std::min(presence.bytes, left);
  return presence;
}

Result<void> LiveRam::read_pages(size_t block, uint64_t offset, size_t count, size_t page_bytes,
                                 std::byte *to, size_t stride) {
  // Held while memory is read, so that it is not released meanwhile.
  const std::lock_guard lock(mutex_);
  const UnitId id = unit_at(block, offset);
  const Unit &from = unit(id);
  if (from.state != State::pooled) {
    assert(from.state == State::waiting);
    return memory_->read_pages(block, offset, count, page_bytes, to, stride);
  }
  const std::byte *kept = pool_.data() + from.slot * unit_bytes + (offset - range_of(id).offset);
  for (size_t i = 0; i < count; ++i) {
    std::memcpy(to + i * stride, kept + i * page_bytes, page_bytes);
  }
  return {};
}

Result<std::optional<vmstate::RamRange>> LiveRam::next() {
  const std::lock_guard lock(mutex_);
  if (failure_) {
    return tl::unexpected(*failure_);
  }
  reading_ = true;
  QV_TRY(leave_current());
  current_ = choose();
  if (!current_) {
    return std::nullopt;
  }
  return range_of(*current_);
}

Result<void> LiveRam::leave_current() {
  if (!current_) {
    return {};
  }
  Unit &left = unit(*current_);
  if (left.state == State::waiting) {
    QV_TRY(release(*current_));
  } else {
    free_slots_.push_back(left.slot);
  }
  left.state = State::done;
  current_.reset();
  while (!delayed_.empty() && has_slot()) {
    const UnitId id = delayed_.front();
    delayed_.pop_front();
    if (unit(id).state == State::waiting) {
      QV_TRY(pool(id));
    }
  }
  return {};
}

std::optional<LiveRam::UnitId> LiveRam::choose() {
  while (!pooled_.empty()) {
    const UnitId id = pooled_.front();
    pooled_.pop_front();
    if (unit(id).state == State::pooled) {
      return id;
    }
  }
  for (; cursor_.block < units_.size(); cursor_ = {cursor_.block + 1, 0}) {
    for (; cursor_.index < units_[cursor_.block].size(); ++cursor_.index) {
      if (unit(cursor_).state != State::done) {
        return cursor_;
      }
    }
  }
  return std::nullopt;
}

// ---- the serving thread

void LiveRam::serve() {
  for (;;) {
    pollfd waiting[2] = {{protection_.descriptor(), POLLIN, 0}, {wake_.get(), POLLIN, 0}};
    if (::poll(waiting, 2, -1) < 0 && errno != EINTR) {
      return;
    }
    uint64_t ones = 0;
    [[maybe_unused]] const ssize_t bytes = ::read(wake_.get(), &ones, sizeof ones);
    const auto served = serve_events();
    const std::lock_guard lock(mutex_);
    if (!served) {
      failure_ = served.error();
      protection_.end();  // nobody waits for what is not served
    }
    if (!served || ending_) {
      return;
    }
  }
}

Result<void> LiveRam::serve_events() {
  for (;;) {
    // Memory is taken away once its event is read: not between a unit's being read and its being
    // noted as done.
    const std::lock_guard lock(mutex_);
    if (!deferred_.empty()) {
      const WriteProtection::Event event = deferred_.front();
      deferred_.pop_front();
      QV_TRY(serve_event(event));
      continue;
    }
    QV_ASSIGN(const auto event, protection_.next_event());
    if (!event) {
      return {};
    }
    QV_TRY(serve_event(*event));
  }
}

/// Events that are in the way are read; writes among them are served later.
Result<void> LiveRam::release(UnitId id) {
  for (;;) {
    QV_ASSIGN(const bool released, protection_.release(memory_of(id)));
    if (released) {
      return {};
    }
    QV_ASSIGN(const auto event, protection_.next_event());
    if (event && event->kind == WriteProtection::Event::Kind::removal) {
      note_removal(event->range);
    } else if (event) {
      deferred_.push_back(*event);
      wake_server();
    }
  }
}

bool LiveRam::has_slot() const {
  return !reading_ || next_slot_ - free_slots_.size() < slots_max_;
}

uint32_t LiveRam::take_slot() {
  if (free_slots_.empty()) {
    return next_slot_++;
  }
  const uint32_t slot = free_slots_.back();
  free_slots_.pop_back();
  return slot;
}

Result<void> LiveRam::serve_event(const WriteProtection::Event &event) {
  if (event.kind == WriteProtection::Event::Kind::removal) {
    note_removal(event.range);
    return {};
  }
  const auto id = find(event.range.address);
  return id ? serve_write(*id) : Result<void>();
}

Result<void> LiveRam::serve_write(UnitId id) {
  if (unit(id).state != State::waiting) {
    // Released since: who wrote may have begun to wait just then.
    return release(id);
  }
  if (has_slot()) {
    return pool(id);
  }
  ++statistics_.writes_delayed;
  if (std::ranges::find(delayed_, id) == delayed_.end()) {
    delayed_.push_back(id);
  }
  return {};
}

/// There is a slot for it.
Result<void> LiveRam::pool(UnitId id) {
  const vmstate::RamRange range = range_of(id);
  Unit &pooled = unit(id);
  pooled.slot = take_slot();
  QV_TRY(memory_->read_pages(range.block, range.offset, range.bytes / 4096, 4096,
                             pool_.data() + pooled.slot * unit_bytes, 4096));
  pooled.state = State::pooled;
  if (id != current_) {
    pooled_.push_back(id);
  }
  ++statistics_.writes_served;
  return release(id);
}

void LiveRam::note_removal(const MemoryRange &range) {
  for (size_t block = 0; block < addresses_.size(); ++block) {
    const uint64_t begin = std::max(range.address, addresses_[block]);
    const uint64_t end = std::min(range.address + range.bytes,
                                  addresses_[block] + memory_->blocks()[block].used_bytes);
    for (uint64_t at = begin; at < end; at = round_down(at, unit_bytes) + unit_bytes) {
      if (unit(unit_at(block, at - addresses_[block])).state == State::waiting && !failure_) {
        failure_ = Error{ErrorCode::bad_state, 0,
                         "memory was taken from the guest (a balloon, free page reporting) before "
                         "it was copied; save again when that is over, or without --live"};
      }
    }
  }
}

}  // namespace qvmstate::qemu
