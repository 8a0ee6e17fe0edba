// Exact transfers over a backend that may be cut short, interrupted or refused.
//
// A started transfer has a slot, whose index is the backend's cookie, until the last byte of it was
// transferred. A slot is in flight in the backend, or waits in `waiting` to be started (again).
#include "qcow2/io/file.h"

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <chrono>
#include <deque>
#include <optional>
#include <thread>
#include <utility>

#include "qcow2/io/descriptors.h"
#include "qcow2/io/thread_backend.h"
#include "qcow2/io/uring_backend.h"

namespace qvmstate::io {

namespace {

constexpr unsigned depth_max = 256;     ///< more than any disk needs with transfers of 1 MiB
constexpr unsigned retries_max = 1000;  ///< EINTR and EAGAIN in a row; about a second
constexpr unsigned stalls_max = 2;      ///< transfers of 0 bytes in a row

bool is_transient(int64_t result) {
  return result == -EINTR || result == -EAGAIN;
}

/// Called before a retry; the first few go at once.
void pause_before_retry(unsigned retries) {
  if (retries > 10) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

/// Calls `operation` until it returns something other than EINTR or EAGAIN.
template <class Operation>
int64_t until_settled(Operation operation) {
  int64_t result = operation();
  for (unsigned retries = 0; is_transient(result) && retries < retries_max; ++retries) {
    pause_before_retry(retries);
    result = operation();
  }
  return result;
}

std::string describe(OpKind kind, uint64_t bytes, uint64_t offset) {
  return std::string(kind == OpKind::read ? "cannot read " : "cannot write ") +
         std::to_string(bytes) + " bytes at offset " + std::to_string(offset);
}

std::string stall_cause(OpKind kind) {
  return kind == OpKind::read ? ": the file ends before" : ": no byte of it was accepted";
}

}  // namespace

struct File::State {
  struct Slot {
    BackendOp whole;
    uint64_t user_cookie = 0;
    size_t done = 0;
    unsigned retries = 0;
    unsigned stalls = 0;
  };

  State(Backend &used_backend, const std::string &used_name, unsigned depth);

  unsigned active() const { return static_cast<unsigned>(slots.size() - free_slots.size()); }
  bool takes_direct(const BackendOp &op) const;
  Result<void> start(BackendOp op);
  Result<void> start_waiting();
  Result<void> collect_one();
  Result<void> take_result(unsigned index, int64_t result);
  Result<void> settle();
  Result<void> check() const;
  tl::unexpected<Error> keep(tl::unexpected<Error> first);

  Backend &backend;
  const std::string &name;
  std::vector<Slot> slots;
  std::vector<unsigned> free_slots;
  std::deque<unsigned> waiting;
  std::deque<uint64_t> finished;  ///< cookies of their owners, in order of completion
  unsigned in_flight = 0;
  bool active_are_direct = false;
  std::optional<Error> error;
  uint64_t bytes_written = 0;
};

File::State::State(Backend &used_backend, const std::string &used_name, unsigned depth)
    : backend(used_backend), name(used_name), slots(depth) {
  for (unsigned i = 0; i < depth; ++i) {
    free_slots.push_back(depth - 1 - i);
  }
}

bool File::State::takes_direct(const BackendOp &op) const {
  return backend.direct() && is_aligned(op, backend.direct_alignment());
}

Result<void> File::State::check() const {
  if (error) {
    return tl::unexpected(*error);
  }
  return {};
}

/// Makes `first` the error of the file and waits for what is in flight.
tl::unexpected<Error> File::State::keep(tl::unexpected<Error> first) {
  error = first.value();
  for (; in_flight > 0; --in_flight) {
    backend.reap();
  }
  waiting.clear();
  finished.clear();
  free_slots.clear();
  for (size_t i = slots.size(); i > 0; --i) {
    free_slots.push_back(static_cast<unsigned>(i - 1));
  }
  return first;
}

Result<void> File::State::start(BackendOp op) {
  QV_TRY(check());
  assert(op.bytes > 0);
  const bool direct = takes_direct(op);
  while (free_slots.empty() || (active() > 0 && direct != active_are_direct)) {
    QV_TRY(collect_one());
  }
  const unsigned index = free_slots.back();
  free_slots.pop_back();
  active_are_direct = direct;
  Slot &slot = slots[index];
  slot = {};
  slot.user_cookie = op.cookie;
  slot.whole = op;
  slot.whole.cookie = index;
  waiting.push_back(index);
  return start_waiting();
}

/// Starts what waits. On return, if anything is active then something is in flight.
Result<void> File::State::start_waiting() {
  while (!waiting.empty()) {
    Slot &slot = slots[waiting.front()];
    BackendOp rest = slot.whole;
    rest.data += slot.done;
    rest.offset += slot.done;
    rest.bytes -= slot.done;
    const int result = backend.start(rest);
    if (result == 0) {
      waiting.pop_front();
      ++in_flight;
      continue;
    }
    if (!is_transient(result) || slot.retries == retries_max) {
      return keep(fail_errno(-result, name + ": " + describe(rest.kind, rest.bytes, rest.offset)));
    }
    if (result == -EAGAIN && in_flight > 0) {
      return {};  // The next completion makes room.
    }
    pause_before_retry(slot.retries++);
  }
  return {};
}

/// Waits for one completion, which may or may not finish a transfer.
Result<void> File::State::collect_one() {
  assert(in_flight > 0);
  const BackendCompletion completion = backend.reap();
  --in_flight;
  QV_TRY(take_result(static_cast<unsigned>(completion.cookie), completion.result));
  return start_waiting();
}

Result<void> File::State::take_result(unsigned index, int64_t result) {
  Slot &slot = slots[index];
  const BackendOp &op = slot.whole;
  const size_t left = op.bytes - slot.done;
  const auto what = [&] { return name + ": " + describe(op.kind, op.bytes, op.offset); };
  if (is_transient(result) && slot.retries < retries_max) {
    pause_before_retry(slot.retries++);
    waiting.push_back(index);
    return {};
  }
  if (result < 0) {
    return keep(fail_errno(static_cast<int>(-result), what()));
  }
  assert(static_cast<uint64_t>(result) <= left);
  size_t progress = static_cast<size_t>(result);
  if (progress < left && active_are_direct) {
    // What is resubmitted stays aligned, so that no buffered transfer runs among direct ones.
    progress = round_down(progress, backend.direct_alignment());
  }
  slot.done += progress;
  slot.retries = 0;
  slot.stalls = progress == 0 ? slot.stalls + 1 : 0;
  if (slot.done == op.bytes) {
    if (op.kind == OpKind::write) {
      bytes_written += op.bytes;
    }
    finished.push_back(slot.user_cookie);
    free_slots.push_back(index);
    return {};
  }
  if (slot.stalls == stalls_max) {
    return keep(fail(ErrorCode::io, what() + stall_cause(op.kind)));
  }
  waiting.push_back(index);
  return {};
}

/// Waits for everything in flight, keeping the cookies for wait_any().
Result<void> File::State::settle() {
  QV_TRY(check());
  while (active() > 0) {
    QV_TRY(collect_one());
  }
  return {};
}

Result<std::unique_ptr<File>> File::open(const std::string &path, const OpenOptions &options,
                                         std::string shown_name) {
  if (shown_name.empty()) {
    shown_name = path;
  }
  QV_ASSIGN(Descriptors descriptors,
            Descriptors::open(path, options.writable, options.direct, shown_name));
  return over(std::move(descriptors), options, std::move(shown_name));
}

Result<std::unique_ptr<File>> File::adopt(std::span<const int> passed, const OpenOptions &options,
                                          std::string shown_name) {
  QV_ASSIGN(Descriptors descriptors,
            Descriptors::adopt(passed, options.writable, options.direct, shown_name));
  return over(std::move(descriptors), options, std::move(shown_name));
}

Result<std::unique_ptr<File>> File::over(Descriptors &&descriptors, const OpenOptions &options,
                                         std::string shown_name) {
  const unsigned depth = std::clamp(options.depth, 1U, depth_max);
  std::unique_ptr<Backend> backend;
  const bool wants_uring = options.engine == Engine::uring ||
                           (options.engine == Engine::automatic && !descriptors.on_fuse());
  if (wants_uring) {
    auto uring = UringBackend::create(descriptors, depth);
    if (uring) {
      backend = std::move(*uring);
    } else if (options.engine == Engine::uring) {
      return tl::unexpected(with_context(std::move(uring).error(), shown_name));
    }
  }
  if (backend == nullptr) {
    auto threads = ThreadBackend::create(std::move(descriptors), depth);
    if (!threads) {
      return tl::unexpected(with_context(std::move(threads).error(), shown_name));
    }
    backend = std::move(*threads);
  }
  return std::make_unique<File>(std::move(backend), std::move(shown_name), depth);
}

File::File(std::unique_ptr<Backend> backend, std::string name, unsigned depth)
    : backend_(std::move(backend)),
      name_(std::move(name)),
      state_(std::make_unique<State>(*backend_, name_, std::clamp(depth, 1U, depth_max))) {}

File::~File() {
  (void)drain();  // An error here was returned before, or nobody asked for it.
}

std::vector<int> File::descriptors() const {
  return backend_->descriptors();
}

Result<size_t> File::read_available(std::span<std::byte> to, uint64_t offset) {
  QV_TRY(state_->settle());
  size_t done = 0;
  unsigned stalls = 0;
  while (done < to.size() && stalls < stalls_max) {
    const int64_t result = until_settled(
        [&] { return backend_->read_some(to.data() + done, to.size() - done, offset + done); });
    if (result < 0) {
      return fail_errno(static_cast<int>(-result),
                        name_ + ": " + describe(OpKind::read, to.size(), offset));
    }
    stalls = result == 0 ? stalls + 1 : 0;
    done += static_cast<size_t>(result);
  }
  return done;
}

Result<void> File::read_at(std::span<std::byte> to, HostOffset offset) {
  QV_ASSIGN(const size_t done, read_available(to, offset.value));
  if (done < to.size()) {
    return fail(ErrorCode::io, name_ + ": " + describe(OpKind::read, to.size(), offset.value) +
                                   stall_cause(OpKind::read));
  }
  return {};
}

Result<void> File::read_or_zero_at(std::span<std::byte> to, HostOffset offset) {
  QV_ASSIGN(const size_t done, read_available(to, offset.value));
  std::ranges::fill(to.subspan(done), std::byte{0});
  return {};
}

Result<void> File::write_at(std::span<const std::byte> from, HostOffset offset) {
  QV_TRY(state_->settle());
  const std::string what = name_ + ": " + describe(OpKind::write, from.size(), offset.value);
  size_t done = 0;
  unsigned stalls = 0;
  while (done < from.size()) {
    const int64_t result = until_settled([&] {
      return backend_->write_some(from.data() + done, from.size() - done, offset.value + done);
    });
    if (result < 0) {
      return state_->keep(fail_errno(static_cast<int>(-result), what));
    }
    stalls = result == 0 ? stalls + 1 : 0;
    if (stalls == stalls_max) {
      return state_->keep(fail(ErrorCode::io, what + stall_cause(OpKind::write)));
    }
    done += static_cast<size_t>(result);
  }
  state_->bytes_written += from.size();
  return {};
}

Result<void> File::sync() {
  QV_TRY(state_->settle());
  const int64_t result = until_settled([&] { return backend_->sync(); });
  if (result < 0) {
    return state_->keep(
        fail_errno(static_cast<int>(-result), name_ + ": cannot flush to the disk"));
  }
  return {};
}

Result<uint64_t> File::size() {
  QV_TRY(state_->settle());
  const int64_t result = until_settled([&] { return backend_->size(); });
  if (result < 0) {
    return fail_errno(static_cast<int>(-result), name_ + ": cannot ask for the size");
  }
  return static_cast<uint64_t>(result);
}

Result<void> File::resize(uint64_t bytes) {
  QV_TRY(state_->settle());
  const int64_t result = until_settled([&] { return backend_->resize(bytes); });
  if (result < 0) {
    return state_->keep(
        fail_errno(static_cast<int>(-result),
                   name_ + ": cannot resize to " + std::to_string(bytes) + " bytes"));
  }
  return {};
}

Result<bool> File::preallocate(HostOffset offset, uint64_t bytes) {
  return optional_operation("reserve", offset, bytes,
                            [&] { return backend_->preallocate(offset.value, bytes); });
}

Result<bool> File::punch_hole(HostOffset offset, uint64_t bytes) {
  return optional_operation("give back", offset, bytes,
                            [&] { return backend_->punch_hole(offset.value, bytes); });
}

/// For what a file system need not be able to do: false then.
Result<bool> File::optional_operation(const char *verb, HostOffset offset, uint64_t bytes,
                                      const std::function<int()> &operation) {
  QV_TRY(state_->settle());
  const int64_t result = until_settled(operation);
  if (result == -EOPNOTSUPP || result == -ENOSYS) {
    return false;
  }
  if (result < 0) {
    return state_->keep(fail_errno(static_cast<int>(-result),
                                   name_ + ": cannot " + verb + " " + std::to_string(bytes) +
                                       " bytes at offset " + std::to_string(offset.value)));
  }
  return true;
}

Result<void> File::start_write(std::span<const std::byte> data, HostOffset offset,
                               unsigned buffer_index, uint64_t cookie) {
  // A write does not touch its data; the one type of operation for both directions cannot say so.
  auto *memory = const_cast<std::byte *>(data.data());
  return state_->start({OpKind::write, memory, data.size(), offset.value, buffer_index, cookie});
}

Result<void> File::start_read(std::span<std::byte> data, HostOffset offset, unsigned buffer_index,
                              uint64_t cookie) {
  return state_->start(
      {OpKind::read, data.data(), data.size(), offset.value, buffer_index, cookie});
}

Result<uint64_t> File::wait_any() {
  QV_TRY(state_->check());
  assert(pending() > 0);
  while (state_->finished.empty()) {
    QV_TRY(state_->collect_one());
  }
  const uint64_t cookie = state_->finished.front();
  state_->finished.pop_front();
  return cookie;
}

size_t File::pending() const {
  return state_->active() + state_->finished.size();
}

Result<void> File::drain() {
  QV_TRY(state_->settle());
  state_->finished.clear();
  return {};
}

void File::clear_error() {
  state_->error.reset();
}

uint64_t File::bytes_written() const {
  return state_->bytes_written;
}

}  // namespace qvmstate::io
