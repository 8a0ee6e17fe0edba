// One save: RAM and device sections of a host into a new snapshot.
//
// Until end() has committed, the image is the old one. A call that is a mistake of the host changes
// nothing. Any other failure ends the save; what was written is undone by abort() or the
// destructor.
//
// Threads: one at a time; cancel() from any.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "plugin/abi/failure.h"
#include "plugin/abi/host_ram.h"
#include "plugin/abi/pace.h"
#include "plugin/abi/page_release.h"
#include "plugin/abi/section_list.h"
#include "plugin/abi/session.h"
#include "plugin/abi/state_writer.h"
#include "plugin/qvmstate.h"
#include "qcow2/image_set.h"

namespace qvmstate::abi {

class Save {
 public:
  static Outcome<std::unique_ptr<Save>> begin(Session &session,
                                              const qvmstate_save_options &options);

  Outcome<void> add_ram(const qvmstate_ram_block &block);
  /// `dirty`: null for all pages.
  Outcome<void> write_ram(const uint64_t *const *dirty, size_t block_count);
  Outcome<void> add_section(const qvmstate_section &section);
  Outcome<void> stream_section(const qvmstate_section &section, qvmstate_section_write_fn write,
                               void *user);
  void cancel() { pace_.cancel(); }
  Outcome<qvmstate_save_report> end();
  Outcome<void> abort();
  /// The save does not survive this; returns what the host is told of it.
  tl::unexpected<Failure> fail(Failure failure);

 private:
  enum class State { open, ended, undone };

  Save(Session &session, const qvmstate_save_options &options);
  Outcome<void> begin_transaction(const qvmstate_save_options &options);
  Outcome<void> check_open(const char *call) const;
  Outcome<void> begin_state();
  Outcome<qvmstate_save_report> commit();
  Outcome<void> undo();
  bool is_ram_lost() const { return release_ && release_->freed_bytes() > 0; }

  Session &session_;
  const bool live_;
  const bool may_free_;
  const bool mapped_;
  unsigned threads_;
  std::string name_;
  vmstate::StreamConfiguration configuration_;
  Pace pace_;
  State state_ = State::open;
  std::optional<Failure> failure_;
  std::unique_ptr<qcow2::SetSave> transaction_;
  uint64_t session_bytes_before_ = 0;  // written by the session's own File
  std::vector<HostBlock> blocks_;
  std::optional<PageRelease> release_;
  SectionList sections_;
  std::unique_ptr<StateWriter> writer_;  // before it goes, nothing may: it has transfers in flight
};

}  // namespace qvmstate::abi
