/* The C ABI of libqvmstate.so: the state of a virtual machine, of any emulator, saved into a qcow2
 * image as an internal snapshot and loaded from it.
 *
 * The host (the emulator) loads the library with dlopen(), looks up QVMSTATE_ENTRY, and gets a
 * table of functions; dlclose() leaves it loaded. There are three kinds of objects:
 *
 *   session  one open image: opened, then any number of saves and loads, one at a time; closed
 *   save     begun; RAM blocks added; RAM and device sections written, in any order; ended (this
 *            commits) or aborted; closed
 *   load     begun; RAM blocks added; RAM read; device sections taken; closed
 *
 * Nothing is seen in the image before save_end(), and nothing that was in it before is touched: a
 * save that fails, is aborted or is killed leaves the image as it was.
 *
 * RESULTS  Every function that can fail returns QVMSTATE_OK or another enum qvmstate_code, and
 *   fills *error, which may be NULL, if and only if it fails. A call that is refused (BAD_ARGUMENT,
 *   BAD_STATE, MISMATCH) changes nothing, and others may follow. After any other failure of a save
 *   or load, only its abort and close are of use; further calls return the first failure again. No
 *   exception, exit or abort comes out of the library, whatever it is given; pointers must be NULL
 *   or valid, and a handle must not be used once it is closed.
 * THREADS  One thread at a time uses a session and the save and load begun in it; it need not be
 *   the same thread. save_cancel() and load_cancel() may be called from any thread at any time
 *   before the close. Different sessions are independent of each other. The library starts
 *   threads of its own, all of which have ended when the session is closed. They, and the callbacks
 *   that run on them, have all signals blocked.
 * CALLBACKS  may call save_cancel(), load_cancel() and section_put() where it says so, and nothing
 *   else of this library. They must return (no longjmp, no exception).
 * MEMORY  What is passed to a call need not outlive it, except RAM blocks, and the callbacks and
 *   their `user`, which must live until the session, save or load they were given to is closed.
 *   Strings end in NUL. Sizes and offsets are in bytes, times in nanoseconds.
 * STRUCTS  whose first member is `size` may grow at their end: the host sets it to sizeof, and all
 *   members that it does not use to 0. Members that an older host does not have count as 0, or are
 *   not filled; those that an older library does not have must be 0, or are not filled.
 * SIGNALS  A host with a limit on file sizes (RLIMIT_FSIZE) shall ignore SIGXFSZ.
 */
#ifndef QVMSTATE_H
#define QVMSTATE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The version of the table that this header describes. */
#define QVMSTATE_API_VERSION 1u

/* The name of the only function to look up with dlsym(); its type is qvmstate_get_api_fn. */
#define QVMSTATE_ENTRY "qvmstate_get_api"

/* Why something failed. New ones may be added; what a host does not know it treats as IO. */
enum qvmstate_code {
  QVMSTATE_OK = 0,
  QVMSTATE_IO = 1,            /* the kernel refused an operation; sys_errno says why */
  QVMSTATE_NO_SPACE = 2,      /* no room on the disk or in the image's tables */
  QVMSTATE_NO_MEMORY = 3,     /* the process cannot get more memory */
  QVMSTATE_PERMISSION = 4,    /* of a file */
  QVMSTATE_LOCKED = 5,        /* another program, or another session, uses the image */
  QVMSTATE_BAD_IMAGE = 6,     /* the image contradicts the qcow2 format */
  QVMSTATE_BAD_STREAM = 7,    /* the snapshot contradicts the format of VM states */
  QVMSTATE_NOT_SUPPORTED = 8, /* valid, but not for this library (or a newer table was asked for) */
  QVMSTATE_EXISTS = 9,        /* there is a snapshot of that name */
  QVMSTATE_NOT_FOUND = 10,    /* there is no such file or snapshot */
  QVMSTATE_BAD_ARGUMENT = 11, /* a value that cannot be taken */
  QVMSTATE_BAD_STATE = 12,    /* not at this point in the order of calls */
  QVMSTATE_CANCELLED = 13,    /* somebody called cancel, or the progress callback did */
  QVMSTATE_MISMATCH = 14,     /* the snapshot is of another machine than the host's */
  QVMSTATE_CALLBACK = 15,     /* a callback of the host failed; sys_errno is what it returned */
  QVMSTATE_RAM_LOST = 16,     /* the save was undone, but RAM was freed: the VM cannot go on */
  QVMSTATE_INTERNAL = 17      /* a mistake of the library */
};

/* Filled by a function that fails. Never changes its layout, and needs no initialisation. */
struct qvmstate_error {
  int32_t code;       /* enum qvmstate_code, as returned */
  int32_t sys_errno;  /* 0, or the errno behind it */
  char message[1016]; /* one line: object, operation, cause, remedy; cut off if it is longer */
};

struct qvmstate_session; /* opaque, as are the next three */
struct qvmstate_save;
struct qvmstate_load;
struct qvmstate_sink; /* where the bytes of one device section go */

/* How much a line of the log matters. */
enum qvmstate_log_level { QVMSTATE_LOG_INFO = 0, QVMSTATE_LOG_WARNING = 1 };

/* One line without its newline; valid during the call. Called on the thread that is in a call. */
typedef void (*qvmstate_log_fn)(void *user, int level, const char *line);

enum qvmstate_direct {
  QVMSTATE_DIRECT_AUTO = 0, /* past the page cache where the file system can */
  QVMSTATE_DIRECT_ON = 1,   /* refused where it cannot */
  QVMSTATE_DIRECT_OFF = 2   /* through the page cache */
};

#define QVMSTATE_SESSION_WRITE 1u /* saves and deletes will be made, not only loads */

/* What to open: either `path`, or `fds`. */
struct qvmstate_session_options {
  uint32_t size;
  uint32_t flags;   /* QVMSTATE_SESSION_* */
  const char *path; /* of a qcow2 image, a file or a block device; else NULL */
  /* Open descriptors of the image, or NULL. To write: two that were opened separately, one with
   * O_DIRECT and one without, both O_RDWR. To read: one or two of those. The library duplicates
   * them: the host keeps its own, and may close them at once. */
  const int *fds;
  uint32_t fd_count;
  uint32_t direct;     /* enum qvmstate_direct */
  qvmstate_log_fn log; /* NULL: silent */
  void *log_user;
};

/* Strings are the session's, and valid until its next save_end(), snapshot_delete() or close. */
struct qvmstate_snapshot_info {
  uint32_t size;
  uint32_t reserved;
  const char *id;
  const char *name;
  uint64_t vmstate_bytes; /* 0: a snapshot of the disk alone, which cannot be loaded */
  uint64_t date_seconds;  /* since 1970 */
  uint64_t vm_clock_ns;
};

enum qvmstate_layout {
  /* One stream of pages, written by one thread. */
  QVMSTATE_LAYOUT_LEGACY = 0,
  /* Each page at a place of its own: written from RAM without a copy and read in parallel, and
   * rounds (below) write over earlier ones instead of behind them. */
  QVMSTATE_LAYOUT_MAPPED_RAM = 1
};

/* How far a save_ram() or load_ram() is. The struct is the library's, valid during the call. */
struct qvmstate_progress {
  uint32_t size;
  uint32_t reserved;
  uint64_t ram_bytes_done;  /* of this save_ram() or load_ram() */
  uint64_t ram_bytes_total; /* of all blocks */
};
/* Returns 0 to go on, anything else to cancel. Some ten times a second or more often, and when all
 * is done; on any thread, one call at a time. May call save_cancel() and load_cancel(). */
typedef int (*qvmstate_progress_fn)(void *user, const struct qvmstate_progress *progress);

/* A snapshot of that name lives until the new one is committed. */
#define QVMSTATE_SAVE_REPLACE 1u
/* RAM may change while it is written, and save_ram() may be called again for what changed. */
#define QVMSTATE_SAVE_LIVE 2u
/* Pages are given back to the kernel (madvise MADV_DONTNEED; a page of a shared mapping stays in
 * its file) as soon as they are written to the image. RAM must not be touched until the save is
 * closed. Once one page is gone, save_abort() returns RAM_LOST, and the message of a failure says
 * so. Not with LIVE. */
#define QVMSTATE_SAVE_MAY_FREE 4u

struct qvmstate_save_options {
  uint32_t size;
  uint32_t flags;      /* QVMSTATE_SAVE_* */
  const char *name;    /* of the snapshot: 1 to 255 bytes, not all digits */
  const char *machine; /* 1 to 255 bytes: told to the host by load_info() */
  uint32_t layout;     /* enum qvmstate_layout */
  /* The unit of dirty bitmaps and of what is found to be zero. A power of two from 4096 to 65536;
   * 0: 4096. */
  uint32_t guest_page_bytes;
  uint64_t vm_clock_ns; /* for the list of snapshots; no more than that */
  uint32_t threads;     /* that write in LAYOUT_MAPPED_RAM, up to 64; 0: chosen */
  uint32_t reserved;
  qvmstate_progress_fn progress; /* or NULL */
  void *progress_user;
};

/* A piece of guest RAM in the memory of this process. It must stay mapped until the save or load is
 * closed. */
struct qvmstate_ram_block {
  uint32_t size;
  uint32_t reserved;
  const char *name;         /* 1 to 255 bytes, unlike those of other blocks */
  void *address;            /* a multiple of the host page size; a save only reads (or frees) it */
  uint64_t bytes;           /* > 0; a multiple of the guest page size */
  uint64_t host_page_bytes; /* of this memory, of huge pages theirs; 0: the usual one */
};

/* The state of a device. The bytes mean something to the host alone. */
struct qvmstate_section {
  uint32_t size;
  uint32_t instance; /* (name, instance) is unlike those of other sections */
  uint32_t version;  /* of the format of its bytes, up to 65535; given back with them */
  uint32_t reserved;
  const char *name; /* 1 to 255 printable ASCII characters, not "ram" */
  const void *data;
  uint64_t bytes; /* 0 is fine. All sections of a save together: at most 192 MiB */
};

/* Writes a section by calls of section_put(sink, ...); the sink is valid during the call. Returns
 * 0, or any other number: the save fails with CALLBACK. */
typedef int (*qvmstate_section_write_fn)(void *user, struct qvmstate_sink *sink);

/* What was saved. The host sets `size`; the library fills the rest. */
struct qvmstate_save_report {
  uint32_t size;
  uint32_t reserved;
  uint64_t ram_bytes;     /* of all blocks */
  uint64_t stream_bytes;  /* of the VM state */
  uint64_t written_bytes; /* to the image, tables included */
  uint64_t freed_bytes;   /* of RAM, with MAY_FREE */
  char id[32];            /* of the snapshot */
};

#define QVMSTATE_LOAD_SKIP_UNKNOWN 1u /* sections unknown to the host are logged, no failure */

struct qvmstate_load_options {
  uint32_t size;
  uint32_t flags; /* QVMSTATE_LOAD_* */
  /* Which snapshot: by name, by id (the other is NULL), or both. */
  const char *name;
  const char *id;
  const char *machine; /* refuse (MISMATCH) a snapshot of another; NULL: whatever it is */
  uint32_t threads;    /* that read a snapshot in LAYOUT_MAPPED_RAM, up to 64; 0: chosen */
  uint32_t reserved;
  qvmstate_progress_fn progress; /* or NULL */
  void *progress_user;
};

/* Strings are the load's and live as long as it does. */
struct qvmstate_load_info {
  uint32_t size;
  uint32_t layout; /* enum qvmstate_layout */
  const char *machine;
  uint64_t guest_page_bytes;
  uint64_t block_count; /* RAM blocks */
  uint64_t ram_bytes;   /* of all of them */
};
struct qvmstate_block_info {
  uint32_t size;
  uint32_t reserved;
  const char *name;
  uint64_t bytes;
};

/* What qvmstate_section_read_fn returns for a section that the host does not know, or not in that
 * version. */
#define QVMSTATE_SECTION_UNKNOWN 0x7fffffff

/* Takes one section; everything in it is valid during the call. Returns 0, SECTION_UNKNOWN, or any
 * other number: the load fails with CALLBACK. */
typedef int (*qvmstate_section_read_fn)(void *user, const struct qvmstate_section *section);

/* The functions. They live as long as the library is loaded. Newer versions have more at the end.
 */
struct qvmstate_api {
  uint32_t size;    /* of this struct in the library */
  uint32_t version; /* of this struct in the library: at least the one asked for */

  /* The library's own version, for people. */
  const char *library_version;

  /* Opens an image and takes the locks that QEMU takes: without SESSION_WRITE those of a reader
   * that lets no writer in, else those of the only user. An image that is also a disk of the VM
   * must be flushed and closed by the host (or its locks dropped) before, and opened again after
   * session_close(). LOCKED: somebody else uses it, another session of this process included; or
   * somebody who was just killed: the kernel drops such locks within tens of milliseconds. *session
   * is set to NULL on failure. */
  int (*session_open)(const struct qvmstate_session_options *options,
                      struct qvmstate_session **session, struct qvmstate_error *error);
  /* Drops locks and frees the session. A save or load that is still open is closed with it, and its
   * handle must not be used any more. NULL is fine. */
  void (*session_close)(struct qvmstate_session *session);

  /* The snapshots in the image, as of the open or this session's last change. */
  int (*snapshot_count)(struct qvmstate_session *session, uint64_t *count,
                        struct qvmstate_error *error);
  /* The snapshot number `index` (from 0). The host sets info->size. BAD_ARGUMENT: no such index. */
  int (*snapshot_info)(struct qvmstate_session *session, uint64_t index,
                       struct qvmstate_snapshot_info *info, struct qvmstate_error *error);
  /* Deletes the first snapshot of that name and gives its space back to the file system. Not while
   * a save or load is open. */
  int (*snapshot_delete)(struct qvmstate_session *session, const char *name,
                         struct qvmstate_error *error);

  /* Begins a save; with a session that has SESSION_WRITE and no open save or load. Refuses
   * everything that can be refused by the image and the name, so a live host calls it before it
   * stops its guest. The disk part of the snapshot is what is in the image now. *save is set to
   * NULL on failure. */
  int (*save_begin)(struct qvmstate_session *session, const struct qvmstate_save_options *options,
                    struct qvmstate_save **save, struct qvmstate_error *error);
  /* Adds a block of RAM; before the first save_ram(). At least one is needed. */
  int (*save_add_ram)(struct qvmstate_save *save, const struct qvmstate_ram_block *block,
                      struct qvmstate_error *error);
  /* Writes RAM. At first all of it, with `dirty` NULL: the host clears its log of dirty pages just
   * before. With SAVE_LIVE, again as often as wanted, each time with what the host takes from that
   * log, clearing it, just before the call: an array of const uint64_t *, a bitmap for each block
   * in the order in which they were added. Bit n % 64 of dirty[b][n / 64] is page n of block b;
   * NULL in place of a bitmap: nothing changed; bits past the end are ignored. What is written now
   * supersedes what was. The last round is made when the guest stands; after it RAM and snapshot
   * are the same. */
  int (*save_ram)(struct qvmstate_save *save, const uint64_t *const *dirty, size_t block_count,
                  struct qvmstate_error *error);
  /* Puts a device section: copied; written to the image by save_end(), in the order of these
   * calls. At any time before save_end(). */
  int (*save_section)(struct qvmstate_save *save, const struct qvmstate_section *section,
                      struct qvmstate_error *error);
  /* The same with bytes that `write` puts piece by piece; data and bytes of `section` are not
   * looked at. `write` is called before this returns, on the same thread. */
  int (*save_section_stream)(struct qvmstate_save *save, const struct qvmstate_section *section,
                             qvmstate_section_write_fn write, void *user,
                             struct qvmstate_error *error);
  /* Only in a qvmstate_section_write_fn. Its failure is that of the section too, so the callback
   * may look at the result or not. */
  int (*section_put)(struct qvmstate_sink *sink, const void *data, uint64_t bytes,
                     struct qvmstate_error *error);
  /* Makes the calls that the save waits for, now or later, fail with CANCELLED as soon as they can.
   * From any thread, also twice, also too late. NULL is fine. */
  void (*save_cancel)(struct qvmstate_save *save);
  /* Writes what is left, flushes it to the disk and commits. After it the snapshot is there, for
   * good. On failure (also CANCELLED) the save was undone, as by save_abort(), unless the message
   * says otherwise. `report` may be NULL. */
  int (*save_end)(struct qvmstate_save *save, struct qvmstate_save_report *report,
                  struct qvmstate_error *error);
  /* Undoes a save: the image is as before. RAM_LOST: it is, but RAM is gone. Nothing to do after a
   * failed save_end(), where it only reports that RAM is lost. BAD_STATE after one that
   * succeeded. */
  int (*save_abort)(struct qvmstate_save *save, struct qvmstate_error *error);
  /* Frees the save, at any time; aborts it if it was not ended. NULL is fine. */
  void (*save_close)(struct qvmstate_save *save);

  /* Begins a load; with a session that has no open save or load. The image's disk is not touched
   * (`qemu-img snapshot -a` reverts that). *load is set to NULL on failure. */
  int (*load_begin)(struct qvmstate_session *session, const struct qvmstate_load_options *options,
                    struct qvmstate_load **load, struct qvmstate_error *error);
  /* What is known before any RAM is read. The host sets info->size. */
  int (*load_info)(struct qvmstate_load *load, struct qvmstate_load_info *info,
                   struct qvmstate_error *error);
  /* RAM block number `index` of the snapshot (from 0). The host sets info->size. */
  int (*load_block_info)(struct qvmstate_load *load, uint64_t index,
                         struct qvmstate_block_info *info, struct qvmstate_error *error);
  /* Says where a block of RAM is to be loaded; before load_ram(). MISMATCH: the snapshot has none
   * of that name, or of another size. */
  int (*load_add_ram)(struct qvmstate_load *load, const struct qvmstate_ram_block *block,
                      struct qvmstate_error *error);
  /* Fills all blocks. MISMATCH, before anything is written: a block of the snapshot has no place.
   * After another failure RAM may be filled in part. */
  int (*load_ram)(struct qvmstate_load *load, struct qvmstate_error *error);
  /* Gives all device sections to `read`, in the order in which they were saved, on the thread of
   * the call. After load_ram(); may be called again. MISMATCH: the host did not know some, which
   * the message names; all others were given to it. */
  int (*load_sections)(struct qvmstate_load *load, qvmstate_section_read_fn read, void *user,
                       struct qvmstate_error *error);
  /* As save_cancel(). */
  void (*load_cancel)(struct qvmstate_load *load);
  /* Frees the load, at any time. NULL is fine. */
  void (*load_close)(struct qvmstate_load *load);
};

/* The table, if the library has the one of `version` (QVMSTATE_API_VERSION of the header that the
 * host was built with) or a later one, which begins with it; else NULL, with NOT_SUPPORTED and the
 * reason in *error. From any thread, at any time. */
typedef const struct qvmstate_api *(*qvmstate_get_api_fn)(uint32_t version,
                                                          struct qvmstate_error *error);

#ifdef __cplusplus
}
#endif

#endif
