#include "plugin/abi/save.h"

#include <time.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "plugin/abi/sink.h"
#include "qcow2/suitability.h"
#include "vmstate/channel_count.h"
#include "vmstate/mapped_ram_reader.h"
#include "vmstate/section_scan.h"
#include "vmstate/state_checksum.h"

namespace qvmstate::abi {
namespace {

constexpr uint32_t save_flags = QVMSTATE_SAVE_REPLACE | QVMSTATE_SAVE_LIVE | QVMSTATE_SAVE_MAY_FREE;
constexpr uint32_t page_bytes_min = 4096;
constexpr size_t machine_bytes_max = 255;  // what readers take

Outcome<void> check_options(const qvmstate_save_options &options) {
  const auto wrong = [](const char *why) {
    return refuse(QVMSTATE_BAD_ARGUMENT, std::string("save_begin: ") + why);
  };
  if ((options.flags & ~save_flags) != 0) {
    return wrong("unknown flags; use QVMSTATE_SAVE_*");
  }
  if ((options.flags & QVMSTATE_SAVE_LIVE) != 0 && (options.flags & QVMSTATE_SAVE_MAY_FREE) != 0) {
    return wrong("MAY_FREE and LIVE exclude each other: a VM that runs needs its RAM");
  }
  if (options.name == nullptr) {
    return wrong("the name of the snapshot is NULL");
  }
  if (options.machine == nullptr || options.machine[0] == '\0' ||
      ::strnlen(options.machine, machine_bytes_max + 1) > machine_bytes_max) {
    return wrong("machine must have 1 to 255 bytes");
  }
  if (options.layout != QVMSTATE_LAYOUT_LEGACY && options.layout != QVMSTATE_LAYOUT_MAPPED_RAM) {
    return wrong("layout is no enum qvmstate_layout");
  }
  if (options.guest_page_bytes != 0 && (!std::has_single_bit(options.guest_page_bytes) ||
                                        options.guest_page_bytes < page_bytes_min ||
                                        options.guest_page_bytes > vmstate::page_bytes_max)) {
    return wrong("guest_page_bytes is no power of two from 4096 to 65536");
  }
  if (options.threads > vmstate::mapped_channels_max) {
    return wrong("threads are more than 64");
  }
  return {};
}

vmstate::StreamConfiguration stream_configuration(const qvmstate_save_options &options) {
  vmstate::StreamConfiguration configuration;
  configuration.machine_type = options.machine;
  if (options.guest_page_bytes != 0) {
    configuration.page_bytes = options.guest_page_bytes;
  }
  if (configuration.page_bytes != page_bytes_min) {
    // Readers take 4096 for granted.
    configuration.target_page_bits = std::countr_zero(configuration.page_bytes);
  }
  return configuration;
}

}  // namespace

Save::Save(Session &session, const qvmstate_save_options &options)
    : session_(session),
      live_((options.flags & QVMSTATE_SAVE_LIVE) != 0),
      may_free_((options.flags & QVMSTATE_SAVE_MAY_FREE) != 0),
      mapped_(options.layout == QVMSTATE_LAYOUT_MAPPED_RAM),
      threads_(options.threads),
      name_(options.name),
      configuration_(stream_configuration(options)),
      pace_("saving", options.progress, options.progress_user) {}

Outcome<std::unique_ptr<Save>> Save::begin(Session &session, const qvmstate_save_options &options) {
  if (!session.is_writable()) {
    return refuse(QVMSTATE_BAD_STATE, session.name() +
                                          ": was opened for loads only; set "
                                          "QVMSTATE_SESSION_WRITE to save");
  }
  QV_TRY(check_options(options));
  std::unique_ptr<Save> save(new Save(session, options));
  QV_TRY(save->begin_transaction(options));
  return save;
}

Outcome<void> Save::begin_transaction(const qvmstate_save_options &options) {
  qcow2::Image &image = session_.image();
  const bool replace = (options.flags & QVMSTATE_SAVE_REPLACE) != 0;
  // Bitmaps keep only QEMU from loading.
  QV_TRY(qcow2::check_image_suits(image, qcow2::ImageRole::vmstate, qcow2::Bitmaps::allow));
  if (!replace && qcow2::find_snapshot(image.snapshots(), name_) >= 0) {
    return refuse(QVMSTATE_EXISTS, session_.name() + ": a snapshot named '" + name_ +
                                       "' is there already; choose another name or set "
                                       "QVMSTATE_SAVE_REPLACE");
  }
  qcow2::NewSnapshot snapshot;
  snapshot.name = name_;
  timespec now = {};
  ::clock_gettime(CLOCK_REALTIME, &now);
  snapshot.date_seconds = static_cast<uint32_t>(now.tv_sec);
  snapshot.date_nanos = static_cast<uint32_t>(now.tv_nsec);
  snapshot.clock_nanos = options.vm_clock_ns;
  session_bytes_before_ = session_.file().bytes_written();
  QV_ASSIGN(transaction_, qcow2::SetSave::begin({&image}, 0, snapshot, replace));
  return {};
}

/// A call that is wrong here is refused; one after a failure gets that failure.
Outcome<void> Save::check_open(const char *call) const {
  if (failure_) {
    return tl::unexpected(*failure_);
  }
  if (state_ != State::open) {
    return refuse(QVMSTATE_BAD_STATE, std::string(call) + ": the save was " +
                                          (state_ == State::ended ? "ended" : "aborted") +
                                          "; close it and begin another");
  }
  return {};
}

tl::unexpected<Failure> Save::fail(Failure failure) {
  if (!failure_) {
    if (is_ram_lost()) {
      failure.message += "; RAM was freed already, so the VM cannot go on";
    }
    failure_ = std::move(failure);
  }
  return tl::unexpected(*failure_);
}

Outcome<void> Save::add_ram(const qvmstate_ram_block &block) {
  QV_TRY(check_open("save_add_ram"));
  if (writer_) {
    return refuse(QVMSTATE_BAD_STATE, "save_add_ram: RAM is being written already");
  }
  QV_ASSIGN(HostBlock taken, take_block(block, configuration_.page_bytes, blocks_));
  blocks_.push_back(std::move(taken));
  return {};
}

Outcome<void> Save::begin_state() {
  const std::vector<vmstate::RamBlock> ram = ram_blocks(blocks_);
  QV_TRY(vmstate::check_stream_arguments(configuration_, ram));
  if (may_free_) {
    release_.emplace(blocks_);
  }
  const uint64_t ram_bytes = vmstate::total_bytes(ram);
  const StatePlan plan = {
      .session = session_,
      .transaction = *transaction_,
      .configuration = configuration_,
      .blocks = blocks_,
      .live = live_,
      .channels = threads_ != 0 ? threads_ : vmstate::default_channels(ram_bytes),
      .release = release_ ? &*release_ : nullptr,
      .hook = [this](uint64_t bytes) { return pace_.follow(bytes); },
  };
  QV_ASSIGN(writer_, mapped_ ? begin_mapped_state(plan) : begin_legacy_state(plan));
  return {};
}

Outcome<void> Save::write_ram(const uint64_t *const *dirty, size_t block_count) {
  QV_TRY(check_open("save_ram"));
  if (blocks_.empty()) {
    return refuse(QVMSTATE_BAD_STATE, "save_ram: there is no RAM block; call save_add_ram first");
  }
  if (writer_ == nullptr && dirty != nullptr) {
    return refuse(QVMSTATE_BAD_STATE,
                  "save_ram: the first call writes all of RAM; pass NULL for the bitmaps");
  }
  if (writer_ != nullptr && !live_) {
    return refuse(QVMSTATE_BAD_STATE,
                  "save_ram: RAM is written; set QVMSTATE_SAVE_LIVE to write it in rounds");
  }
  if (writer_ != nullptr && (dirty == nullptr || block_count != blocks_.size())) {
    return refuse(QVMSTATE_BAD_ARGUMENT, "save_ram: a later round needs a bitmap for each of the " +
                                             std::to_string(blocks_.size()) + " RAM blocks");
  }
  const auto write = [&]() -> Outcome<void> {
    QV_TRY(pace_.check());
    if (writer_ == nullptr) {
      QV_TRY(begin_state());
    }
    pace_.begin(vmstate::total_bytes(ram_blocks(blocks_)));
    if (dirty == nullptr) {
      QV_TRY(writer_->write_ram(nullptr));
      return {};
    }
    const vmstate::DirtyPages pages({dirty, block_count});
    QV_TRY(writer_->write_ram(&pages));
    return {};
  };
  if (auto written = write(); !written) {
    return fail(std::move(written).error());
  }
  return {};
}

Outcome<void> Save::add_section(const qvmstate_section &section) {
  QV_TRY(check_open("save_section"));
  QV_ASSIGN(vmstate::BuiltSection built, sections_.begin(section));
  QV_TRY(sections_.put(built, section.data, section.bytes));
  sections_.add(std::move(built));
  return {};
}

Outcome<void> Save::stream_section(const qvmstate_section &section, qvmstate_section_write_fn write,
                                   void *user) {
  QV_TRY(check_open("save_section_stream"));
  if (write == nullptr) {
    return refuse(QVMSTATE_BAD_ARGUMENT, "save_section_stream: write is NULL");
  }
  QV_ASSIGN(vmstate::BuiltSection built, sections_.begin(section));
  Sink sink(sections_, built);
  const int answer = write(user, sink.handle());
  if (answer != 0) {
    return fail({QVMSTATE_CALLBACK,
                 "device section '" + built.idstr() + "': the host's callback returned " +
                     std::to_string(answer),
                 answer});
  }
  if (sink.failure()) {
    return tl::unexpected(*sink.failure());
  }
  sections_.add(std::move(built));
  return {};
}

Outcome<qvmstate_save_report> Save::end() {
  QV_TRY(check_open("save_end"));
  if (writer_ == nullptr) {
    return refuse(QVMSTATE_BAD_STATE, "save_end: no RAM was written; call save_ram first");
  }
  Outcome<qvmstate_save_report> report = commit();
  if (report) {
    state_ = State::ended;
    return report;
  }
  (void)fail(std::move(report).error());
  if (auto undone = undo(); !undone) {
    failure_->message += "; and undoing it: " + undone.error().message;
  }
  return tl::unexpected(*failure_);
}

Outcome<qvmstate_save_report> Save::commit() {
  QV_TRY(pace_.check());
  QV_ASSIGN(const vmstate::StreamStats stats, writer_->finish(sections_.sections()));
  QV_TRY(session_.file().sync());
  QV_TRY(pace_.check());
  const uint64_t state_bytes = writer_->written_bytes();
  writer_.reset();
  if (stats.checksum) {
    transaction_->set_more_extra(vmstate::format_checksum(*stats.checksum));
  }
  QV_TRY(transaction_->commit(stats.stream_bytes));
  qvmstate_save_report report = {};
  report.ram_bytes = stats.ram_bytes;
  report.stream_bytes = stats.stream_bytes;
  report.written_bytes = state_bytes + session_.file().bytes_written() - session_bytes_before_;
  report.freed_bytes = release_ ? release_->freed_bytes() : 0;
  const std::string &id = transaction_->id(0);
  std::memcpy(report.id, id.data(), std::min(id.size(), sizeof report.id - 1));
  transaction_.reset();
  session_.log(QVMSTATE_LOG_INFO, session_.name() + ": saved snapshot '" + name_ + "' (id " +
                                      report.id + "), " + std::to_string(report.written_bytes) +
                                      " bytes written");
  return report;
}

/// Leaves the image as it was.
Outcome<void> Save::undo() {
  state_ = State::undone;
  writer_.reset();
  if (auto transaction = std::exchange(transaction_, nullptr)) {
    QV_TRY(transaction->abort());
  }
  return {};
}

Outcome<void> Save::abort() {
  if (state_ == State::ended) {
    return refuse(QVMSTATE_BAD_STATE, "save_abort: the snapshot is committed; delete it instead");
  }
  QV_TRY(undo());
  if (is_ram_lost()) {
    return refuse(QVMSTATE_RAM_LOST, session_.name() + ": the save of '" + name_ +
                                         "' was undone, but " +
                                         std::to_string(release_->freed_bytes()) +
                                         " bytes of RAM were freed already; load a snapshot");
  }
  return {};
}

}  // namespace qvmstate::abi
