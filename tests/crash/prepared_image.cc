#include "prepared_image.h"

#include <filesystem>
#include <stdexcept>

namespace qvmstate::qcow2::test {

std::string kind_name(const PreparedKind &kind) {
  return "v" + std::to_string(kind.version) + "_cluster" + std::to_string(kind.cluster_bytes) +
         (kind.backing_file ? "_backed" : "") + (kind.extended_l2 ? "_extended" : "") +
         (kind.bitmap ? "_bitmap" : "");
}

bool has_good_bitmap(const std::string &path) {
  const std::string info = qemu_img({"info", "-f", "qcow2", path}).output;
  return info.find("name: backup") != std::string::npos && info.find("in-use") == std::string::npos;
}

uint64_t disk_bytes_of(const PreparedKind &kind) {
  return (kind.cluster_bytes == 2 * mib ? 5 * mib : 400 * kib) + 512;
}

void must(const CommandResult &result) {
  if (result.status != 0) {
    throw std::runtime_error("exit " + std::to_string(result.status) + ": " + result.output);
  }
}

void write_generation(const std::string &path, const PreparedKind &kind, int generation) {
  const std::string pattern = std::to_string(0x10 + generation);
  const std::string tail = std::to_string(disk_bytes_of(kind) - 70 * kib - 512);
  must(qemu_io(path, {"write -P " + pattern + " " + std::to_string(generation * 16) + "k 48k",
                      "write -P " + pattern + " " + tail + " 70k"}));
}

void create_image(const std::string &path, const PreparedKind &kind) {
  const std::filesystem::path backing = std::filesystem::path(path).parent_path() / "backing.raw";
  std::vector<std::string> create{"create",
                                  "-q",
                                  "-f",
                                  "qcow2",
                                  "-o",
                                  "compat=" + std::string(kind.version == 2 ? "0.10" : "1.1") +
                                      ",cluster_size=" + std::to_string(kind.cluster_bytes) +
                                      (kind.extended_l2 ? ",extended_l2=on" : "")};
  if (kind.backing_file) {
    // Larger than the disk.
    write_file(backing, compressible_bytes(disk_bytes_of(kind) + 100 * kib, 5));
    create.insert(create.end(), {"-b", "backing.raw", "-F", "raw"});
  }
  create.insert(create.end(), {path, std::to_string(disk_bytes_of(kind))});
  must(qemu_img(create));
  if (kind.bitmap) {
    must(qemu_img({"bitmap", "--add", "-g", "4096", "-f", "qcow2", path, "backup"}));
  }
  write_generation(path, kind, 0);
}

}  // namespace qvmstate::qcow2::test
