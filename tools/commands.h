// The subcommands: what each is told, and the function that does it and returns the exit status.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "plugin/qemu/operations.h"
#include "qcow2/io/file.h"
#include "tools/output.h"
#include "vmstate/ram_map.h"

namespace qvmstate::tools {

// On a running VM (online.cc).

struct SaveCommand {
  std::string qmp;      ///< of these two
  std::string control;  ///< one is set
  qemu::SaveOptions options;
  Format format = Format::human;
  bool quiet = false;
};
int run_save(const SaveCommand &command);

struct LoadCommand {
  std::string name;
  std::string qmp;
  Format format = Format::human;
};
int run_load(const LoadCommand &command);

struct ResumeCommand {
  std::string qmp;
  Format format = Format::human;
};
int run_resume(const ResumeCommand &command);

struct DeleteCommand {
  std::string name;
  std::string qmp;                  ///< of these two
  std::vector<std::string> images;  ///< one is set
  Format format = Format::human;
};
int run_delete_live(const DeleteCommand &command);

// On images that no VM is using (offline.cc).

int run_delete_offline(const DeleteCommand &command);

struct ReadCommand {
  std::string image;               ///< info: or a migration file
  std::string name;                ///< info only; empty: the image itself
  std::optional<uint64_t> offset;  ///< info only: of the stream in a migration file
  bool force_share = false;        ///< read without locks while a VM writes
  Format format = Format::human;
};
int run_list(const ReadCommand &command);
int run_info(const ReadCommand &command);

// On images that no VM is using, and on migration files (extract.cc).

enum class ExtractKind { block, raw, elf, stream, devices, disk };

struct ExtractCommand {
  std::string path;
  std::string name;                ///< of the snapshot; empty: `path` is a migration file
  std::optional<uint64_t> offset;  ///< of the stream in it
  ExtractKind kind = ExtractKind::block;
  std::string block;  ///< name of the RAM block
  std::vector<vmstate::RamPlace> ram_map;
  std::string output;  ///< a new file, or "-"
  unsigned channels = 4;
  io::DirectMode direct = io::DirectMode::automatic;
  io::Engine engine = io::Engine::automatic;
  bool force_share = false;
  bool quiet = false;
  Format format = Format::human;
};
int run_extract(const ExtractCommand &command);

}  // namespace qvmstate::tools
