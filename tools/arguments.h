// The options that several subcommands have, and those of save, which has the most.
//
// What is wrong with them is a CLI::ParseError out of CLI::App::parse(): exit status 2.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "tools/commands.h"

namespace qvmstate::tools {

CLI::Option *add_qmp(CLI::App &app, std::string &target);
void add_name(CLI::App &app, std::string &target);
void add_format(CLI::App &app, Format &target);
void add_direct(CLI::App &app, io::DirectMode &target);
void add_engine(CLI::App &app, io::Engine &target);

/// The subcommand save. `command` outlives the parsing.
void add_save(CLI::App &app, SaveCommand &command);

}  // namespace qvmstate::tools
