// The table and the structs begin as they did when they were released: what a host was built with
// once is found at the same place for ever.

#include <stddef.h>
#include <stdint.h>

#include "plugin/qvmstate.h"

#undef QVMSTATE_H
#undef QVMSTATE_API_VERSION
#undef QVMSTATE_ENTRY
#undef QVMSTATE_SESSION_WRITE
#undef QVMSTATE_SAVE_REPLACE
#undef QVMSTATE_SAVE_LIVE
#undef QVMSTATE_SAVE_MAY_FREE
#undef QVMSTATE_LOAD_SKIP_UNKNOWN
#undef QVMSTATE_SECTION_UNKNOWN
namespace v1 {
#include "frozen/qvmstate_v1.h"
}

#define SAME_PLACE(type, member)                                        \
  static_assert(offsetof(v1::type, member) == offsetof(type, member) && \
                sizeof(v1::type::member) == sizeof(type::member))

static_assert(sizeof(qvmstate_error) == 1024);
SAME_PLACE(qvmstate_error, code);
SAME_PLACE(qvmstate_error, sys_errno);
SAME_PLACE(qvmstate_error, message);

// The last member of each struct that may grow, and with it all before it.
SAME_PLACE(qvmstate_session_options, log_user);
SAME_PLACE(qvmstate_snapshot_info, vm_clock_ns);
SAME_PLACE(qvmstate_progress, ram_bytes_total);
SAME_PLACE(qvmstate_save_options, progress_user);
SAME_PLACE(qvmstate_ram_block, host_page_bytes);
SAME_PLACE(qvmstate_section, bytes);
SAME_PLACE(qvmstate_save_report, id);
SAME_PLACE(qvmstate_load_options, progress_user);
SAME_PLACE(qvmstate_load_info, ram_bytes);
SAME_PLACE(qvmstate_block_info, bytes);

SAME_PLACE(qvmstate_api, size);
SAME_PLACE(qvmstate_api, version);
SAME_PLACE(qvmstate_api, library_version);
SAME_PLACE(qvmstate_api, session_open);
SAME_PLACE(qvmstate_api, session_close);
SAME_PLACE(qvmstate_api, snapshot_count);
SAME_PLACE(qvmstate_api, snapshot_info);
SAME_PLACE(qvmstate_api, snapshot_delete);
SAME_PLACE(qvmstate_api, save_begin);
SAME_PLACE(qvmstate_api, save_add_ram);
SAME_PLACE(qvmstate_api, save_ram);
SAME_PLACE(qvmstate_api, save_section);
SAME_PLACE(qvmstate_api, save_section_stream);
SAME_PLACE(qvmstate_api, section_put);
SAME_PLACE(qvmstate_api, save_cancel);
SAME_PLACE(qvmstate_api, save_end);
SAME_PLACE(qvmstate_api, save_abort);
SAME_PLACE(qvmstate_api, save_close);
SAME_PLACE(qvmstate_api, load_begin);
SAME_PLACE(qvmstate_api, load_info);
SAME_PLACE(qvmstate_api, load_block_info);
SAME_PLACE(qvmstate_api, load_add_ram);
SAME_PLACE(qvmstate_api, load_ram);
SAME_PLACE(qvmstate_api, load_sections);
SAME_PLACE(qvmstate_api, load_cancel);
SAME_PLACE(qvmstate_api, load_close);

// Numbers keep their meaning.
static_assert(v1::QVMSTATE_INTERNAL == static_cast<int>(QVMSTATE_INTERNAL) &&
              v1::QVMSTATE_CANCELLED == static_cast<int>(QVMSTATE_CANCELLED) &&
              v1::QVMSTATE_DIRECT_OFF == static_cast<int>(QVMSTATE_DIRECT_OFF) &&
              v1::QVMSTATE_LAYOUT_MAPPED_RAM == static_cast<int>(QVMSTATE_LAYOUT_MAPPED_RAM));
