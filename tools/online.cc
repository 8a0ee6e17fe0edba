// Commands on a running VM: save, load, resume, and delete of a live one.
//
// SIGINT, SIGTERM and SIGHUP ask a save or delete to stop; it then undoes what it did and lets the
// guest go on. The handler stays, so a second one does not cut that short. Stopping this process
// (Ctrl-Z, tostop) is ignored meanwhile: the guest would stand still with it.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>

#include "tools/cancel.h"
#include "tools/commands.h"
#include "tools/format.h"
#include "tools/progress.h"

namespace qvmstate::tools {

namespace {

/// Cancelling is asked for by a signal; stopping this process is not allowed meanwhile.
const std::atomic<bool> &catch_signals() {
  signal(SIGTSTP, SIG_IGN);
  signal(SIGTTOU, SIG_IGN);
  return catch_cancel_signals();
}

/// Warnings are kept until the operation is over: printing could block while the guest stands.
class Warnings {
 public:
  void add(const std::string &message) {
    if (std::find(messages_.begin(), messages_.end(), message) == messages_.end()) {
      messages_.push_back(message);
    }
  }
  void add(const std::vector<std::string> &messages) {
    for (const std::string &message : messages) {
      add(message);
    }
  }
  void report(std::string_view operation) const {
    for (const std::string &message : messages_) {
      report_warning(operation, message);
    }
  }
  const std::vector<std::string> &messages() const { return messages_; }

 private:
  std::vector<std::string> messages_;
};

Json disks_json(const std::vector<qemu::DiskReport> &disks) {
  Json array = Json::array();
  for (const qemu::DiskReport &disk : disks) {
    array.push_back({{"node", disk.node},
                     {"file", disk.file},
                     {"snapshot-id", disk.snapshot_id},
                     {"has-vmstate", disk.has_vmstate},
                     {"metadata-bytes", disk.metadata_bytes}});
  }
  return array;
}

std::string save_summary(const qemu::SaveReport &report) {
  const std::string shared =
      report.base.empty()
          ? ""
          : fmt::format(", {} of {} groups shared with '{}', {} read{}", report.shared_groups,
                        report.shared_groups + report.written_groups, printable(report.base),
                        report.read_groups,
                        report.untracked.empty() ? "" : " (" + printable(report.untracked) + ")");
  return fmt::format("saved '{}': {} RAM, {} written in {} ({}){}, {}\n",
                     printable(report.target.empty() ? report.name : report.target),
                     format_size(report.ram_bytes), format_size(report.written_bytes),
                     format_seconds(report.total_seconds),
                     format_rate(report.written_bytes, report.total_seconds), shared,
                     report.was_running ? "guest paused " + format_seconds(report.pause_seconds)
                                        : std::string("guest was paused and still is"));
}

Json save_json(const qemu::SaveReport &report, const Warnings &warnings) {
  return {{"event", "completed"},
          {"operation", "save"},
          {"name", report.name},
          {"source", report.source},
          {"machine-type", report.machine_type},
          {"qemu-version", report.qemu_version},
          {"was-running", report.was_running},
          {"ram-bytes", report.ram_bytes},
          {"data-pages", report.data_pages},
          {"zero-pages", report.zero_pages},
          {"untouched-pages", report.untouched_pages},
          {"vmstate-bytes", report.vmstate_bytes},
          {"copied-bytes", report.copied_bytes},
          {"written-bytes", report.written_bytes},
          {"pause-seconds", report.pause_seconds},
          {"pauses-seconds", report.pauses_seconds},
          {"writes-served", report.writes_served},
          {"writes-delayed", report.writes_delayed},
          {"data-seconds", report.data_seconds},
          {"total-seconds", report.total_seconds},
          {"io-engine", report.io_engine},
          {"layout", report.layout},
          {"base", report.base},
          {"group-bytes", report.group_bytes},
          {"written-groups", report.written_groups},
          {"shared-groups", report.shared_groups},
          {"read-groups", report.read_groups},
          {"tracked-groups", report.tracked_groups},
          {"untracked", report.untracked},
          {"target", report.target},
          {"channels", report.channels},
          {"target-bytes", report.target_bytes},
          {"disks", disks_json(report.disks)},
          {"warnings", warnings.messages()}};
}

ProgressStyle progress_style(const SaveCommand &command) {
  if (command.quiet) {
    return ProgressStyle::none;
  }
  if (command.format == Format::json) {
    return ProgressStyle::json;
  }
  return isatty(STDERR_FILENO) ? ProgressStyle::line : ProgressStyle::none;
}

}  // namespace

int run_save(const SaveCommand &command) {
  const std::atomic<bool> &cancelled = catch_signals();
  ProgressReporter progress(progress_style(command));
  Warnings warnings;
  qemu::Observer observer;
  observer.progress = [&](const qemu::Progress &now) { progress.update(now); };
  observer.warning = [&](const std::string &message) { warnings.add(message); };
  observer.cancelled = &cancelled;
  const Result<qemu::SaveReport> report =
      command.control.empty() ? qemu::save_by_attach(command.qmp, command.options, observer)
                              : qemu::save_by_control(command.control, command.options, observer);
  progress.clear();
  if (report) {
    warnings.add(report->warnings);
  }
  warnings.report("save");
  if (!report) {
    return report_failure("save", report.error(), command.format);
  }
  if (command.format == Format::json) {
    return finish("save", to_line(save_json(*report, warnings)));
  }
  return command.quiet ? exit_done : finish("save", save_summary(*report));
}

int run_load(const LoadCommand &command) {
  const Result<qemu::LoadReport> report = qemu::load(command.qmp, command.name);
  if (!report) {
    return report_failure("load", report.error(), command.format);
  }
  if (command.format == Format::json) {
    return finish("load", to_line({{"event", "completed"},
                                   {"operation", "load"},
                                   {"name", report->name},
                                   {"layout", report->layout},
                                   {"running", report->running},
                                   {"seconds", report->seconds}}));
  }
  return finish(
      "load", fmt::format("loaded '{}' in {}, guest {}\n", printable(report->name),
                          format_seconds(report->seconds), report->running ? "running" : "paused"));
}

int run_resume(const ResumeCommand &command) {
  const Result<qemu::ResumeReport> report = qemu::resume(command.qmp);
  if (!report) {
    return report_failure("resume", report.error(), command.format);
  }
  if (command.format == Format::json) {
    return finish("resume", to_line({{"event", "completed"},
                                     {"operation", "resume"},
                                     {"was-interrupted", report->was_interrupted},
                                     {"running", report->running},
                                     {"actions", report->actions}}));
  }
  std::string text;
  for (const std::string &action : report->actions) {
    text += printable(action) + "\n";
  }
  text += fmt::format("{}, guest {}\n",
                      report->was_interrupted ? "resumed" : "nothing had to be resumed",
                      report->running ? "running" : "paused");
  return finish("resume", text);
}

int run_delete_live(const DeleteCommand &command) {
  const std::atomic<bool> &cancelled = catch_signals();
  Warnings warnings;
  qemu::Observer observer;
  observer.warning = [&](const std::string &message) { warnings.add(message); };
  observer.cancelled = &cancelled;
  const Result<qemu::DeleteReport> report = qemu::delete_live(command.qmp, command.name, observer);
  if (report) {
    warnings.add(report->warnings);
  }
  warnings.report("delete");
  if (!report) {
    return report_failure("delete", report.error(), command.format);
  }
  if (command.format == Format::json) {
    return finish("delete", to_line({{"event", "completed"},
                                     {"operation", "delete"},
                                     {"name", report->name},
                                     {"pause-seconds", report->pause_seconds},
                                     {"disks", disks_json(report->disks)},
                                     {"warnings", warnings.messages()}}));
  }
  return finish("delete", fmt::format("deleted '{}' from {} disk{}, guest paused {}\n",
                                      printable(report->name), report->disks.size(),
                                      report->disks.size() == 1 ? "" : "s",
                                      format_seconds(report->pause_seconds)));
}

}  // namespace qvmstate::tools
