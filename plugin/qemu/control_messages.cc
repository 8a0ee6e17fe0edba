// The control socket's messages: options, reports and errors as JSON.
#include <algorithm>

#include "plugin/qemu/control.h"

namespace qvmstate::qemu {
namespace {

struct CodeName {
  ErrorCode code;
  const char *name;
};
constexpr CodeName code_names[] = {
    {ErrorCode::io, "io"},
    {ErrorCode::no_space, "no-space"},
    {ErrorCode::bad_image, "bad-image"},
    {ErrorCode::bad_stream, "bad-stream"},
    {ErrorCode::not_supported, "not-supported"},
    {ErrorCode::locked, "locked"},
    {ErrorCode::exists, "exists"},
    {ErrorCode::not_found, "not-found"},
    {ErrorCode::bad_argument, "bad-argument"},
    {ErrorCode::permission, "permission"},
    {ErrorCode::bad_state, "bad-state"},
    {ErrorCode::peer, "peer"},
    {ErrorCode::cancelled, "cancelled"},
};

constexpr const char *direct_names[] = {"auto", "on", "off"};
constexpr const char *engine_names[] = {"auto", "io_uring", "threads"};
constexpr const char *layout_names[] = {"auto", "legacy", "mapped-ram", "stream-aligned"};

enum class Type { text, number, flag };
struct Argument {
  const char *name;
  Type type;
};
constexpr Argument save_arguments[] = {
    {"name", Type::text},          {"replace", Type::flag},       {"vmstate-node", Type::text},
    {"direct", Type::text},        {"engine", Type::text},        {"buffers", Type::number},
    {"depth", Type::number},       {"rate-limit", Type::number},  {"layout", Type::text},
    {"sparse-bitmap", Type::flag}, {"channels", Type::number},    {"to", Type::text},
    {"descriptors", Type::number}, {"allow-bitmaps", Type::flag}, {"base", Type::text},
    {"live", Type::flag},
};

bool has_type(const Json &value, Type type) {
  switch (type) {
    case Type::text:
      return value.is_string();
    case Type::number:
      return value.is_number_unsigned();
    case Type::flag:
      return value.is_boolean();
  }
  return false;
}

template <class Enum, size_t count>
Result<Enum> choice_from(const Json &arguments, const char *key,
                         const char *const (&names)[count]) {
  const std::string word = text_at(arguments, key, names[0]);
  for (size_t i = 0; i < count; ++i) {
    if (word == names[i]) {
      return static_cast<Enum>(i);
    }
  }
  return fail(ErrorCode::bad_argument, std::string("'") + key + "' cannot be '" + word + "'");
}

Json to_json(const DiskReport &disk) {
  return {{"node", disk.node},
          {"file", disk.file},
          {"snapshot-id", disk.snapshot_id},
          {"has-vmstate", disk.has_vmstate},
          {"metadata-bytes", disk.metadata_bytes}};
}

}  // namespace

Json to_json(const SaveOptions &options) {
  Json json = {{"name", options.name},
               {"replace", options.replace},
               {"vmstate-node", options.vmstate_node},
               {"direct", direct_names[static_cast<size_t>(options.direct)]},
               {"engine", engine_names[static_cast<size_t>(options.engine)]},
               {"buffers", options.buffers},
               {"depth", options.depth},
               {"rate-limit", options.rate_limit_bytes_per_second}};
  // A plugin of an older release refuses what it does not know, and need not, if it is not used.
  if (options.layout != SaveLayout::automatic) {
    json["layout"] = layout_names[static_cast<size_t>(options.layout)];
  }
  if (!options.base.empty()) {
    json["base"] = options.base;
  }
  if (options.sparse_bitmap) {
    json["sparse-bitmap"] = true;
  }
  if (options.allow_bitmaps) {
    json["allow-bitmaps"] = true;
  }
  if (options.live) {
    json["live"] = true;
  }
  if (options.channels != 0) {
    json["channels"] = options.channels;
  }
  if (!options.to.empty()) {
    json["to"] = options.to;
  }
  if (options.fd >= 0 || options.direct_fd >= 0) {
    json["descriptors"] = 2;
  }
  return json;
}

Result<SaveOptions> save_options_from(const Json &arguments, std::vector<Descriptor> received) {
  SaveOptions options;
  for (const auto &[key, value] : arguments.items()) {
    const auto *known =
        std::find_if(std::begin(save_arguments), std::end(save_arguments),
                     [&name = key](const Argument &argument) { return name == argument.name; });
    if (known == std::end(save_arguments) || !has_type(value, known->type)) {
      return fail(ErrorCode::bad_argument, "'save' cannot take the argument '" + key + "'");
    }
  }
  options.name = text_at(arguments, "name");
  options.replace = flag_at(arguments, "replace");
  options.vmstate_node = text_at(arguments, "vmstate-node");
  QV_ASSIGN(options.direct, choice_from<io::DirectMode>(arguments, "direct", direct_names));
  QV_ASSIGN(options.engine, choice_from<io::Engine>(arguments, "engine", engine_names));
  options.buffers = number_at(arguments, "buffers", options.buffers);
  const uint64_t depth = number_at(arguments, "depth", options.depth);
  if (options.buffers < io::buffer_count_min || options.buffers > 1024 || depth < 1 ||
      depth > 1024) {
    return fail(ErrorCode::bad_argument, "'buffers' can be 2 to 1024 and 'depth' 1 to 1024");
  }
  options.depth = static_cast<unsigned>(depth);
  options.rate_limit_bytes_per_second = number_at(arguments, "rate-limit");
  QV_ASSIGN(options.layout, choice_from<SaveLayout>(arguments, "layout", layout_names));
  options.base = text_at(arguments, "base");
  options.sparse_bitmap = flag_at(arguments, "sparse-bitmap");
  options.allow_bitmaps = flag_at(arguments, "allow-bitmaps");
  options.live = flag_at(arguments, "live");
  options.channels =
      static_cast<unsigned>(std::min<uint64_t>(number_at(arguments, "channels"), channels_max + 1));
  options.to = text_at(arguments, "to");
  const uint64_t announced = number_at(arguments, "descriptors");
  if (announced != received.size() || (announced != 0 && announced != 2)) {
    return fail(ErrorCode::bad_argument, "'save' was sent " + std::to_string(received.size()) +
                                             " descriptors, and 'descriptors' says " +
                                             std::to_string(announced) + "; it takes none or two");
  }
  if (announced == 2) {
    options.fd = received[0].get();
    options.direct_fd = received[1].get();
  }
  QV_TRY(check_save_options(options));
  for (Descriptor &descriptor : received) {
    descriptor.release();
  }
  return options;
}

Json to_json(const SaveReport &report) {
  Json disks = Json::array();
  for (const DiskReport &disk : report.disks) {
    disks.push_back(to_json(disk));
  }
  return {{"name", report.name},
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
          {"total-seconds", report.total_seconds},
          {"data-seconds", report.data_seconds},
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
          {"disks", disks},
          {"warnings", report.warnings}};
}

SaveReport save_report_from(const Json &value) {
  SaveReport report;
  report.name = text_at(value, "name");
  report.source = text_at(value, "source");
  report.machine_type = text_at(value, "machine-type");
  report.qemu_version = text_at(value, "qemu-version");
  report.was_running = flag_at(value, "was-running");
  report.ram_bytes = number_at(value, "ram-bytes");
  report.data_pages = number_at(value, "data-pages");
  report.zero_pages = number_at(value, "zero-pages");
  report.untouched_pages = number_at(value, "untouched-pages");
  report.vmstate_bytes = number_at(value, "vmstate-bytes");
  report.copied_bytes = number_at(value, "copied-bytes");
  report.written_bytes = number_at(value, "written-bytes");
  report.pause_seconds = real_at(value, "pause-seconds");
  for (const Json &pause : at(value, "pauses-seconds")) {
    report.pauses_seconds.push_back(pause.is_number() ? pause.get<double>() : 0);
  }
  report.writes_served = number_at(value, "writes-served");
  report.writes_delayed = number_at(value, "writes-delayed");
  report.total_seconds = real_at(value, "total-seconds");
  report.data_seconds = real_at(value, "data-seconds");
  report.io_engine = text_at(value, "io-engine");
  report.layout = text_at(value, "layout");
  report.base = text_at(value, "base");
  report.group_bytes = number_at(value, "group-bytes");
  report.written_groups = number_at(value, "written-groups");
  report.shared_groups = number_at(value, "shared-groups");
  report.read_groups = number_at(value, "read-groups");
  report.tracked_groups = number_at(value, "tracked-groups");
  report.untracked = text_at(value, "untracked");
  report.target = text_at(value, "target");
  report.channels = static_cast<unsigned>(number_at(value, "channels"));
  report.target_bytes = number_at(value, "target-bytes");
  for (const Json &disk : at(value, "disks")) {
    report.disks.push_back({text_at(disk, "node"), text_at(disk, "file"),
                            text_at(disk, "snapshot-id"), flag_at(disk, "has-vmstate"),
                            number_at(disk, "metadata-bytes")});
  }
  for (const Json &warning : at(value, "warnings")) {
    report.warnings.push_back(text(warning));
  }
  return report;
}

Json to_json(const Error &error) {
  const char *name = "io";
  for (const CodeName &known : code_names) {
    name = known.code == error.code ? known.name : name;
  }
  return {{"class", name}, {"desc", error.message}, {"errno", error.sys_errno}};
}

Error error_from(const Json &value) {
  Error error = {ErrorCode::peer, static_cast<int>(number_at(value, "errno")),
                 text_at(value, "desc", "the plugin gave no reason")};
  const std::string name = text_at(value, "class");
  for (const CodeName &known : code_names) {
    error.code = name == known.name ? known.code : error.code;
  }
  return error;
}

}  // namespace qvmstate::qemu
