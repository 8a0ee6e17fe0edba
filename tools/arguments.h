// The options that several subcommands have, and those of the subcommands that have many.
//
// What is wrong with them is a CLI::ParseError out of CLI::App::parse(): exit status 2.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>

#include "tools/commands.h"

namespace qvmstate::tools {

CLI::Option *add_qmp(CLI::App &app, std::string &target);
void add_name(CLI::App &app, std::string &target);
void add_format(CLI::App &app, Format &target);

/// Where in a migration file the stream begins.
CLI::Option *add_offset(CLI::App &app, std::optional<uint64_t> &target);

// The subcommands with many options. `command` outlives the parsing.
void add_save(CLI::App &app, SaveCommand &command);
void add_extract(CLI::App &app, ExtractCommand &command);
void add_check(CLI::App &app, CheckCommand &command);
void add_convert(CLI::App &app, ConvertCommand &command);
void add_export(CLI::App &app, ExportCommand &command);
void add_import(CLI::App &app, ImportCommand &command);
void add_diff(CLI::App &app, DiffCommand &command);

}  // namespace qvmstate::tools
