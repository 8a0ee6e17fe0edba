// What the command says and with which status it ends: stdout, stderr, JSON events.
//
// stdout carries results; a result that could not be written there is a failure. stderr carries
// `qvmstate: OPERATION: message`. With JSON, the end of every operation is one line on stdout.
//
// Threads: one.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "qcow2/io/result.h"

namespace qvmstate::tools {

// Key order as written.
using Json = nlohmann::ordered_json;

constexpr int exit_done = 0;
constexpr int exit_failed = 1;
constexpr int exit_usage = 2;

enum class Format { human, json };

/// Gives descriptors 0 to 2 a place if the caller closed them, so that no image is opened as
/// "stdout". Writing to one of those fails, as it would have without.
void guard_standard_descriptors();

[[nodiscard]] Result<void> write_stdout(std::string_view text);
/// stderr is the last resort: nothing can be done when it fails.
void write_stderr(std::string_view text);

/// One line; bytes that are not UTF-8 (snapshot names may hold any) are replaced.
std::string to_line(const Json &json);

/// Writes a result to stdout; exit_failed, and said so, when that fails.
int finish(std::string_view operation, std::string_view text);

/// Says what failed on stderr and, with JSON, as the event "failed"; returns exit_failed.
int report_failure(std::string_view operation, const Error &error, Format format);

void report_warning(std::string_view operation, std::string_view message);

}  // namespace qvmstate::tools
