// What can be done with a running QEMU: the calls behind the command and the control socket.
//
// Each call connects to QEMU's QMP socket itself, does its work, and leaves the VM as it found it
// (running or paused), also when it fails. Each returns one error line with the remedy.
//
// Threads: any; one operation per VM at a time (the second is refused by the image locks or by QMP,
// which serves one client).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "qcow2/io/buffer_pool.h"
#include "qcow2/io/file.h"
#include "qcow2/io/result.h"

namespace qvmstate::qemu {

/// How RAM lies in the vmstate. `automatic`: what suits the target and the QEMU.
enum class SaveLayout { automatic, legacy, mapped_ram, stream_aligned };

constexpr unsigned channels_max = 64;

struct SaveOptions {
  std::string name;          ///< of the snapshot; empty with `to`
  bool replace = false;      ///< the old snapshot of that name lives until the new one is there
  std::string vmstate_node;  ///< node name; empty: the node that loadvm looks at first
  bool live = false;         ///< the guest runs while RAM is copied; by the plugin only
  /// Persistent dirty bitmaps are no reason to refuse; they have to go before a load.
  bool allow_bitmaps = false;
  io::DirectMode direct = io::DirectMode::automatic;
  io::Engine engine = io::Engine::automatic;
  size_t buffers = io::buffer_count_default;
  unsigned depth = 8;
  uint64_t rate_limit_bytes_per_second = 0;  ///< 0: none
  SaveLayout layout = SaveLayout::automatic;
  /// A snapshot in the layout stream-aligned; what has not changed since is shared with it.
  std::string base;
  bool sparse_bitmap = false;  ///< mapped-ram only: the bitmap of pages may have holes
  unsigned channels = 0;       ///< that write at the same time, up to channels_max; 0: automatic
  /// Empty: into the VM's qcow2, as snapshot `name`. Otherwise a plain file or passed descriptors,
  /// in the words of save_target.h.
  std::string to;
  /// Of this process: the target of `to` "fd", one without and one with O_DIRECT. They belong to
  /// the operation from the call on and are closed when it returns, whatever it returns.
  int fd = -1;
  int direct_fd = -1;
};

/// Whether the options go together; else ErrorCode::bad_argument, with the words of the command
/// line. Says nothing of what only QEMU or a file can tell.
Result<void> check_save_options(const SaveOptions &options);

struct DiskReport {
  std::string node;
  std::string file;  ///< QEMU's name of it
  std::string snapshot_id;
  bool has_vmstate = false;
  uint64_t metadata_bytes = 0;  ///< written for the switch
};

struct SaveReport {
  std::string name;
  std::string source;  ///< "plugin" or "attach"
  std::string machine_type;
  std::string qemu_version;
  bool was_running = false;
  uint64_t ram_bytes = 0;
  uint64_t data_pages = 0;
  uint64_t zero_pages = 0;
  uint64_t untouched_pages = 0;
  uint64_t vmstate_bytes = 0;
  uint64_t copied_bytes = 0;  ///< RAM bytes copied inside this process
  uint64_t group_bytes = 0;   ///< of the layout stream-aligned
  uint64_t written_groups = 0;
  uint64_t shared_groups = 0;  ///< with the base
  uint64_t read_groups = 0;
  uint64_t tracked_groups = 0;  ///< not read, as nothing wrote to them since the save before
  std::string untracked;        ///< why writes could not be tracked; empty: they can, or attached
  uint64_t written_bytes = 0;   ///< to all images
  double pause_seconds = 0;     ///< from before `stop` until `cont` was answered; the longest
  std::vector<double> pauses_seconds;  ///< all of them: two of a live save
  uint64_t writes_served = 0;          ///< pieces of RAM copied because the guest wrote to them
  uint64_t writes_delayed = 0;         ///< those for which it had to wait longer
  double total_seconds = 0;
  double data_seconds = 0;    ///< stream written and synced, part of the pause
  std::string io_engine;      ///< "io_uring" or "threads", " direct" added with O_DIRECT
  std::string layout;         ///< "legacy", "mapped-ram" or "stream-aligned"
  std::string base;           ///< the snapshot that groups are shared with
  std::string target;         ///< path of the file that was written; empty: the VM's own qcow2
  unsigned channels = 0;      ///< that wrote
  uint64_t target_bytes = 0;  ///< of the file, from its begin to the end of the save
  std::vector<DiskReport> disks;
  std::vector<std::string> warnings;
};

struct Progress {
  const char *phase = "";  ///< "looking", "stopped", "writing", "committing", "resuming"
  uint64_t ram_bytes_done = 0;
  uint64_t ram_bytes_total = 0;
  uint64_t bytes_written = 0;
  double seconds = 0;
};

/// How an operation talks to whoever asked for it.
struct Observer {
  std::function<void(const Progress &)> progress;    ///< may be empty; called often
  std::function<void(const std::string &)> warning;  ///< may be empty
  const std::atomic<bool> *cancelled = nullptr;      ///< set by any thread or signal handler
};

/// The save of a QEMU without plugin: RAM through process_vm_readv. Starts the guardian process.
/// Call from a program with no other threads running (it forks).
Result<SaveReport> save_by_attach(const std::string &qmp_path, const SaveOptions &options,
                                  const Observer &observer);

/// Asks the plugin inside a QEMU to save. Dropping the connection (a killed client) cancels.
Result<SaveReport> save_by_control(const std::string &control_path, const SaveOptions &options,
                                   const Observer &observer);

struct DeleteReport {
  std::string name;
  double pause_seconds = 0;
  std::vector<DiskReport> disks;
  std::vector<std::string> warnings;
};
/// Deletes from every disk of a live VM (paused for the switch).
Result<DeleteReport> delete_live(const std::string &qmp_path, const std::string &name,
                                 const Observer &observer);

struct LoadReport {
  std::string name;
  std::string layout;  ///< "legacy" or "mapped-ram"; empty: could not be seen
  bool running = false;
  double seconds = 0;
};
/// QEMU's own loadvm, with the errors it reports, and with the migration capabilities that the
/// snapshot's layout needs, which are as before afterwards.
Result<LoadReport> load(const std::string &qmp_path, const std::string &name);

struct ResumeReport {
  bool was_interrupted = false;  ///< false: nothing had to be done
  bool running = false;
  std::vector<std::string> actions;  ///< what was done, one line each
};
/// After a save whose process and guardian were both killed: takes the images back, finishes or
/// undoes a save over several images, and lets the guest run if it ran before.
Result<ResumeReport> resume(const std::string &qmp_path);

}  // namespace qvmstate::qemu
