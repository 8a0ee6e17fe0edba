#include "plugin/qemu/handover.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <thread>

#include "plugin/qemu/process_files.h"

namespace qvmstate::qemu {
namespace {

constexpr uint64_t device_bytes_max = 1 << 30;
constexpr milliseconds retry_pause{50};
constexpr milliseconds give_back_patience{10'000};
constexpr const char *export_id = "qvmstate-activate";

/// Before 10.0: adding a block export activates its node, also when the export itself is then
/// refused because no NBD server runs. Errors of the activation are not reported.
Result<void> activate_by_export(Qmp &qmp, const std::string &node) {
  auto added =
      qmp.execute("block-export-add", {{"type", "nbd"}, {"id", export_id}, {"node-name", node}});
  if (!qmp.alive()) {
    return tl::unexpected(added.error());
  }
  if (!added) {
    return {};
  }
  QV_TRY(qmp.execute("block-export-del", {{"id", export_id}, {"mode", "hard"}}));
  for (const auto deadline = Clock::now() + milliseconds(5000); Clock::now() < deadline;) {
    QV_ASSIGN(const Json exports, qmp.execute("query-block-exports"));
    bool there = false;
    for (const Json &entry : exports) {
      there = there || text_at(entry, "id") == export_id;
    }
    if (!there) {
      return {};
    }
    std::this_thread::sleep_for(retry_pause);
  }
  return fail(ErrorCode::peer, "QEMU does not end the block export that activates a disk");
}

Result<void> activate(Qmp &qmp, const std::vector<Disk> &disks, bool can_set_active) {
  if (can_set_active) {
    QV_TRY(qmp.execute("blockdev-set-active", {{"active", true}}));
    return {};
  }
  for (const Disk &disk : disks) {
    QV_TRY(activate_by_export(qmp, disk.node));
  }
  return {};
}

Result<void> check_all_held_by_qemu(const std::vector<Disk> &disks) {
  for (const Disk &disk : disks) {
    QV_ASSIGN(const Holder holder, holder_of(disk));
    if (holder != Holder::running) {
      return fail(ErrorCode::bad_state,
                  describe(disk) +
                      ": QEMU did not take its lock back; is another program using "
                      "the image? Then end it and run `qvmstate resume`");
    }
  }
  return {};
}

Result<std::unique_ptr<qcow2::Image>> open_image(io::File &file, const Disk &disk) {
  auto image = qcow2::Image::open(file);
  if (!image) {
    return tl::unexpected(with_context(image.error(), describe(disk)));
  }
  return std::make_unique<qcow2::Image>(std::move(*image));
}

}  // namespace

bool can_set_active(const Qmp &qmp) {
  return qmp.version_major() >= 10;
}

Result<void> bring_back(Qmp &qmp, const std::vector<Disk> &disks, bool run, bool can_set_active,
                        milliseconds patience) {
  const auto deadline = Clock::now() + patience;
  for (;;) {
    Result<void> done;
    if (run) {
      auto answer = qmp.execute("cont");
      done = answer ? Result<void>() : tl::unexpected(answer.error());
    } else {
      done = activate(qmp, disks, can_set_active);
      if (done) {
        done = check_all_held_by_qemu(disks);
      }
    }
    if (done || !qmp.alive() || Clock::now() >= deadline) {
      return done;
    }
    std::this_thread::sleep_for(retry_pause);
  }
}

Handover::~Handover() {
  // An error was reported before, or is of no more use than that one.
  (void)give_back();
  if (!device_bytes_.empty()) {
    ::munmap(const_cast<std::byte *>(device_bytes_.data()), device_bytes_.size());
  }
}

Result<void> Handover::mark(const std::string &what, unsigned own_marks) {
  QV_ASSIGN(mark_, Mark::leave(qmp_, was_running_, what, own_marks));
  return {};
}

Result<void> Handover::stop() {
  stopped_ = true;  // also when no answer comes: the guest may stand
  QV_TRY(qmp_.execute("stop"));
  return {};
}

Result<void> Handover::take() {
  taken_ = true;  // also when no answer comes
  // With `live`, the default, QEMU lets go of the disks of a stopped VM.
  auto written = qmp_.execute("xen-save-devices-state", {{"filename", mark_->qemu_path()},
                                                         {"live", kind_ == HandoverKind::images}});
  if (!written) {
    if (qmp_.alive() && kind_ == HandoverKind::images) {
      written.error().message +=
          "; end what else uses a disk of the VM (a writable NBD export, a block job) and try "
          "again";
    }
    return tl::unexpected(written.error());
  }
  if (kind_ == HandoverKind::device_state) {
    return map_device_bytes();
  }
  for (const Disk &disk : disks_) {
    QV_ASSIGN(const Holder holder, holder_of(disk));
    if (holder != Holder::inactive) {
      return fail(ErrorCode::bad_state,
                  describe(disk) +
                      ": QEMU did not let go of it, or another program locked it; end what uses it "
                      "(a writable NBD export, a block job, qemu-nbd) and try again");
    }
  }
  if (can_set_active(qmp_)) {
    QV_ASSIGN(const Json nodes, qmp_.execute("query-named-block-nodes", {{"flat", true}}));
    for (const Json &node : nodes) {
      if (flag_at(node, "active") && !flag_at(node, "ro", true)) {
        return fail(ErrorCode::bad_state,
                    "block node '" + text_at(node, "node-name") +
                        "' stays active in QEMU; end what uses it (a writable NBD export, a block "
                        "job) and try again");
      }
    }
  }
  return map_device_bytes();
}

Result<void> Handover::map_device_bytes() {
  struct stat status;
  if (::fstat(mark_->file(), &status) != 0) {
    return fail_errno(errno, "reading the device state");
  }
  const auto bytes = static_cast<uint64_t>(status.st_size);
  if (bytes == 0 || bytes > device_bytes_max) {
    return fail(ErrorCode::peer,
                "QEMU wrote a device state of " + std::to_string(bytes) + " bytes");
  }
  void *data = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, mark_->file(), 0);
  if (data == MAP_FAILED) {
    return fail_errno(errno, "mapping the device state");
  }
  device_bytes_ = {static_cast<const std::byte *>(data), bytes};
  return {};
}

Result<void> Handover::give_back() {
  if (stopped_ && !taken_) {
    // Not stopped by us in the end (it shut down meanwhile): nothing to bring back, and QEMU would
    // refuse.
    QV_ASSIGN(const Json status, qmp_.execute("query-status"));
    stopped_ = !was_running_ || text_at(status, "status") == "paused";
  }
  if (stopped_) {
    auto back = bring_back(qmp_, disks_, was_running_, can_set_active(qmp_), give_back_patience);
    if (!back) {
      back.error().message += "; the guest stands: see to that, then run `qvmstate resume`";
      return back;
    }
    stopped_ = false;
  }
  if (mark_) {
    mark_->unlock();
    mark_.reset();
    forget_marks(qmp_);
  }
  return {};
}

Result<OwnedImages> OwnedImages::open(const std::vector<Disk> &disks,
                                      const io::OpenOptions &options,
                                      const ImageChannels &channels) {
  OwnedImages owned;
  io::OpenOptions writable = options;
  writable.writable = true;
  for (const Disk &disk : disks) {
    const std::string path = own_descriptor_path(disk.image.get());
    QV_ASSIGN(auto file, io::File::open(path, writable, disk.file));
    std::vector<int> descriptors = file->descriptors();
    if (owned.files_.size() == channels.disk) {
      io::OpenOptions deep = writable;
      deep.depth = channels.depth;
      for (unsigned i = 0; i < channels.count; ++i) {
        QV_ASSIGN(auto channel, io::File::open(path, deep, disk.file));
        const std::vector<int> more = channel->descriptors();
        descriptors.insert(descriptors.end(), more.begin(), more.end());
        owned.channels_.push_back(std::move(channel));
      }
    }
    QV_ASSIGN(auto lock, qcow2::ImageLock::take(descriptors, qcow2::LockRole::writer, disk.file));
    owned.locks_.push_back(std::move(lock));
    owned.files_.push_back(std::move(file));
    QV_ASSIGN(auto image, open_image(*owned.files_.back(), disk));
    owned.pointers_.push_back(image.get());
    owned.images_.push_back(std::move(image));
  }
  return owned;
}

Result<WatchedImages> WatchedImages::open(const std::vector<Disk> &disks, io::DirectMode direct) {
  WatchedImages watched;
  io::OpenOptions options;
  options.direct = direct;
  options.engine = io::Engine::threads;
  for (const Disk &disk : disks) {
    QV_ASSIGN(auto file, io::File::open(own_descriptor_path(disk.image.get()), options, disk.file));
    watched.files_.push_back(std::move(file));
    auto image = open_image(*watched.files_.back(), disk);
    for (int attempt = 0; !image && attempt < 3; ++attempt) {
      std::this_thread::sleep_for(retry_pause);  // QEMU may be in the middle of a change
      image = open_image(*watched.files_.back(), disk);
    }
    if (!image) {
      return tl::unexpected(image.error());
    }
    watched.pointers_.push_back(image->get());
    watched.images_.push_back(std::move(*image));
  }
  return watched;
}

}  // namespace qvmstate::qemu
