#include "plugin/qemu/guardian.h"

#include <dirent.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <optional>
#include <thread>

#include "plugin/qemu/handover.h"
#include "plugin/qemu/marks.h"
#include "qcow2/io/signals.h"

namespace qvmstate::qemu {
namespace {

constexpr milliseconds rescue_patience{60'000};
constexpr milliseconds lock_wait{800};
constexpr milliseconds lock_poll{20};

void close_all_but(const std::vector<int> &kept) {
  std::vector<int> closing;
  DIR *folder = ::opendir("/proc/self/fd");
  if (folder == nullptr) {
    return;
  }
  while (const dirent *entry = ::readdir(folder)) {
    char *end = nullptr;
    const long number = std::strtol(entry->d_name, &end, 10);
    if (end != entry->d_name && *end == 0 && number != ::dirfd(folder) &&
        std::find(kept.begin(), kept.end(), number) == kept.end()) {
      closing.push_back(static_cast<int>(number));
    }
  }
  ::closedir(folder);
  for (const int number : closing) {
    ::close(number);
  }
}

/// True: told to leave; false: the saver is gone.
bool wait_for_end(int pipe) {
  char byte;
  for (;;) {
    const ssize_t bytes = ::read(pipe, &byte, 1);
    if (bytes >= 0) {
      return bytes == 1;
    }
    if (errno != EINTR) {
      return false;
    }
  }
}

void report(const std::string &line) {
  // Nobody can be told that telling failed.
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, line.data(), line.size());
}

[[noreturn]] void guard(int pipe, int socket, const std::string &qmp_path,
                        const std::vector<Disk> &disks, bool was_running, bool set_active) {
  const auto peer = peer_of(socket);
  const pid_t qemu = peer ? peer->pid : 0;
  if (wait_for_end(pipe)) {
    ::_exit(0);
  }
  if (!was_running) {
    // The locks of a killed saver look like QEMU's, and an old QEMU does not report that it failed
    // to activate a disk: wait until they are gone.
    for (const auto deadline = Clock::now() + lock_wait; Clock::now() < deadline;) {
      const bool free = std::all_of(disks.begin(), disks.end(), [](const Disk &disk) {
        const auto holder = holder_of(disk);
        return holder && *holder == Holder::inactive;
      });
      if (free) {
        break;
      }
      std::this_thread::sleep_for(lock_poll);
    }
  }
  auto qmp = Qmp::adopt(Descriptor(socket), "qvmstate-guardian-");
  auto back = bring_back(*qmp, disks, was_running, set_active, rescue_patience);
  if (!back && !qmp->alive()) {
    qmp.reset();
    if (auto fresh = Qmp::connect(qmp_path)) {
      qmp = std::move(*fresh);
      back = bring_back(*qmp, disks, was_running, set_active, rescue_patience);
    }
  }
  if (back) {
    forget_marks(*qmp);
    report(std::string("qvmstate: the saving process ended early; the guest ") +
           (was_running ? "runs again\n" : "is paused as before\n"));
    ::_exit(0);
  }
  if (::access(("/proc/" + std::to_string(qemu)).c_str(), F_OK) != 0) {
    ::_exit(0);  // QEMU is gone, and its images are clean: there is nothing to bring back
  }
  report("qvmstate: the saving process ended early, and the guest could not be brought back (" +
         back.error().message + "); run `qvmstate resume`\n");
  ::_exit(1);
}

}  // namespace

Result<Guardian> Guardian::start(const Qmp &qmp, const std::string &qmp_path,
                                 const std::vector<Disk> &disks, bool was_running) {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
    return fail_errno(errno, "creating the guardian's pipe");
  }
  Descriptor read_end(ends[0]);
  Descriptor write_end(ends[1]);
  const bool set_active = can_set_active(qmp);
  // No handler of the saver may run in the guardian.
  std::optional<io::SignalsBlocked> blocked(std::in_place);
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::setsid();
    for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE, SIGTSTP, SIGTTOU}) {
      ::signal(number, SIG_IGN);
    }
    blocked.reset();
    ::prctl(PR_SET_NAME, "qvmstate-guard");
    std::vector<int> kept = {STDERR_FILENO, read_end.get(), qmp.socket()};
    for (const Disk &disk : disks) {
      kept.push_back(disk.image.get());
    }
    close_all_but(kept);
    guard(read_end.get(), qmp.socket(), qmp_path, disks, was_running, set_active);
  }
  const int error = errno;
  blocked.reset();
  if (pid < 0) {
    return fail_errno(error, "starting the guardian process");
  }
  return Guardian(pid, std::move(write_end));
}

Guardian::Guardian(Guardian &&other) noexcept
    : pid_(std::exchange(other.pid_, -1)), pipe_(std::move(other.pipe_)) {}

Guardian::~Guardian() {
  disarm();
}

void Guardian::disarm() {
  if (pid_ < 0) {
    return;
  }
  const char leave = 'x';
  while (::send(pipe_.get(), &leave, 1, MSG_NOSIGNAL) < 0 && errno == EINTR) {
  }
  pipe_.reset();
  while (::waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) {
  }
  pid_ = -1;
}

void Guardian::hand_over() {
  pipe_.reset();
  pid_ = -1;
}

}  // namespace qvmstate::qemu
