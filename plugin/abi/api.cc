// What the host calls: checks the handles and structs that it passes, keeps exceptions in, and
// turns results into codes and messages.
#include "plugin/abi/api.h"

#include <atomic>
#include <exception>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "plugin/abi/failure.h"
#include "plugin/abi/load.h"
#include "plugin/abi/save.h"
#include "plugin/abi/session.h"
#include "plugin/abi/sink.h"
#include "plugin/abi/structs.h"

using qvmstate::abi::Load;
using qvmstate::abi::Outcome;
using qvmstate::abi::Save;
using qvmstate::abi::Session;

// The opaque structs of the header.
struct qvmstate_save {
  qvmstate_session *owner;
  std::unique_ptr<Save> object;
};
struct qvmstate_load {
  qvmstate_session *owner;
  std::unique_ptr<Load> object;
};
struct qvmstate_session {
  std::unique_ptr<Session> object;
  std::unique_ptr<qvmstate_save> save;
  std::unique_ptr<qvmstate_load> load;
  std::atomic<bool> entered = false;
};

namespace qvmstate::abi {
namespace {

/// A call into a session or what belongs to it. A second one at the same time, from a callback or
/// another thread, is refused.
class Entered {
 public:
  explicit Entered(qvmstate_session &session)
      : session_(session), alone_(!session.entered.exchange(true)) {}
  ~Entered() {
    if (alone_) {
      session_.entered = false;
    }
  }
  Entered(const Entered &) = delete;
  Entered &operator=(const Entered &) = delete;
  bool alone() const { return alone_; }

 private:
  qvmstate_session &session_;
  const bool alone_;
};

qvmstate_session &session_of(qvmstate_session &session) {
  return session;
}
qvmstate_session &session_of(qvmstate_save &save) {
  return *save.owner;
}
qvmstate_session &session_of(qvmstate_load &load) {
  return *load.owner;
}

/// Runs `call`, which returns an Outcome<void>; no exception gets out.
template <class Call>
Outcome<void> without_exceptions(Call call) noexcept {
  try {
    return call();
  } catch (const std::bad_alloc &) {
    return refuse(QVMSTATE_NO_MEMORY, "out of memory");
  } catch (const std::exception &error) {
    return refuse(QVMSTATE_INTERNAL, error.what());
  } catch (...) {
    return refuse(QVMSTATE_INTERNAL, "an exception that has no words");
  }
}

int finish(const Outcome<void> &outcome, qvmstate_error *error) noexcept {
  if (outcome) {
    return QVMSTATE_OK;
  }
  report(outcome.error(), error);
  return outcome.error().code;
}

/// One call on a handle.
template <class Handle, class Call>
int call_on(Handle *handle, qvmstate_error *error, Call call) noexcept {
  return finish(without_exceptions([&]() -> Outcome<void> {
                  if (handle == nullptr) {
                    return refuse(QVMSTATE_BAD_ARGUMENT, "the handle is NULL");
                  }
                  const Entered entered(session_of(*handle));
                  if (!entered.alone()) {
                    return refuse(QVMSTATE_BAD_STATE,
                                  "another call of this session is running: in a callback only "
                                  "cancel and section_put may be called, and two threads must "
                                  "take turns");
                  }
                  auto outcome = without_exceptions([&] { return call(*handle); });
                  if constexpr (!std::is_same_v<Handle, qvmstate_session>) {
                    if (!outcome && (outcome.error().code == QVMSTATE_NO_MEMORY ||
                                     outcome.error().code == QVMSTATE_INTERNAL)) {
                      return handle->object->fail(std::move(outcome).error());
                    }
                  }
                  return outcome;
                }),
                error);
}

Outcome<void> check_idle(const qvmstate_session &session, const char *call) {
  if (session.save || session.load) {
    return refuse(QVMSTATE_BAD_STATE, std::string(call) + ": " + session.object->name() +
                                          " has an open " + (session.save ? "save" : "load") +
                                          "; close it first");
  }
  return {};
}

int session_open(const qvmstate_session_options *options, qvmstate_session **session,
                 qvmstate_error *error) {
  return finish(without_exceptions([&]() -> Outcome<void> {
                  if (session == nullptr) {
                    return refuse(QVMSTATE_BAD_ARGUMENT, "session_open: session is NULL");
                  }
                  *session = nullptr;
                  QV_ASSIGN(const auto known, read_struct(options, "qvmstate_session_options"));
                  auto opened = std::make_unique<qvmstate_session>();
                  QV_ASSIGN(opened->object, Session::open(known));
                  *session = opened.release();
                  return {};
                }),
                error);
}

/// From a callback it is a mistake that cannot be told; the session is left alone then.
void session_close(qvmstate_session *session) {
  if (session == nullptr || session->entered.exchange(true)) {
    return;
  }
  (void)without_exceptions([&]() -> Outcome<void> {
    session->save.reset();
    session->load.reset();
    delete session;
    return {};
  });
}

int snapshot_count(qvmstate_session *session, uint64_t *count, qvmstate_error *error) {
  return call_on(session, error, [&](qvmstate_session &open) -> Outcome<void> {
    if (count == nullptr) {
      return refuse(QVMSTATE_BAD_ARGUMENT, "snapshot_count: count is NULL");
    }
    *count = open.object->image().snapshots().size();
    return {};
  });
}

int snapshot_info(qvmstate_session *session, uint64_t index, qvmstate_snapshot_info *info,
                  qvmstate_error *error) {
  return call_on(session, error, [&](qvmstate_session &open) -> Outcome<void> {
    QV_TRY(check_struct(info, "qvmstate_snapshot_info"));
    const std::vector<qcow2::Snapshot> &all = open.object->image().snapshots();
    if (index >= all.size()) {
      return refuse(QVMSTATE_BAD_ARGUMENT, open.object->name() + ": has only " +
                                               std::to_string(all.size()) + " snapshots");
    }
    const qcow2::Snapshot &snapshot = all[index];
    fill_struct(info, {0, 0, snapshot.id.c_str(), snapshot.name.c_str(), snapshot.vmstate_bytes,
                       snapshot.date_seconds, snapshot.clock_nanos});
    return {};
  });
}

int snapshot_delete(qvmstate_session *session, const char *name, qvmstate_error *error) {
  return call_on(session, error, [&](qvmstate_session &open) -> Outcome<void> {
    QV_TRY(check_idle(open, "snapshot_delete"));
    return open.object->delete_snapshot(name);
  });
}

int save_begin(qvmstate_session *session, const qvmstate_save_options *options,
               qvmstate_save **save, qvmstate_error *error) {
  return call_on(session, error, [&](qvmstate_session &open) -> Outcome<void> {
    if (save == nullptr) {
      return refuse(QVMSTATE_BAD_ARGUMENT, "save_begin: save is NULL");
    }
    *save = nullptr;
    QV_ASSIGN(const auto known, read_struct(options, "qvmstate_save_options"));
    QV_TRY(check_idle(open, "save_begin"));
    auto begun = std::make_unique<qvmstate_save>(qvmstate_save{&open, nullptr});
    QV_ASSIGN(begun->object, Save::begin(*open.object, known));
    open.save = std::move(begun);
    *save = open.save.get();
    return {};
  });
}

int save_add_ram(qvmstate_save *save, const qvmstate_ram_block *block, qvmstate_error *error) {
  return call_on(save, error, [&](qvmstate_save &open) -> Outcome<void> {
    QV_ASSIGN(const auto known, read_struct(block, "qvmstate_ram_block"));
    return open.object->add_ram(known);
  });
}

int save_ram(qvmstate_save *save, const uint64_t *const *dirty, size_t block_count,
             qvmstate_error *error) {
  return call_on(save, error,
                 [&](qvmstate_save &open) { return open.object->write_ram(dirty, block_count); });
}

int save_section(qvmstate_save *save, const qvmstate_section *section, qvmstate_error *error) {
  return call_on(save, error, [&](qvmstate_save &open) -> Outcome<void> {
    QV_ASSIGN(const auto known, read_struct(section, "qvmstate_section"));
    return open.object->add_section(known);
  });
}

int save_section_stream(qvmstate_save *save, const qvmstate_section *section,
                        qvmstate_section_write_fn write, void *user, qvmstate_error *error) {
  return call_on(save, error, [&](qvmstate_save &open) -> Outcome<void> {
    QV_ASSIGN(const auto known, read_struct(section, "qvmstate_section"));
    return open.object->stream_section(known, write, user);
  });
}

int section_put(qvmstate_sink *sink, const void *data, uint64_t bytes, qvmstate_error *error) {
  return finish(without_exceptions([&]() -> Outcome<void> {
                  if (sink == nullptr) {
                    return refuse(QVMSTATE_BAD_ARGUMENT, "section_put: sink is NULL");
                  }
                  return Sink::of(sink)->put(data, bytes);
                }),
                error);
}

void save_cancel(qvmstate_save *save) {
  if (save != nullptr) {
    save->object->cancel();
  }
}

int save_end(qvmstate_save *save, qvmstate_save_report *report, qvmstate_error *error) {
  return call_on(save, error, [&](qvmstate_save &open) -> Outcome<void> {
    if (report != nullptr) {
      QV_TRY(check_struct(report, "qvmstate_save_report"));
    }
    QV_ASSIGN(const qvmstate_save_report result, open.object->end());
    if (report != nullptr) {
      fill_struct(report, result);
    }
    return {};
  });
}

int save_abort(qvmstate_save *save, qvmstate_error *error) {
  return call_on(save, error, [](qvmstate_save &open) { return open.object->abort(); });
}

/// As session_close(), and so load_close().
void save_close(qvmstate_save *save) {
  if (save != nullptr) {
    qvmstate_session &session = *save->owner;
    const Entered entered(session);
    if (entered.alone()) {
      session.save.reset();
    }
  }
}

int load_begin(qvmstate_session *session, const qvmstate_load_options *options,
               qvmstate_load **load, qvmstate_error *error) {
  return call_on(session, error, [&](qvmstate_session &open) -> Outcome<void> {
    if (load == nullptr) {
      return refuse(QVMSTATE_BAD_ARGUMENT, "load_begin: load is NULL");
    }
    *load = nullptr;
    QV_ASSIGN(const auto known, read_struct(options, "qvmstate_load_options"));
    QV_TRY(check_idle(open, "load_begin"));
    auto begun = std::make_unique<qvmstate_load>(qvmstate_load{&open, nullptr});
    QV_ASSIGN(begun->object, Load::begin(*open.object, known));
    open.load = std::move(begun);
    *load = open.load.get();
    return {};
  });
}

int load_info(qvmstate_load *load, qvmstate_load_info *info, qvmstate_error *error) {
  return call_on(load, error, [&](qvmstate_load &open) -> Outcome<void> {
    QV_TRY(check_struct(info, "qvmstate_load_info"));
    fill_struct(info, open.object->info());
    return {};
  });
}

int load_block_info(qvmstate_load *load, uint64_t index, qvmstate_block_info *info,
                    qvmstate_error *error) {
  return call_on(load, error, [&](qvmstate_load &open) -> Outcome<void> {
    QV_TRY(check_struct(info, "qvmstate_block_info"));
    QV_ASSIGN(const qvmstate_block_info known, open.object->block_info(index));
    fill_struct(info, known);
    return {};
  });
}

int load_add_ram(qvmstate_load *load, const qvmstate_ram_block *block, qvmstate_error *error) {
  return call_on(load, error, [&](qvmstate_load &open) -> Outcome<void> {
    QV_ASSIGN(const auto known, read_struct(block, "qvmstate_ram_block"));
    return open.object->add_ram(known);
  });
}

int load_ram(qvmstate_load *load, qvmstate_error *error) {
  return call_on(load, error, [](qvmstate_load &open) { return open.object->read_ram(); });
}

int load_sections(qvmstate_load *load, qvmstate_section_read_fn read, void *user,
                  qvmstate_error *error) {
  return call_on(load, error,
                 [&](qvmstate_load &open) { return open.object->read_sections(read, user); });
}

void load_cancel(qvmstate_load *load) {
  if (load != nullptr) {
    load->object->cancel();
  }
}

void load_close(qvmstate_load *load) {
  if (load != nullptr) {
    qvmstate_session &session = *load->owner;
    const Entered entered(session);
    if (entered.alone()) {
      session.load.reset();
    }
  }
}

constexpr qvmstate_api table = {
    .size = sizeof table,
    .version = QVMSTATE_API_VERSION,
    .library_version = QVMSTATE_VERSION,
    .session_open = session_open,
    .session_close = session_close,
    .snapshot_count = snapshot_count,
    .snapshot_info = snapshot_info,
    .snapshot_delete = snapshot_delete,
    .save_begin = save_begin,
    .save_add_ram = save_add_ram,
    .save_ram = save_ram,
    .save_section = save_section,
    .save_section_stream = save_section_stream,
    .section_put = section_put,
    .save_cancel = save_cancel,
    .save_end = save_end,
    .save_abort = save_abort,
    .save_close = save_close,
    .load_begin = load_begin,
    .load_info = load_info,
    .load_block_info = load_block_info,
    .load_add_ram = load_add_ram,
    .load_ram = load_ram,
    .load_sections = load_sections,
    .load_cancel = load_cancel,
    .load_close = load_close,
};

}  // namespace

const qvmstate_api *get_api(uint32_t version, qvmstate_error *error) noexcept {
  if (version >= 1 && version <= table.version) {
    return &table;
  }
  const auto refused = without_exceptions([&]() -> Outcome<void> {
    if (version == 0) {
      return refuse(QVMSTATE_NOT_SUPPORTED,
                    "there is no table of version 0; ask for QVMSTATE_API_VERSION");
    }
    return refuse(QVMSTATE_NOT_SUPPORTED,
                  "this host needs version " + std::to_string(version) +
                      " of the plugin's table, and libqvmstate.so " QVMSTATE_VERSION
                      " has version " +
                      std::to_string(table.version) + "; load a newer libqvmstate.so");
  });
  report(refused.error(), error);
  return nullptr;
}

}  // namespace qvmstate::abi
