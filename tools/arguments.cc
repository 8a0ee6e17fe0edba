// See arguments.h.
#include "tools/arguments.h"

#include <climits>
#include <map>
#include <vector>

#include "tools/format.h"
#include "vmstate/compressed_copy.h"
#include "vmstate/mapped_ram_reader.h"

namespace qvmstate::tools {

namespace {

constexpr size_t buffers_max = 1024;

const std::map<std::string, Format> formats = {{"human", Format::human}, {"json", Format::json}};
const std::map<std::string, io::DirectMode> direct_modes = {
    {"auto", io::DirectMode::automatic}, {"on", io::DirectMode::on}, {"off", io::DirectMode::off}};
const std::map<std::string, io::Engine> engines = {{"auto", io::Engine::automatic},
                                                   {"io_uring", io::Engine::uring},
                                                   {"threads", io::Engine::threads}};
const std::map<std::string, qemu::SaveLayout> layouts = {
    {"auto", qemu::SaveLayout::automatic},
    {"legacy", qemu::SaveLayout::legacy},
    {"mapped-ram", qemu::SaveLayout::mapped_ram},
    {"stream-aligned", qemu::SaveLayout::stream_aligned}};

/// Lower numbers are stdin, stdout and stderr.
constexpr int passed_descriptor_min = 3;

template <class T>
void add_choice(CLI::App &app, const std::string &option, T &target,
                const std::map<std::string, T> &choices, const std::string &help) {
  std::string words;
  for (const auto &[word, value] : choices) {
    words += (words.empty() ? "" : "|") + word;
  }
  app.add_option(option, target, help)
      ->type_name(words)
      ->transform([words, choices](std::string word) {
        const auto found = choices.find(word);
        if (found == choices.end()) {
          throw CLI::ValidationError("'" + word + "' is not one of " + words);
        }
        return std::to_string(static_cast<int>(found->second));
      });
}

const std::map<std::string, ExtractKind> extract_kinds = {
    {"block", ExtractKind::block}, {"devices", ExtractKind::devices},
    {"disk", ExtractKind::disk},   {"elf", ExtractKind::elf},
    {"raw", ExtractKind::raw},     {"stream", ExtractKind::stream}};

void set_kind(ExtractCommand &command, const std::vector<std::string> &words) {
  const auto kind = extract_kinds.find(words.at(0));
  if (kind == extract_kinds.end()) {
    std::string known;
    for (const auto &[word, value] : extract_kinds) {
      known += (known.empty() ? "" : ", ") + word;
    }
    throw CLI::ValidationError("--as: '" + words[0] + "' is not one of " + known);
  }
  command.kind = kind->second;
  const bool takes_block = command.kind == ExtractKind::block;
  if (takes_block && words.size() < 2) {
    throw CLI::ValidationError("--as block: takes the name of a RAM block");
  }
  if (!takes_block && words.size() > 1) {
    throw CLI::ValidationError("--as " + words[0] + ": takes no '" + words[1] +
                               "'; IMAGE and NAME come before --as");
  }
  if (takes_block) {
    command.block = words[1];
  }
}

void add_target(CLI::App &save, qemu::SaveOptions &options) {
  save.add_option("--to", options.to,
                  "Instead of a snapshot: file:PATH (replaced as a whole), file:PATH,offset=N "
                  "(written from there on), file:/dev/fdset/N, fd[,offset=N]")
      ->check([](const std::string &text) {
        return text.empty() ? std::string("is empty; give file:PATH") : std::string();
      })
      ->type_name("TARGET");
  save.add_option("--fd", options.fd,
                  "Open descriptor of the target, without O_DIRECT; with --direct-fd")
      ->check(CLI::Range(passed_descriptor_min, INT_MAX))
      ->type_name("N");
  save.add_option("--direct-fd", options.direct_fd,
                  "Open descriptor of the same file, with O_DIRECT; with --fd")
      ->check(CLI::Range(passed_descriptor_min, INT_MAX))
      ->type_name("N");
  add_choice(save, "--layout", options.layout, layouts,
             "How RAM lies in the state: page after page, each page at its place, or page after "
             "page in groups that later saves can share");
  save.add_option("--channels", options.channels, "Threads that write at the same time")
      ->check(CLI::Range(1U, qemu::channels_max))
      ->type_name("N");
  save.add_flag("--sparse-bitmap", options.sparse_bitmap,
                "With mapped-ram: leave holes in the bitmap of pages");
}

void add_allow_bitmaps(CLI::App &app, bool &target) {
  app.add_flag("--allow-bitmaps", target,
               "Go on where a disk has persistent dirty bitmaps, which have to be removed before "
               "the snapshot is loaded");
}

void add_layout(CLI::App &app, std::optional<vmstate::Layout> &target) {
  app.add_option_function<std::string>(
         "--layout",
         [&target](const std::string &word) {
           target = word == "legacy" ? vmstate::Layout::legacy : vmstate::Layout::mapped_ram;
         },
         "How RAM lies in the state; default: as it does")
      ->check(CLI::IsMember({"legacy", "mapped-ram"}))
      ->type_name("legacy|mapped-ram");
}

void add_image_and_name(CLI::App &app, std::string &image, std::string &name) {
  app.add_option("IMAGE", image, "A qcow2 image")->required()->type_name("");
  app.add_option("NAME", name, "Name of the snapshot")->required()->type_name("");
}

}  // namespace

CLI::Option *add_qmp(CLI::App &app, std::string &target) {
  return app.add_option("--qmp", target, "QMP socket of the running QEMU (-qmp unix:SOCK,...)")
      ->type_name("SOCK");
}

void add_name(CLI::App &app, std::string &target) {
  app.add_option("NAME", target, "Name of the snapshot")->required()->type_name("");
}

void add_format(CLI::App &app, Format &target) {
  add_choice(app, "--format", target, formats, "How to print; json: one event a line");
}

void add_save(CLI::App &app, SaveCommand &command) {
  CLI::App *save =
      app.add_subcommand("save", "Save the state of a running VM into its own qcow2 or a file");
  save->add_option("NAME", command.options.name, "Name of the snapshot; none with --to and --fd")
      ->type_name("");
  CLI::Option_group *where = save->add_option_group("which VM");
  add_qmp(*where, command.qmp);
  where->add_option("--control", command.control, "Control socket of the plugin in QEMU")
      ->type_name("SOCK");
  where->require_option(1);
  save->add_flag("--live", command.options.live,
                 "Let the guest run while its RAM is copied (with --control)");
  save->add_flag("--replace", command.options.replace,
                 "Take the place of a snapshot of that name, once the new one is there");
  save->add_option("--base", command.options.base,
                   "Write only what has changed since this snapshot, which was saved with "
                   "--layout stream-aligned or --base, and share the rest with it")
      ->type_name("NAME");
  add_allow_bitmaps(*save, command.options.allow_bitmaps);
  save->add_option("--vmstate-node", command.options.vmstate_node,
                   "Block node for the state; default: the one that loadvm looks at first")
      ->type_name("NODE");
  add_choice(*save, "--direct", command.options.direct, direct_modes,
             "Bypass the page cache (O_DIRECT)");
  add_choice(*save, "--engine", command.options.engine, engines, "What does the file I/O");
  save->add_option("--limit-rate",
                   "Bytes written per second at most: 500000, 10M, 1.5G (powers of 1024)")
      ->type_name("RATE")
      ->each([&command](const std::string &text) {
        const Result<uint64_t> rate = parse_rate(text);
        if (!rate) {
          throw CLI::ValidationError(rate.error().message);
        }
        command.options.rate_limit_bytes_per_second = *rate;
      });
  save->add_option("--buffers", command.options.buffers, "Number of 1 MiB buffers")
      ->check(CLI::Range(io::buffer_count_min, buffers_max))
      ->type_name("N");
  add_target(*save, command.options);
  add_format(*save, command.format);
  save->add_flag("-q,--quiet", command.quiet, "No progress and no summary; with json only the end");
  save->footer(
      "Examples:\n"
      "  qvmstate save before-upgrade --qmp /run/vm/qmp.sock\n"
      "  qvmstate save nightly --replace --limit-rate 200M --qmp /run/vm/qmp.sock\n"
      "  qvmstate save hourly --replace --live --control /run/vm/ctl.sock\n"
      "  qvmstate save first --layout stream-aligned --qmp /run/vm/qmp.sock\n"
      "  qvmstate save second --base first --qmp /run/vm/qmp.sock\n"
      "  qvmstate save --to file:/backup/vm.state --layout mapped-ram --qmp /run/vm/qmp.sock");
  save->final_callback([&command] {
    qemu::SaveOptions &options = command.options;
    if (options.to.empty() && (options.fd >= 0 || options.direct_fd >= 0)) {
      options.to = "fd";
    }
    if (const Result<void> checked = qemu::check_save_options(options); !checked) {
      throw CLI::ValidationError(checked.error().message);
    }
  });
}

CLI::Option *add_offset(CLI::App &app, std::optional<uint64_t> &target) {
  return app
      .add_option("--offset", target,
                  "The stream begins at this byte of a migration file (file:FILE,offset=N)")
      ->type_name("N");
}

void add_extract(CLI::App &app, ExtractCommand &command) {
  CLI::App *extract =
      app.add_subcommand("extract", "Write what a snapshot or a migration file holds to a file");
  extract->add_option("IMAGE", command.path, "A qcow2 image, or a migration file")
      ->required()
      ->type_name("");
  CLI::Option *name = extract->add_option("NAME", command.name, "The snapshot in the image");
  name->type_name("");
  add_offset(*extract, command.offset)->excludes(name);
  extract
      ->add_option_function<std::vector<std::string>>(
          "--as", [&command](const std::vector<std::string> &words) { set_kind(command, words); },
          "What: the RAM block of this name, byte for byte; guest-physical memory (raw), or as a "
          "core for gdb (elf); the bytes of the stream; devices as JSON; the snapshot's disk")
      ->expected(1, 2)
      ->required()
      ->type_name("block BLOCK|devices|disk|elf|raw|stream");
  extract->add_option("-o,--output", command.output, "A new file, or - for standard output")
      ->required()
      ->type_name("OUT");
  extract->add_option("--channels", command.channels, "Threads that read a mapped-ram state")
      ->check(CLI::Range(1U, vmstate::mapped_channels_max))
      ->type_name("N");
  extract
      ->add_option_function<std::vector<std::string>>(
          "--ram-map",
          [&command](const std::vector<std::string> &words) {
            for (const std::string &word : words) {
              Result<vmstate::RamPlace> place = vmstate::parse_ram_place(word);
              if (!place) {
                throw CLI::ValidationError(place.error().message);
              }
              command.ram_map.push_back(std::move(*place));
            }
          },
          "For raw and elf: where in guest-physical memory a RAM block lies, if the machine type "
          "does not tell; once for each piece")
      ->allow_extra_args(false)
      ->type_name("BLOCK=ADDRESS[,BYTES[,OFFSET]]");
  add_choice(*extract, "--direct", command.direct, direct_modes,
             "Bypass the page cache (O_DIRECT)");
  add_choice(*extract, "--engine", command.engine, engines, "What does the file I/O");
  extract->add_flag("-U,--force-share", command.force_share,
                    "Read without locks while a VM uses the image; what is read may be torn");
  add_format(*extract, command.format);
  extract->add_flag("-q,--quiet", command.quiet, "No progress and no summary");
  extract->footer(
      "Examples:\n"
      "  qvmstate extract disk.qcow2 nightly --as elf -o memory.core\n"
      "  qvmstate extract disk.qcow2 nightly --as raw -o memory.bin\n"
      "  qvmstate extract disk.qcow2 nightly --as block pc.ram -o ram.bin\n"
      "  qvmstate extract disk.qcow2 nightly --as disk -o disk.raw\n"
      "  qvmstate extract vm.mig --as devices -o -\n"
      "  qvmstate extract vm.mig --offset 4096 --as stream -o -");
}

void add_check(CLI::App &app, CheckCommand &command) {
  CLI::App *check = app.add_subcommand("check", "Look for damage in an image and its VM states");
  check->add_option("IMAGE", command.image, "A qcow2 image")->required()->type_name("");
  check->add_option("NAME", command.name, "The state of this snapshot only; default: of all")
      ->type_name("");
  check->add_flag("--independent", command.independent,
                  "Read states and disks a second time through libqcow, and compare");
  add_choice(*check, "--direct", command.direct, direct_modes, "Bypass the page cache (O_DIRECT)");
  check->add_flag("-U,--force-share", command.force_share,
                  "Read without locks while a VM uses the image; what is read may be torn");
  add_format(*check, command.format);
  check->footer(
      "Exit status: 0 nothing is wrong; 1 damage, leaked clusters, something that QEMU will "
      "refuse, or the check could not be done; 2 wrong usage.\n"
      "Examples:\n"
      "  qvmstate check disk.qcow2\n"
      "  qvmstate check disk.qcow2 nightly --independent");
}

void add_convert(CLI::App &app, ConvertCommand &command) {
  CLI::App *convert = app.add_subcommand(
      "convert", "Write the VM state of a snapshot anew: in another layout, compressed or not");
  add_image_and_name(*convert, command.image, command.name);
  add_layout(*convert, command.layout);
  convert->add_flag("--compress", command.compress,
                    "Into compressed clusters, deflate or zstd as the image has it");
  convert->add_option("--threads", command.threads, "Threads that compress; default: one a CPU")
      ->check(CLI::Range(1U, vmstate::compress_threads_max))
      ->type_name("N");
  add_format(*convert, command.format);
  convert->footer(
      "Examples:\n"
      "  qvmstate convert disk.qcow2 nightly --compress\n"
      "  qvmstate convert disk.qcow2 nightly --layout mapped-ram");
}

void add_export(CLI::App &app, ExportCommand &command) {
  CLI::App *save = app.add_subcommand(
      "export", "Write the VM state of a snapshot to a file that QEMU or libvirt loads");
  add_image_and_name(*save, command.image, command.name);
  save->add_option("FILE", command.output, "A new file")->required()->type_name("");
  add_layout(*save, command.layout);
  CLI::Option *as =
      save->add_option_function<std::string>(
              "--as", [&command](const std::string &) { command.as_libvirt_save = true; },
              "As `virsh save` writes it, with --xml; default: as QEMU's migrate does")
          ->check(CLI::IsMember({"libvirt-save"}))
          ->type_name("libvirt-save");
  CLI::Option *xml =
      save->add_option("--xml", command.xml, "The domain, as `virsh dumpxml` prints it")
          ->type_name("XML");
  as->needs(xml);
  xml->needs(as);
  save->add_flag("-U,--force-share", command.force_share,
                 "Read without locks while a VM uses the image; what is read may be torn");
  add_format(*save, command.format);
  save->footer(
      "Examples:\n"
      "  qvmstate export disk.qcow2 nightly vm.mig --layout mapped-ram\n"
      "  qvmstate export disk.qcow2 nightly vm.save --as libvirt-save --xml vm.xml");
}

void add_import(CLI::App &app, ImportCommand &command) {
  CLI::App *load = app.add_subcommand(
      "import", "Make a snapshot of a disk as it is now and the VM state in a file");
  load->add_option("FILE", command.file, "A migration file, or one that `virsh save` wrote")
      ->required()
      ->type_name("");
  add_image_and_name(*load, command.image, command.name);
  load->add_option("--disk", command.disks,
                   "Another qcow2 image of the VM, which gets the snapshot of its disk")
      ->type_name("IMAGE");
  add_offset(*load, command.offset);
  add_layout(*load, command.layout);
  load->add_flag("--replace", command.replace,
                 "Take the place of a snapshot of that name, once the new one is there");
  add_allow_bitmaps(*load, command.allow_bitmaps);
  load->add_option("--save-xml", command.save_xml,
                   "A new file for the domain's XML, of a file that libvirt wrote")
      ->type_name("XML");
  add_format(*load, command.format);
  load->footer(
      "Examples:\n"
      "  qvmstate import vm.mig disk.qcow2 moved\n"
      "  qvmstate import vm.save disk.qcow2 moved --save-xml vm.xml");
}

void add_diff(CLI::App &app, DiffCommand &command) {
  CLI::App *diff =
      app.add_subcommand("diff", "Tell which pages and device sections of two states differ");
  diff->add_option("IMAGE", command.image, "A qcow2 image")->required()->type_name("");
  diff->add_option("A", command.a, "A snapshot")->required()->type_name("");
  diff->add_option("B", command.b, "Another one")->required()->type_name("");
  diff->add_flag("-U,--force-share", command.force_share,
                 "Read without locks while a VM uses the image; what is read may be torn");
  add_format(*diff, command.format);
}

}  // namespace qvmstate::tools
