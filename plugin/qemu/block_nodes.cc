#include "plugin/qemu/block_nodes.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <map>
#include <set>

#include "plugin/qemu/process_files.h"
#include "qcow2/locks.h"

namespace qvmstate::qemu {
namespace {

constexpr std::string_view fdset_prefix = "/dev/fdset/";

/// What QEMU says of all nodes and who uses them.
struct Graph {
  std::map<std::string, Json> nodes;                       // by node name
  std::vector<std::pair<uint64_t, std::string>> backends;  // number in the graph, name
  std::map<uint64_t, std::string> node_names;              // by number in the graph
  std::map<uint64_t, uint64_t> root_of;                    // backend -> node
  std::map<uint64_t, uint64_t> file_of;                    // node -> its "file" child
  std::set<uint64_t> used;                                 // nodes with parents
  std::map<std::string, std::string> device_of;            // node name -> backend or device

  const Json &node(const std::string &name) const {
    const auto found = nodes.find(name);
    return found == nodes.end() ? json_missing : found->second;
  }
};

Result<Graph> read_graph(Qmp &qmp) {
  Graph graph;
  QV_ASSIGN(const Json nodes, qmp.execute("query-named-block-nodes", {{"flat", true}}));
  QV_ASSIGN(const Json backends, qmp.execute("query-block"));
  QV_ASSIGN(const Json edges, qmp.execute("x-debug-query-block-graph"));
  for (const Json &node : nodes) {
    graph.nodes[text_at(node, "node-name")] = node;
  }
  for (const Json &backend : backends) {
    const std::string node = text_at(at(backend, "inserted"), "node-name");
    std::string device = text_at(backend, "device");
    if (device.empty()) {
      device = text_at(backend, "qdev");
    }
    if (!node.empty()) {
      graph.device_of.emplace(node, device);
    }
  }
  for (const Json &vertex : at(edges, "nodes")) {
    const uint64_t number = number_at(vertex, "id");
    if (text_at(vertex, "type") == "block-backend") {
      graph.backends.emplace_back(number, text_at(vertex, "name"));
    } else if (text_at(vertex, "type") == "block-driver") {
      graph.node_names[number] = text_at(vertex, "name");
    }
  }
  // QEMU numbers backends in their creation order.
  std::sort(graph.backends.begin(), graph.backends.end());
  for (const Json &edge : at(edges, "edges")) {
    const uint64_t parent = number_at(edge, "parent");
    const uint64_t child = number_at(edge, "child");
    graph.used.insert(child);
    if (text_at(edge, "name") == "root") {
      graph.root_of.emplace(parent, child);
    } else if (text_at(edge, "name") == "file") {
      graph.file_of.emplace(parent, child);
    }
  }
  return graph;
}

/// Node numbers in loadvm's order, writable ones only.
std::vector<uint64_t> included_nodes(const Graph &graph) {
  std::vector<uint64_t> included;
  auto add = [&](uint64_t number) {
    const auto name = graph.node_names.find(number);
    if (name == graph.node_names.end() || flag_at(graph.node(name->second), "ro", true) ||
        std::find(included.begin(), included.end(), number) != included.end()) {
      return;
    }
    included.push_back(number);
  };
  for (const auto &[backend, name] : graph.backends) {
    if (const auto root = graph.root_of.find(backend); root != graph.root_of.end()) {
      add(root->second);
    }
  }
  for (const auto &[number, name] : graph.node_names) {
    if (!graph.used.contains(number)) {
      add(number);
    }
  }
  return included;
}

/// Device and inode of the file that a protocol node's name stands for.
Result<OpenFile> find_open_file(Qmp &qmp, pid_t pid, const std::vector<OpenFile> &files,
                                const Disk &disk) {
  const std::string path = path_of_node_name(disk.file);
  auto with_inode = [&](dev_t device, ino_t inode) {
    return std::find_if(files.begin(), files.end(), [&](const OpenFile &file) {
      return file.device == device && file.inode == inode;
    });
  };
  if (path.starts_with(fdset_prefix)) {
    QV_ASSIGN(const Json sets, qmp.execute("query-fdsets"));
    for (const Json &set : sets) {
      if (path != std::string(fdset_prefix) + std::to_string(number_at(set, "fdset-id"))) {
        continue;
      }
      for (const Json &member : at(set, "fds")) {
        const int number = static_cast<int>(number_at(member, "fd"));
        const auto found = std::find_if(files.begin(), files.end(), [&](const OpenFile &file) {
          return file.number == number;
        });
        if (found != files.end()) {
          return *found;
        }
      }
    }
    return fail(ErrorCode::not_found,
                describe(disk) + ": QEMU shows no descriptor of that set in process " +
                    std::to_string(pid) + "; was the QMP socket opened by another process?");
  }
  struct stat status;
  if (!path.empty() && stat_as(pid, path, status)) {
    if (const auto found = with_inode(status.st_dev, status.st_ino); found != files.end()) {
      return *found;
    }
    // A block device is the same by its number, through whatever file it was opened.
    if (S_ISBLK(status.st_mode)) {
      for (const OpenFile &file : files) {
        struct stat opened;
        if (S_ISBLK(file.mode) && stat_as(pid, file.target, opened) &&
            opened.st_rdev == status.st_rdev) {
          return file;
        }
      }
    }
  }
  const std::string last_part = path.substr(path.rfind('/') + 1);
  for (const OpenFile &file : files) {
    if (file.target.ends_with(last_part + " (deleted)") || file.links == 0) {
      if (!last_part.empty() && file.target.find(last_part) != std::string::npos) {
        return fail(ErrorCode::not_supported,
                    describe(disk) +
                        ": the file is deleted (a temporary one of -snapshot?); what is saved "
                        "there is lost with QEMU; start QEMU without -snapshot");
      }
    }
  }
  for (const OpenFile &file : files) {
    if (!last_part.empty() && file.target.ends_with("/" + last_part)) {
      return fail(
          ErrorCode::not_supported,
          describe(disk) + ": QEMU has the file open, but cannot open it again by that name" +
              (path.starts_with('/') ? " (moved?)" : " (relative, and QEMU's folder is another)") +
              ", as a save makes it do; start QEMU with the absolute path");
    }
  }
  return fail(
      ErrorCode::not_found,
      describe(disk) + ": process " + std::to_string(pid) +
          " at the other end of the QMP socket has no such file open; if another program "
          "opened that socket for QEMU, give QEMU a second -qmp unix:PATH,server=on,wait=off");
}

Result<Disk> examine(Qmp &qmp, pid_t pid, const Graph &graph, const std::vector<OpenFile> &files,
                     uint64_t number) {
  Disk disk;
  disk.node = graph.node_names.at(number);
  if (const auto device = graph.device_of.find(disk.node); device != graph.device_of.end()) {
    disk.device = device->second;
  }
  const Json &node = graph.node(disk.node);
  disk.file = text_at(node, "file");
  disk.active = flag_at(node, "active", true);
  for (const Json &bitmap : at(node, "dirty-bitmaps")) {
    disk.has_bitmaps = disk.has_bitmaps || bitmap.is_object();
    if (flag_at(bitmap, "persistent")) {
      disk.persistent_bitmap = text_at(bitmap, "name");
    }
  }
  const std::string driver = text_at(node, "drv");
  if (driver != "qcow2") {
    return fail(ErrorCode::not_supported,
                describe(disk) + ": writable, but its top layer is '" + driver +
                    "' and not qcow2, so it cannot hold a snapshot and loadvm would refuse; make "
                    "it qcow2 or read-only");
  }
  const auto child = graph.file_of.find(number);
  const Json &protocol = child == graph.file_of.end() || !graph.node_names.contains(child->second)
                             ? json_missing
                             : graph.node(graph.node_names.at(child->second));
  const std::string protocol_driver = text_at(protocol, "drv", "nothing");
  if (protocol_driver != "file" && protocol_driver != "host_device") {
    return fail(ErrorCode::not_supported,
                describe(disk) + ": lies on '" + protocol_driver +
                    "'; only qcow2 directly on a local file or block device can be served");
  }
  disk.file = text_at(protocol, "file", disk.file);
  disk.page_cache = !flag_at(at(protocol, "cache"), "direct");
  QV_ASSIGN(const OpenFile file, find_open_file(qmp, pid, files, disk));
  if (file.links == 0 && S_ISREG(file.mode)) {
    return fail(ErrorCode::not_supported,
                describe(disk) +
                    ": the file is deleted (a temporary one of -snapshot?); what is "
                    "saved there is lost with QEMU; start QEMU without -snapshot");
  }
  QV_ASSIGN(disk.image, reopen(pid, file.number, O_RDWR, disk.file));
  struct stat opened;
  if (::fstat(disk.image.get(), &opened) != 0 || opened.st_ino != file.inode ||
      opened.st_dev != file.device) {
    return fail(ErrorCode::bad_state, describe(disk) + ": QEMU is changing its files; try again");
  }
  return disk;
}

}  // namespace

std::string describe(const Disk &disk) {
  std::string text = "disk '" + disk.node + "' (";
  if (!disk.device.empty() && disk.device != disk.node) {
    text += disk.device + ", ";
  }
  return text + disk.file + ")";
}

std::string path_of_node_name(const std::string &name) {
  if (name.starts_with("json:")) {
    Json options = parse_json(std::string_view(name).substr(5));
    for (int depth = 0; depth < 4 && options.is_object(); ++depth) {
      if (const std::string path = text_at(options, "filename"); !path.empty()) {
        return path_of_node_name(path);
      }
      if (const std::string path = text_at(options, "file.filename"); !path.empty()) {
        return path_of_node_name(path);
      }
      const Json inner = at(options, "file");
      options = inner;
    }
    return {};
  }
  for (const std::string_view prefix : {"file:", "host_device:"}) {
    if (name.starts_with(prefix)) {
      return name.substr(prefix.size());
    }
  }
  return name;
}

Result<std::vector<Disk>> find_disks(Qmp &qmp, pid_t pid) {
  QV_ASSIGN(const Graph graph, read_graph(qmp));
  QV_ASSIGN(const std::vector<OpenFile> files, open_files(pid));
  std::vector<Disk> disks;
  for (const uint64_t number : included_nodes(graph)) {
    QV_ASSIGN(Disk disk, examine(qmp, pid, graph, files, number));
    disks.push_back(std::move(disk));
  }
  if (disks.empty()) {
    return fail(ErrorCode::not_supported,
                "the VM has no writable qcow2 disk that could hold a snapshot; give it one");
  }
  return disks;
}

Result<Holder> holder_of(const Disk &disk) {
  bool held[4] = {};
  constexpr uint64_t bytes[4] = {101, 201, 103, 203};
  for (int i = 0; i < 4; ++i) {
    auto locked = qcow2::is_locked_by_other(disk.image.get(), bytes[i]);
    if (!locked) {
      return tl::unexpected(with_context(locked.error(), describe(disk)));
    }
    held[i] = *locked;
  }
  QV_ASSIGN(const bool read, qcow2::is_locked_by_other(disk.image.get(), 100));
  if (read && held[0] && held[1]) {
    return Holder::running;
  }
  return held[0] || held[1] || held[2] || held[3] ? Holder::other : Holder::inactive;
}

}  // namespace qvmstate::qemu
