#include "abi/saving.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <thread>
#include <vector>

namespace unicorn_host {
namespace {

constexpr unsigned threads = 4;
constexpr size_t console_piece_bytes = 7;

void die_if(bool now) {
  if (now) {
    ::kill(::getpid(), SIGKILL);
  }
}

/// The steps of one save; each returns a code, and says why it failed in error().
class Saving {
 public:
  Saving(const qvmstate_api &api, Machine &machine, const SaveOptions &options)
      : api_(api), machine_(machine), options_(options) {}
  ~Saving() { api_.save_close(save_); }
  Saving(const Saving &) = delete;
  Saving &operator=(const Saving &) = delete;

  int begin(qvmstate_session *session) {
    qvmstate_save_options given = {};
    given.size = sizeof given;
    given.flags = (options_.replace ? QVMSTATE_SAVE_REPLACE : 0) |
                  (options_.may_free ? QVMSTATE_SAVE_MAY_FREE : 0) |
                  (options_.rounds > 0 ? QVMSTATE_SAVE_LIVE : 0);
    given.name = options_.name.c_str();
    given.machine = machine_.kind().name.c_str();
    given.layout = options_.mapped_ram ? QVMSTATE_LAYOUT_MAPPED_RAM : QVMSTATE_LAYOUT_LEGACY;
    given.guest_page_bytes = machine_.kind().page_bytes;
    given.vm_clock_ns = machine_.executed();
    given.threads = threads;
    given.progress = on_progress;
    given.progress_user = this;
    return api_.save_begin(session, &given, &save_, &error_);
  }

  int add_ram() {
    for (const RamBlock &block : machine_.ram()) {
      qvmstate_ram_block given = {};
      given.size = sizeof given;
      given.name = block.name().c_str();
      given.address = block.data();
      given.bytes = block.bytes();
      if (const int code = api_.save_add_ram(save_, &given, &error_); code != QVMSTATE_OK) {
        return code;
      }
    }
    return QVMSTATE_OK;
  }

  int write_ram() {
    if (options_.rounds == 0) {
      return api_.save_ram(save_, nullptr, 0, &error_);
    }
    take_dirty();  // what was written before counts as written by the first call
    int code = while_running([&] { return api_.save_ram(save_, nullptr, 0, &error_); });
    die_if(options_.death == Death::between_rounds);
    for (unsigned round = 1; round < options_.rounds && code == QVMSTATE_OK; ++round) {
      take_dirty();
      code = while_running([&] { return write_dirty(); });
    }
    if (code == QVMSTATE_OK && !options_.forget_last_round) {
      take_dirty();
      code = write_dirty();
    }
    return code;
  }

  int write_sections() {
    const uint64_t executed = machine_.executed();
    std::vector<uint8_t> timer = machine_.device().registers();
    const auto *const ticks = reinterpret_cast<const uint8_t *>(&executed);
    timer.insert(timer.end(), ticks, ticks + sizeof executed);
    if (const int code = write_section("cpu", 1, machine_.cpu()); code != QVMSTATE_OK) {
      return code;
    }
    if (const int code = write_section("timer", 3, timer); code != QVMSTATE_OK) {
      return code;
    }
    qvmstate_section console = {};
    console.size = sizeof console;
    console.name = "console";
    console.version = 1;
    return api_.save_section_stream(save_, &console, on_console, this, &error_);
  }

  int end(qvmstate_save_report &report) {
    report.size = sizeof report;
    return api_.save_end(save_, &report, &error_);
  }

  const char *message() const { return error_.message; }

 private:
  /// RAM is saved by this thread while the guest writes to it on another.
  template <typename Step>
  int while_running(Step step) {
    std::thread guest([&] { machine_.run(options_.round_instructions); });
    const int code = step();
    guest.join();
    return code;
  }

  void take_dirty() {
    dirty_.clear();
    for (RamBlock &block : machine_.ram()) {
      dirty_.push_back(block.take_dirty());
    }
  }

  int write_dirty() {
    std::vector<const uint64_t *> bitmaps;
    for (const std::vector<uint64_t> &bitmap : dirty_) {
      const bool clean = std::ranges::all_of(bitmap, [](uint64_t word) { return word == 0; });
      bitmaps.push_back(clean ? nullptr : bitmap.data());
    }
    return api_.save_ram(save_, bitmaps.data(), bitmaps.size(), &error_);
  }

  int write_section(const char *name, uint32_t version, const std::vector<uint8_t> &bytes) {
    qvmstate_section section = {};
    section.size = sizeof section;
    section.name = name;
    section.version = version;
    section.data = bytes.data();
    section.bytes = bytes.size();
    return api_.save_section(save_, &section, &error_);
  }

  static int on_progress(void *user, const qvmstate_progress *progress) {
    const auto &self = *static_cast<const Saving *>(user);
    die_if(self.options_.death == Death::in_ram &&
           progress->ram_bytes_done >= progress->ram_bytes_total / 2);
    return 0;
  }

  static int on_console(void *user, qvmstate_sink *sink) {
    const auto &self = *static_cast<const Saving *>(user);
    die_if(self.options_.death == Death::in_sections);
    const std::string &text = self.machine_.device().console();
    for (size_t at = 0; at < text.size(); at += console_piece_bytes) {
      const size_t bytes = std::min(console_piece_bytes, text.size() - at);
      if (self.api_.section_put(sink, text.data() + at, bytes, nullptr) != QVMSTATE_OK) {
        return 1;
      }
    }
    return 0;
  }

  const qvmstate_api &api_;
  Machine &machine_;
  const SaveOptions &options_;
  qvmstate_save *save_ = nullptr;
  qvmstate_error error_ = {};
  std::vector<std::vector<uint64_t>> dirty_;  // of each block
};

}  // namespace

std::optional<Failure> save(Session &session, Machine &machine, const SaveOptions &options) {
  Saving saving(session.api(), machine, options);
  qvmstate_save_report report = {};
  int code = saving.begin(session.handle());
  if (code == QVMSTATE_OK) {
    code = saving.add_ram();
  }
  if (code == QVMSTATE_OK) {
    code = saving.write_ram();
  }
  if (code == QVMSTATE_OK) {
    code = saving.write_sections();
  }
  if (code == QVMSTATE_OK) {
    code = saving.end(report);
  }
  if (code != QVMSTATE_OK) {
    return Failure{code, saving.message()};
  }
  std::printf("saved %s ram %" PRIu64 " freed %" PRIu64 "\n", report.id, report.ram_bytes,
              report.freed_bytes);
  return std::nullopt;
}

}  // namespace unicorn_host
