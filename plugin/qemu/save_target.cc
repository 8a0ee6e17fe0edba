#include "plugin/qemu/save_target.h"

#include <fcntl.h>

#include <cerrno>
#include <charconv>
#include <cmath>

#include "plugin/qemu/fd_sets.h"

namespace qvmstate::qemu {
namespace {

constexpr std::string_view offset_word = ",offset=";
constexpr std::string_view fd_set_folder = "/dev/fdset/";

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

/// All of `text` as a number of that base; nullopt if it is none, or too large.
std::optional<uint64_t> whole_number(std::string_view text, int base) {
  uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number, base);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) {
    return std::nullopt;
  }
  return number;
}

/// Bytes as QEMU takes an offset: 4096, 0x1000, 4k, 1.5G.
std::optional<uint64_t> parse_bytes(std::string_view text) {
  if (text.starts_with("0x") || text.starts_with("0X")) {
    return whole_number(text.substr(2), 16);  // without suffix: b and e would be digits
  }
  if (text.empty() || !is_digit(text.front())) {
    return std::nullopt;  // also keeps out signs, "inf" and "nan"
  }
  unsigned shift = 0;
  if (!is_digit(text.back())) {
    const size_t power = std::string_view("bkmgtpe").find(static_cast<char>(text.back() | 0x20));
    if (power == std::string_view::npos) {
      return std::nullopt;
    }
    shift = static_cast<unsigned>(10 * power);
    text.remove_suffix(1);
  }
  if (const auto number = whole_number(text, 10)) {
    return *number <= UINT64_MAX >> shift ? std::optional(*number << shift) : std::nullopt;
  }
  double number = 0;
  const auto [end, error] =
      std::from_chars(text.data(), text.data() + text.size(), number, std::chars_format::fixed);
  if (error != std::errc() || end != text.data() + text.size() || shift == 0) {
    return std::nullopt;  // a fraction of a byte
  }
  const double bytes = std::ldexp(number, static_cast<int>(shift));
  return bytes < 0x1p64 ? std::optional(static_cast<uint64_t>(bytes)) : std::nullopt;
}

/// Whether `text` is `word` or continues behind it with an offset.
bool is_word(std::string_view text, std::string_view word) {
  return text == word || (text.starts_with(word) && text.substr(word.size()).starts_with(','));
}

}  // namespace

Result<SaveTarget> parse_save_target(const std::string &text) {
  const auto refuse = [&](const std::string &why) {
    return fail(ErrorCode::bad_argument, "'" + text + "': " + why);
  };
  for (const std::string_view scheme : {"exec:", "tcp:", "unix:", "fd:", "rdma:", "vsock:"}) {
    if (text.starts_with(scheme)) {
      return refuse("a seekable target is required, which '" + std::string(scheme) +
                    "' is not; give file:PATH" +
                    (scheme == "fd:" ? ", or two descriptors by --fd and --direct-fd" : ""));
    }
  }
  SaveTarget target;
  std::string_view rest = text;
  if (rest.starts_with("file:")) {
    rest.remove_prefix(5);
  } else if (is_word(rest, "fd")) {
    target.kind = SaveTarget::Kind::passed;
    rest.remove_prefix(2);
  } else {
    return refuse("is no target; give file:PATH or file:PATH,offset=N");
  }
  std::string_view path = rest;
  if (const size_t end = rest.find(offset_word); end != std::string_view::npos) {
    path = rest.substr(0, end);
    const std::string_view number = rest.substr(end + offset_word.size());
    target.offset = parse_bytes(number);
    if (!target.offset) {
      return refuse("the offset '" + std::string(number) +
                    "' is none; give bytes such as 4096, 0x1000, 4k or 1.5G");
    }
    if (*target.offset > INT64_MAX) {
      return refuse("the offset is larger than any file");
    }
  }
  if (target.kind == SaveTarget::Kind::passed) {
    return path.empty() ? Result<SaveTarget>(target) : refuse("only ',offset=N' can follow 'fd'");
  }
  if (path.empty()) {
    return refuse("has no path; give file:PATH");
  }
  if (path.find('\0') != std::string_view::npos) {
    return refuse("a path has no zero bytes");
  }
  if (path.starts_with(fd_set_folder)) {
    const auto number = whole_number(path.substr(fd_set_folder.size()), 10);
    if (!number || *number > INT64_MAX) {
      return refuse("/dev/fdset/ is followed by the number of an fd set");
    }
    target.kind = SaveTarget::Kind::fd_set;
    target.fd_set = *number;
    return target;
  }
  target.path = path;
  return target;
}

Result<void> check_save_options(const SaveOptions &options) {
  const auto refuse = [](const char *why) { return fail(ErrorCode::bad_argument, why); };
  const bool has_descriptors = options.fd >= 0 || options.direct_fd >= 0;
  if (options.to.empty() && options.name.empty()) {
    return refuse("a save needs the NAME of a snapshot, or a target (--to file:PATH)");
  }
  if (options.channels > channels_max) {
    return refuse("--channels can be 1 to 64, or 0 to choose");
  }
  if (!options.base.empty() && options.layout != SaveLayout::automatic &&
      options.layout != SaveLayout::stream_aligned) {
    return refuse("--base shares groups of the layout stream-aligned; leave out --layout");
  }
  if (options.sparse_bitmap && options.layout != SaveLayout::mapped_ram) {
    return refuse("--sparse-bitmap needs --layout mapped-ram");
  }
  if (options.live && !options.base.empty()) {
    return refuse("--live and --base do not go together; leave out one of them");
  }
  if (options.live && (!options.to.empty() || (options.layout != SaveLayout::automatic &&
                                               options.layout != SaveLayout::legacy))) {
    return refuse(
        "--live writes the legacy layout into the VM's own image; leave out --to and --layout");
  }
  if (options.to.empty()) {
    return has_descriptors ? refuse("descriptors need the target 'fd'") : Result<void>();
  }
  QV_ASSIGN(const SaveTarget target, parse_save_target(options.to));
  if (!options.name.empty()) {
    return refuse("NAME is that of a snapshot in the VM's qcow2; it cannot go with --to or --fd");
  }
  if (options.replace || options.allow_bitmaps || !options.vmstate_node.empty() ||
      !options.base.empty() || options.layout == SaveLayout::stream_aligned) {
    return refuse(
        "--replace, --allow-bitmaps, --base, --layout stream-aligned and --vmstate-node mean a "
        "snapshot in the VM's qcow2; they cannot go with --to or --fd");
  }
  if ((target.kind == SaveTarget::Kind::passed) != has_descriptors) {
    return refuse(has_descriptors ? "--fd and --direct-fd cannot go with --to file:"
                                  : "--to fd needs --fd and --direct-fd");
  }
  if (has_descriptors && (options.fd < 0 || options.direct_fd < 0)) {
    return refuse("--fd and --direct-fd go together: one descriptor without O_DIRECT, one with");
  }
  if (has_descriptors && options.fd == options.direct_fd) {
    return refuse("--fd and --direct-fd are the same descriptor; open the file twice");
  }
  return {};
}

GivenDescriptors::GivenDescriptors(const SaveOptions &options) {
  for (const int number : {options.fd, options.direct_fd}) {
    const bool is_owned = !owned_.empty() && owned_.back().get() == number;
    if (number < 0 || is_owned) {
      continue;
    }
    if (::fcntl(number, F_GETFD) < 0) {
      missing_ = number;
    } else {
      owned_.emplace_back(number);
    }
  }
}

Result<void> GivenDescriptors::check() const {
  if (missing_) {
    return fail(ErrorCode::bad_argument,
                "descriptor " + std::to_string(*missing_) + " is not open (EBADF)", EBADF);
  }
  return {};
}

Result<std::vector<int>> GivenDescriptors::release() {
  QV_TRY(check());
  std::vector<int> numbers;
  numbers.reserve(owned_.size());
  for (Descriptor &descriptor : owned_) {
    numbers.push_back(descriptor.release());
  }
  owned_.clear();
  return numbers;
}

Result<std::unique_ptr<io::TargetFile>> open_save_target(Qmp &qmp, pid_t pid,
                                                         const SaveOptions &options,
                                                         unsigned channels,
                                                         GivenDescriptors &given) {
  QV_ASSIGN(const SaveTarget target, parse_save_target(options.to));
  const io::TargetOptions each = {options.direct, options.engine, options.depth, channels};
  if (target.kind == SaveTarget::Kind::path) {
    return io::TargetFile::open(target.path, target.offset, each);
  }
  std::vector<int> numbers;
  std::string name = "passed descriptors";
  if (target.kind == SaveTarget::Kind::passed) {
    QV_ASSIGN(numbers, given.release());
  } else {
    name = "/dev/fdset/" + std::to_string(target.fd_set);
    QV_ASSIGN(std::vector<Descriptor> fetched,
              descriptors_of_fd_set(qmp, pid, target.fd_set, FdSetUse::writing));
    for (Descriptor &descriptor : fetched) {
      numbers.push_back(descriptor.release());
    }
  }
  return io::TargetFile::adopt(numbers, target.offset.value_or(0), each, name);
}

}  // namespace qvmstate::qemu
