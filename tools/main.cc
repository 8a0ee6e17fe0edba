// The qvmstate command: its words and what they start.
//
// Exit status: 0 done, 1 refused or failed, 2 wrong usage.
#include <CLI/CLI.hpp>
#include <csignal>
#include <new>
#include <sstream>

#include "tools/arguments.h"
#include "tools/commands.h"
#include "tools/format.h"

namespace qvmstate::tools {

namespace {

void add_delete(CLI::App &app, DeleteCommand &command) {
  CLI::App *remove = app.add_subcommand("delete", "Delete a snapshot from images or a running VM");
  add_name(*remove, command.name);
  CLI::Option_group *where = remove->add_option_group("which images or VM");
  where
      ->add_option("IMAGE", command.images,
                   "All qcow2 images of the VM, first the one with the state")
      ->type_name("");
  add_qmp(*where, command.qmp);
  where->require_option(1);
  add_format(*remove, command.format);
  remove->footer(
      "Examples:\n"
      "  qvmstate delete nightly --qmp /run/vm/qmp.sock\n"
      "  qvmstate delete nightly system.qcow2 data.qcow2");
}

CLI::App *add_read(CLI::App &app, const std::string &name, const std::string &help,
                   ReadCommand &command) {
  CLI::App *read = app.add_subcommand(name, help);
  read->add_option("IMAGE", command.image, "A qcow2 image")->required()->type_name("");
  read->add_flag("-U,--force-share", command.force_share,
                 "Read without locks while a VM uses the image; what is read may be torn");
  add_format(*read, command.format);
  return read;
}

int run(int argc, char **argv) {
  CLI::App app(
      "Saves the state of a running QEMU into its own qcow2, so that plain loadvm loads it.",
      "qvmstate");
  app.set_version_flag("--version", "qvmstate " QVMSTATE_VERSION);
  app.require_subcommand(1);
  app.footer(
      "Examples:\n"
      "  qvmstate save before-upgrade --qmp /run/vm/qmp.sock\n"
      "  qvmstate save --to file:vm.state --qmp /run/vm/qmp.sock\n"
      "  qvmstate list disk.qcow2\n"
      "  qvmstate info disk.qcow2 before-upgrade\n"
      "  qvmstate load before-upgrade --qmp /run/vm/qmp.sock\n"
      "  qvmstate delete before-upgrade --qmp /run/vm/qmp.sock\n"
      "A name that starts with '-' comes last, after '--'.\n"
      "Exit status: 0 done, 1 refused or failed, 2 wrong usage.");

  SaveCommand save;
  add_save(app, save);

  LoadCommand load;
  CLI::App *load_app = app.add_subcommand("load", "Load a snapshot into a running VM (loadvm)");
  add_name(*load_app, load.name);
  add_qmp(*load_app, load.qmp)->required();
  add_format(*load_app, load.format);

  ResumeCommand resume;
  CLI::App *resume_app = app.add_subcommand(
      "resume", "Bring a VM back after a save that was killed together with its guardian");
  add_qmp(*resume_app, resume.qmp)->required();
  add_format(*resume_app, resume.format);

  ReadCommand list, info;
  add_read(app, "list", "List the snapshots of an image", list);
  CLI::App *info_app = add_read(app, "info", "Tell about an image or one of its snapshots", info);
  info_app->add_option("NAME", info.name, "A snapshot; default: the image itself")->type_name("");
  add_offset(*info_app, info.offset);

  ExtractCommand extract;
  add_extract(app, extract);

  CheckCommand check;
  add_check(app, check);
  ConvertCommand convert;
  add_convert(app, convert);
  ExportCommand exporting;
  add_export(app, exporting);
  ImportCommand importing;
  add_import(app, importing);
  DiffCommand diff;
  add_diff(app, diff);

  DeleteCommand remove;
  add_delete(app, remove);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError &error) {
    if (error.get_exit_code() == 0) {
      std::ostringstream out;
      app.exit(error, out, out);
      return finish("help", out.str());
    }
    std::string where = "usage";
    std::string message = error.what();
    if (argc > 1 && argv[1][0] != '-' && app.get_subcommands().empty()) {
      message = std::string("there is no command '") + argv[1] + "'";
    }
    for (const CLI::App *subcommand : app.get_subcommands()) {
      where = subcommand->get_name();
    }
    write_stderr("qvmstate: " + where + ": " + printable(message) + "\nTry 'qvmstate " +
                 (where == "usage" ? "" : where + " ") + "--help'.\n");
    return exit_usage;
  }

  if (app.got_subcommand("save")) {
    return run_save(save);
  }
  if (app.got_subcommand("load")) {
    return run_load(load);
  }
  if (app.got_subcommand("resume")) {
    return run_resume(resume);
  }
  if (app.got_subcommand("list")) {
    return run_list(list);
  }
  if (app.got_subcommand("info")) {
    return run_info(info);
  }
  if (app.got_subcommand("extract")) {
    return run_extract(extract);
  }
  if (app.got_subcommand("check")) {
    return run_check(check);
  }
  if (app.got_subcommand("convert")) {
    return run_convert(convert);
  }
  if (app.got_subcommand("export")) {
    return run_export(exporting);
  }
  if (app.got_subcommand("import")) {
    return run_import(importing);
  }
  if (app.got_subcommand("diff")) {
    return run_diff(diff);
  }
  return remove.qmp.empty() ? run_delete_offline(remove) : run_delete_live(remove);
}

}  // namespace

}  // namespace qvmstate::tools

int main(int argc, char **argv) {
  // A closed pipe or socket, and a limit on the size of files, are errors that a write returns.
  signal(SIGPIPE, SIG_IGN);
  signal(SIGXFSZ, SIG_IGN);
  qvmstate::tools::guard_standard_descriptors();
  try {
    return qvmstate::tools::run(argc, argv);
  } catch (const std::bad_alloc &) {
    // What a damaged file says of its size may be more than there is.
    qvmstate::tools::write_stderr("qvmstate: there is not enough memory for this\n");
    return qvmstate::tools::exit_failed;
  }
}
