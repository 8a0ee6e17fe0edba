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
#include "vmstate/stream_reader.h"

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

// check.cc

struct CheckCommand {
  std::string image;
  std::string name;          ///< empty: all snapshots
  bool independent = false;  ///< a second time through libqcow
  io::DirectMode direct = io::DirectMode::automatic;
  bool force_share = false;
  Format format = Format::human;
};
/// exit_done: nothing is wrong; exit_failed: something is, or it could not be found out.
int run_check(const CheckCommand &command);

// convert.cc

struct ConvertCommand {
  std::string image;
  std::string name;
  std::optional<vmstate::Layout> layout;  ///< default: as it is
  bool compress = false;
  unsigned threads = 0;  ///< that compress; 0: one a CPU
  Format format = Format::human;
};
int run_convert(const ConvertCommand &command);

// export.cc

struct ExportCommand {
  std::string image;
  std::string name;
  std::string output;                     ///< a new file
  std::optional<vmstate::Layout> layout;  ///< default: as it is
  bool as_libvirt_save = false;
  std::string xml;  ///< file with the XML of the domain, for that
  bool force_share = false;
  Format format = Format::human;
};
int run_export(const ExportCommand &command);

// import.cc

struct ImportCommand {
  std::string file;
  std::string image;               ///< gets the state
  std::vector<std::string> disks;  ///< other images of the VM, which get their disk's snapshot
  std::string name;
  std::optional<uint64_t> offset;         ///< of the stream in the file
  std::optional<vmstate::Layout> layout;  ///< default: as it is
  bool replace = false;
  bool allow_bitmaps = false;  ///< persistent dirty bitmaps are no reason to refuse
  std::string save_xml;        ///< where the XML of a libvirt save file goes; empty: nowhere
  Format format = Format::human;
};
int run_import(const ImportCommand &command);

// diff.cc

struct DiffCommand {
  std::string image;
  std::string a;
  std::string b;
  bool force_share = false;
  Format format = Format::human;
};
int run_diff(const DiffCommand &command);

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
