// An emulator that is not QEMU, to test the plugin's C ABI:  unicorn_host LIBRARY MACHINE WORD...
//
// MACHINE is x86_64 or aarch64. The words are executed in their order.
//   extra-pages N          (first) the largest RAM block is so much larger than usual
//   boot PROGRAM ROUNDS    fills RAM and starts the program
//   run N | finish         N instructions, or until the program switches the machine off
//   save IMAGE NAME        and before it, for this save: mapped-ram, replace, may-free, by-fds,
//                          live ROUNDS INSTRUCTIONS, forget-last-round, die-in-ram,
//                          die-between-rounds, die-in-sections
//   load IMAGE NAME        and before it: by-fds, without-console, skip-unknown
//   try-load IMAGE NAME    a load that is expected to fail; prints code and message
//   delete IMAGE NAME      a snapshot
//   list IMAGE             prints the snapshots
//   flip BLOCK OFFSET      changes a byte of RAM
//   flip-alarm             changes a register of the device
//   dump FOLDER            writes each RAM block to a file of its name
//   state                  prints registers, hashes of the blocks, device and console
//
// Of the project's headers only the ABI's is used. Status 1: the library refused.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "abi/check.h"
#include "abi/library.h"
#include "abi/loading.h"
#include "abi/machine.h"
#include "abi/saving.h"
#include "abi/session.h"

namespace unicorn_host {
namespace {

class Host {
 public:
  Host(const std::string &library, const std::string &machine, char **words)
      : api_(load_library(library)), kind_(MachineKind::of(machine)), words_(words) {}

  void run() {
    while (*words_ != nullptr) {
      const std::string name = word();
      const auto command = commands_.find(name);
      check(command != commands_.end(), "no command '" + name + "'");
      command->second();
    }
  }

 private:
  std::string word() {
    check(*words_ != nullptr, "a word is missing at the end");
    return *words_++;
  }
  uint64_t number() { return std::strtoull(word().c_str(), nullptr, 10); }

  /// Made when it is first needed.
  Machine &machine() {
    if (!machine_) {
      machine_.emplace(kind_, extra_pages_);
    }
    return *machine_;
  }

  RamBlock &block(const std::string &name) {
    for (RamBlock &block : machine().ram()) {
      if (block.name() == name) {
        return block;
      }
    }
    die("no RAM block '" + name + "'");
  }

  std::optional<Failure> with_session(
      bool writable, const std::function<std::optional<Failure>(Session &)> &work) {
    Session session(api_);
    auto failure = session.open({word(), writable, by_descriptors_});
    by_descriptors_ = false;
    return failure ? failure : work(session);
  }

  std::optional<Failure> load_now() {
    return with_session(false, [&](Session &session) {
      load_.name = word();
      return load(session, machine(), std::exchange(load_, {}));
    });
  }

  void must(const std::optional<Failure> &failure) {
    if (failure) {
      std::fprintf(stderr, "failed %d %s\n", failure->code, failure->message.c_str());
      std::exit(1);
    }
  }

  void save_now() {
    must(with_session(true, [&](Session &session) {
      save_.name = word();
      return save(session, machine(), std::exchange(save_, {}));
    }));
  }

  void try_load() {
    const auto failure = load_now();
    check(failure.has_value(), "this load was expected to fail");
    std::printf("failed %d %s\n", failure->code, failure->message.c_str());
  }

  void remove() {
    must(with_session(true, [&](Session &session) { return session.remove(word()); }));
  }

  void list() {
    std::string lines;
    must(with_session(false, [&](Session &session) { return session.list(lines); }));
    std::fputs(lines.c_str(), stdout);
  }

  void boot() {
    const std::string program = word();
    machine().boot(program, number());
  }

  void flip() {
    RamBlock &flipped = block(word());
    flipped.data()[number() % flipped.bytes()] ^= 1;
  }

  void flip_alarm() {
    std::vector<uint8_t> registers = machine().device().registers();
    registers[1] ^= 64;  // of the count at which it rings
    machine().device().set_registers(registers);
  }

  void dump() {
    const std::string folder = word();
    for (const RamBlock &block : machine().ram()) {
      block.write_to(folder + "/" + block.name());
    }
  }

  const qvmstate_api &api_;
  MachineKind kind_;
  char **words_;
  uint64_t extra_pages_ = 0;
  std::optional<Machine> machine_;
  SaveOptions save_;
  LoadOptions load_;
  bool by_descriptors_ = false;
  const std::map<std::string, std::function<void()>> commands_ = {
      {"extra-pages", [this] { extra_pages_ = number(); }},
      {"boot", [this] { boot(); }},
      {"run", [this] { machine().run(number()); }},
      {"finish", [this] { machine().run(UINT64_MAX); }},
      {"mapped-ram", [this] { save_.mapped_ram = true; }},
      {"legacy", [this] { save_.mapped_ram = false; }},
      {"replace", [this] { save_.replace = true; }},
      {"may-free", [this] { save_.may_free = true; }},
      {"by-fds", [this] { by_descriptors_ = true; }},
      {"live",
       [this] {
         save_.rounds = static_cast<unsigned>(number());
         save_.round_instructions = number();
       }},
      {"forget-last-round", [this] { save_.forget_last_round = true; }},
      {"die-in-ram", [this] { save_.death = Death::in_ram; }},
      {"die-between-rounds", [this] { save_.death = Death::between_rounds; }},
      {"die-in-sections", [this] { save_.death = Death::in_sections; }},
      {"without-console", [this] { load_.without_console = true; }},
      {"skip-unknown", [this] { load_.skip_unknown = true; }},
      {"save", [this] { save_now(); }},
      {"load", [this] { must(load_now()); }},
      {"try-load", [this] { try_load(); }},
      {"delete", [this] { remove(); }},
      {"list", [this] { list(); }},
      {"flip", [this] { flip(); }},
      {"flip-alarm", [this] { flip_alarm(); }},
      {"dump", [this] { dump(); }},
      {"state", [this] { std::fputs(machine().describe().c_str(), stdout); }},
  };
};

}  // namespace
}  // namespace unicorn_host

int main(int count, char **words) {
  unicorn_host::check(count > 3, "usage: unicorn_host LIBRARY MACHINE WORD...");
  unicorn_host::Host(words[1], words[2], words + 3).run();
  return 0;
}
