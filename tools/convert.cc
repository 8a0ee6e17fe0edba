// convert: the VM state of a snapshot in another layout, compressed or not compressed any more.
//
// The snapshot keeps its disk, id, name and date. One header write puts the new state into the
// place of the old one, so that a crash leaves the one or the other. With --compress and another
// layout, or pages that QEMU sent encoded, there are two such writes: the other one comes first.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <future>
#include <memory>
#include <optional>
#include <system_error>
#include <utility>

#include "qcow2/image_edit.h"
#include "qcow2/image_set.h"
#include "qcow2/io/signals.h"
#include "qcow2/suitability.h"
#include "tools/commands.h"
#include "tools/format.h"
#include "tools/state_source.h"
#include "tools/state_work.h"
#include "vmstate/compressed_copy.h"
#include "vmstate/read_ahead_source.h"

namespace qvmstate::tools {

namespace {

struct Converted {
  vmstate::Layout layout = vmstate::Layout::legacy;
  uint64_t stream_bytes = 0;
  uint64_t stored_bytes = 0;  ///< of it, in compressed clusters; 0: not compressed
};

unsigned threads_or_default(unsigned threads) {
  const long cpus = ::sysconf(_SC_NPROCESSORS_ONLN);
  return threads != 0
             ? threads
             : static_cast<unsigned>(std::clamp<long>(cpus, 1, vmstate::compress_threads_max));
}

/// Writes the state through the edit; its exact length and checksum.
Result<vmstate::StateChecksum> write_plain(qcow2::Image &image, const CheckedSnapshot &state,
                                           vmstate::Layout layout, qcow2::ImageEdit &edit) {
  qcow2::VmstateArea &area = edit.vmstate();
  const vmstate::TransferTarget target = {.file = &image.file(),
                                          .sequential = &area,
                                          .fixed = &area,
                                          .all_pages_present = true,
                                          .checksum = true};
  vmstate::StreamStats stats;
  if (vmstate::can_be_copied(state.stream, layout)) {
    QV_ASSIGN(auto opened, state.opener());
    QV_ASSIGN(const auto source, vmstate::ReadAheadSource::create(std::move(opened)));
    edit.expect_stream_bytes(state.stream.stream_bytes);
    QV_ASSIGN(stats, vmstate::copy_stream(*source, StreamOffset(0), state.stream.stream_bytes,
                                          target, cancel_hook()));
  } else {
    QV_ASSIGN(const auto stored, stored_state(state));
    area.expect_fixed_bytes(state.stream.data_pages * state.stream.page_bytes);
    QV_ASSIGN(stats, vmstate::write_state_anew(*stored, layout, target, cancel_hook()));
  }
  if (layout == vmstate::Layout::mapped_ram) {
    QV_TRY(area.finish_fixed(stats.stream_bytes));
  }
  return *stats.checksum;
}

Result<std::unique_ptr<qcow2::ImageEdit>> begin_edit(qcow2::Image &image, const std::string &name) {
  const auto index = static_cast<size_t>(qcow2::find_snapshot(image.snapshots(), name));
  QV_ASSIGN(auto edit, qcow2::ImageEdit::begin(image));
  QV_TRY(edit->replace_vmstate(index));
  return edit;
}

Result<vmstate::CompressedCopy> write_compressed(const qcow2::Image &image,
                                                 const FoundSnapshot &state, uint64_t stream_bytes,
                                                 unsigned threads, qcow2::ImageEdit &edit,
                                                 const vmstate::TransferHook &hook) {
  QV_ASSIGN(auto opened, state.opener());
  QV_ASSIGN(const auto source, vmstate::ReadAheadSource::create(std::move(opened)));
  return vmstate::copy_compressed(*source, stream_bytes, image.header(), edit.compressed_vmstate(),
                                  threads_or_default(threads), hook);
}

Result<Converted> commit(qcow2::Image &image, qcow2::ImageEdit &edit, vmstate::Layout layout,
                         const vmstate::CompressedCopy &copy) {
  edit.set_added_extra(vmstate::format_checksum(copy.checksum));
  QV_TRY(image.file().sync());
  QV_TRY(edit.commit(copy.checksum.stream_bytes));
  edit.give_back_space();
  return Converted{layout, copy.checksum.stream_bytes, copy.stored_bytes};
}

/// One edit.
Result<Converted> convert_once(qcow2::Image &image, const CheckedSnapshot &state,
                               vmstate::Layout layout, const ConvertCommand &command,
                               bool compress) {
  QV_ASSIGN(const auto edit, begin_edit(image, command.name));
  vmstate::CompressedCopy copy;
  if (compress) {
    QV_ASSIGN(copy, write_compressed(image, state, state.stream.stream_bytes, command.threads,
                                     *edit, cancel_hook()));
  } else {
    QV_ASSIGN(copy.checksum, write_plain(image, state, layout, *edit));
  }
  return commit(image, *edit, layout, copy);
}

/// Looks at a state on a thread of its own. To be had once is_over() or at the end.
class CheckBeside {
 public:
  static Result<CheckBeside> start(const FoundSnapshot &found) {
    const io::SignalsBlocked blocked;
    try {
      return CheckBeside(std::async(std::launch::async, check_snapshot, found));
    } catch (const std::system_error &error) {
      return fail(ErrorCode::io, std::string("cannot start a thread: ") + error.what(),
                  error.code().value());
    }
  }
  bool is_over() const {
    return result_.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
  }
  const Result<CheckedSnapshot> &result() const { return result_.get(); }

 private:
  explicit CheckBeside(std::future<Result<CheckedSnapshot>> result) : result_(result.share()) {}
  std::shared_future<Result<CheckedSnapshot>> result_;
};

/// Compresses a state that says how long it is while another thread looks at all of it, and commits
/// when both are done. Nothing: its pages must be written anew first.
Result<std::optional<Converted>> compress_as_it_is(qcow2::Image &image, const FoundSnapshot &found,
                                                   uint64_t stream_bytes, unsigned threads) {
  QV_ASSIGN(const CheckBeside check, CheckBeside::start(found));
  QV_ASSIGN(const auto edit, begin_edit(image, found.snapshot->name));
  const vmstate::TransferHook hook = [&check, cancel = cancel_hook()]() -> Result<void> {
    QV_TRY(cancel());
    return check.is_over() && !check.result() ? tl::unexpected(check.result().error())
                                              : Result<void>();
  };
  const auto copy = write_compressed(image, found, stream_bytes, threads, *edit, hook);
  const Result<CheckedSnapshot> &state = check.result();
  if (!state) {  // which tells more than a copy that could not be read
    return tl::unexpected(state.error());
  }
  if (!copy) {
    return tl::unexpected(copy.error());
  }
  if (!vmstate::has_plain_pages(state->stream)) {
    return std::optional<Converted>();
  }
  QV_ASSIGN(const Converted converted, commit(image, *edit, state->stream.layout, *copy));
  return std::optional(converted);
}

Result<Converted> convert(const ConvertCommand &command) {
  QV_ASSIGN(OpenImage opened, open_image(command.image, true, true));
  QV_TRY(qcow2::check_image_suits(opened.image, qcow2::ImageRole::vmstate, qcow2::Bitmaps::allow));
  if (qcow2::needs_recovery({&opened.image})) {
    return fail(ErrorCode::bad_state,
                command.image +
                    ": holds a part of a save over several disks that was interrupted; "
                    "`qvmstate resume` on the running VM settles it");
  }
  qcow2::Image &image = opened.image;
  QV_ASSIGN(FoundSnapshot found, found_snapshot(image, command.name));
  const auto saved = vmstate::parse_checksum(found.snapshot->more_extra);
  if (command.compress && !command.layout && saved) {
    QV_ASSIGN(const auto compressed,
              compress_as_it_is(image, found, saved->stream_bytes, command.threads));
    if (compressed) {
      return *compressed;
    }
  }
  QV_ASSIGN(CheckedSnapshot state, check_snapshot(std::move(found)));
  const vmstate::Layout layout = command.layout.value_or(state.stream.layout);
  Converted converted;
  if (!command.compress || layout != state.stream.layout ||
      !vmstate::has_plain_pages(state.stream)) {
    QV_ASSIGN(converted, convert_once(image, state, layout, command, false));
    if (command.compress) {
      QV_ASSIGN(state, checked_snapshot(image, command.name));
    }
  }
  if (command.compress) {
    QV_ASSIGN(converted, convert_once(image, state, layout, command, true));
  }
  return converted;
}

}  // namespace

int run_convert(const ConvertCommand &command) {
  const auto begin = std::chrono::steady_clock::now();
  const Result<Converted> converted = convert(command);
  if (!converted) {
    return report_failure("convert", converted.error(), command.format);
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (command.format == Format::json) {
    return finish("convert", to_line({{"event", "completed"},
                                      {"operation", "convert"},
                                      {"filename", command.image},
                                      {"name", command.name},
                                      {"layout", vmstate::layout_name(converted->layout)},
                                      {"size", converted->stream_bytes},
                                      {"compressed", command.compress},
                                      {"stored-bytes", converted->stored_bytes},
                                      {"total-seconds", seconds}}));
  }
  std::string text = fmt::format("'{}' in {} is a {} stream of {} now", printable(command.name),
                                 printable(command.image), vmstate::layout_name(converted->layout),
                                 format_size(converted->stream_bytes));
  if (command.compress) {
    text += fmt::format(", compressed to {}", format_size(converted->stored_bytes));
  }
  return finish("convert", text + fmt::format(", in {}\n", format_seconds(seconds)));
}

}  // namespace qvmstate::tools
