#include "plugin/abi/session.h"

#include <fcntl.h>

#include <cerrno>
#include <optional>
#include <span>
#include <utility>

#include "plugin/qemu/descriptor.h"
#include "qcow2/image_set.h"
#include "qcow2/suitability.h"

namespace qvmstate::abi {
namespace {

constexpr uint32_t session_flags = QVMSTATE_SESSION_WRITE;

std::optional<io::DirectMode> direct_mode(uint32_t direct) {
  switch (direct) {
    case QVMSTATE_DIRECT_AUTO:
      return io::DirectMode::automatic;
    case QVMSTATE_DIRECT_ON:
      return io::DirectMode::on;
    case QVMSTATE_DIRECT_OFF:
      return io::DirectMode::off;
    default:
      return std::nullopt;
  }
}

std::string shown_name(const qvmstate_session_options &options) {
  if (options.path != nullptr) {
    return options.path;
  }
  return "the image behind descriptor " + std::to_string(options.fds[0]);
}

Outcome<void> check_options(const qvmstate_session_options &options) {
  const bool has_path = options.path != nullptr && options.path[0] != '\0';
  const bool has_fds = options.fds != nullptr && options.fd_count > 0;
  if ((options.path != nullptr) == (options.fds != nullptr) || (!has_path && !has_fds)) {
    return refuse(QVMSTATE_BAD_ARGUMENT,
                  "session_open: names no image, or two; set either path or fds and fd_count");
  }
  if ((options.flags & ~session_flags) != 0) {
    return refuse(QVMSTATE_BAD_ARGUMENT, "session_open: unknown flags; use QVMSTATE_SESSION_*");
  }
  if (!direct_mode(options.direct)) {
    return refuse(QVMSTATE_BAD_ARGUMENT, "session_open: direct is no enum qvmstate_direct");
  }
  return {};
}

}  // namespace

Session::Session(const qvmstate_session_options &options, std::string name)
    : name_(std::move(name)),
      writable_((options.flags & QVMSTATE_SESSION_WRITE) != 0),
      log_(options.log),
      log_user_(options.log_user) {}

Outcome<std::unique_ptr<Session>> Session::open(const qvmstate_session_options &options) {
  QV_TRY(check_options(options));
  std::unique_ptr<Session> session(new Session(options, shown_name(options)));
  QV_TRY(session->open_descriptors(options, *direct_mode(options.direct)));
  // Before the lock: to drop one that was refused would drop that of an open file in common.
  QV_TRY(
      session->open_image_.enter(session->descriptors_.any(), session->writable_, session->name_));
  QV_ASSIGN(session->file_, session->another_file(io::OpenOptions().depth));
  const auto role = session->writable_ ? qcow2::LockRole::writer : qcow2::LockRole::stable_reader;
  QV_ASSIGN(session->lock_,
            qcow2::ImageLock::take(session->file_->descriptors(), role, session->name_));
  QV_ASSIGN(session->image_, qcow2::Image::open(*session->file_));
  if (qcow2::needs_recovery({&session->image_})) {
    session->log(QVMSTATE_LOG_WARNING,
                 session->name_ +
                     ": seems to hold a part of an interrupted save over several disks; if so, "
                     "`qvmstate resume` on the running VM settles it");
  }
  return session;
}

Result<void> Session::open_descriptors(const qvmstate_session_options &options,
                                       io::DirectMode direct) {
  if (options.path != nullptr) {
    QV_ASSIGN(descriptors_, io::Descriptors::open(options.path, writable_, direct, name_));
    return {};
  }
  std::vector<qemu::Descriptor> copies;
  std::vector<int> numbers;
  for (const int given : std::span(options.fds, options.fd_count)) {
    qemu::Descriptor copy(::fcntl(given, F_DUPFD_CLOEXEC, 0));
    const int flags = copy ? ::fcntl(copy.get(), F_GETFL) : -1;
    if (flags < 0) {
      return fail(ErrorCode::bad_argument,
                  name_ + ": descriptor " + std::to_string(given) + " is not open", EBADF);
    }
    if (writable_ && (flags & O_ACCMODE) != O_RDWR) {
      return fail(ErrorCode::bad_argument, name_ + ": descriptor " + std::to_string(given) +
                                               " must be open for reading and writing (O_RDWR)");
    }
    numbers.push_back(copy.get());
    copies.push_back(std::move(copy));
  }
  for (qemu::Descriptor &copy : copies) {
    (void)copy.release();  // adopt() closes them, whatever it returns
  }
  QV_ASSIGN(descriptors_, io::Descriptors::adopt(numbers, writable_, direct, name_));
  return {};
}

Result<std::unique_ptr<io::File>> Session::another_file(unsigned depth) const {
  QV_ASSIGN(io::Descriptors more, descriptors_.duplicate(name_));
  io::OpenOptions options;
  options.depth = depth;
  return io::File::over(std::move(more), options, name_);
}

Outcome<void> Session::delete_snapshot(const char *name) {
  if (name == nullptr) {
    return refuse(QVMSTATE_BAD_ARGUMENT, "snapshot_delete: the name is NULL");
  }
  if (!writable_) {
    return refuse(QVMSTATE_BAD_STATE,
                  name_ + ": was opened for loads only; set QVMSTATE_SESSION_WRITE to delete");
  }
  QV_TRY(qcow2::check_image_suits(image_, qcow2::ImageRole::disk_only, qcow2::Bitmaps::allow));
  QV_TRY(qcow2::delete_from_set({&image_}, name, true));
  log(QVMSTATE_LOG_INFO, name_ + ": deleted snapshot '" + name + "'");
  return {};
}

void Session::log(qvmstate_log_level level, const std::string &line) const {
  if (log_ != nullptr) {
    log_(log_user_, level, line.c_str());
  }
}

}  // namespace qvmstate::abi
