/* A host built with the first released header: calls every function of that table.
 *
 *   client_v1 PLUGIN IMAGE */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "qvmstate_v1.h"

enum { ram_bytes = 1 << 20, page = 4096 };

static const struct qvmstate_api *api;
static struct qvmstate_error error;

/* Ends main() with a line. */
#define CHECK(condition)                                                       \
  do {                                                                         \
    if (!(condition)) {                                                        \
      printf("client_v1.c:%d: %s: %s\n", __LINE__, #condition, error.message); \
      return 1;                                                                \
    }                                                                          \
  } while (0)

static void on_log(void *user, int level, const char *line) {
  (void)level;
  (void)line;
  ++*(int *)user;
}

static int on_progress(void *user, const struct qvmstate_progress *progress) {
  (void)user;
  return progress->ram_bytes_done > progress->ram_bytes_total;
}

static int write_section(void *user, struct qvmstate_sink *sink) {
  return api->section_put(sink, user, 5, NULL);
}

static int read_section(void *user, const struct qvmstate_section *section) {
  int *seen = user;
  if (strcmp(section->name, "extra") == 0) {
    return QVMSTATE_SECTION_UNKNOWN;
  }
  *seen += section->bytes == 5 && memcmp(section->data, "hello", 5) == 0 && section->version == 3 &&
           section->instance < 2;
  return 0;
}

static int save_all(struct qvmstate_session *session, uint32_t layout, const char *name,
                    unsigned char *ram) {
  struct qvmstate_save_options options = {.size = sizeof options, .flags = QVMSTATE_SAVE_LIVE};
  struct qvmstate_ram_block block = {sizeof block, 0, "ram", NULL, ram_bytes, 4096};
  struct qvmstate_section section = {sizeof section, 0, 3, 0, "uart", "hello", 5};
  struct qvmstate_section extra = {sizeof extra, 0, 1, 0, "extra", "x", 1};
  struct qvmstate_save_report report = {.size = sizeof report};
  struct qvmstate_save *save;
  uint64_t dirty[ram_bytes / page / 64] = {2};
  const uint64_t *bitmaps[1];
  bitmaps[0] = dirty;
  block.address = ram;
  options.name = name;
  options.machine = "frozen";
  options.layout = layout;
  options.progress = on_progress;
  CHECK(!api->save_begin(session, &options, &save, &error));
  CHECK(!api->save_add_ram(save, &block, &error));
  CHECK(!api->save_ram(save, NULL, 0, &error));
  memset(ram + page, 0x5a, page);
  CHECK(!api->save_ram(save, bitmaps, 1, &error));
  CHECK(!api->save_section(save, &section, &error));
  CHECK(!api->save_section(save, &extra, &error));
  section.instance = 1;
  CHECK(!api->save_section_stream(save, &section, write_section, "hello", &error));
  CHECK(!api->save_end(save, &report, &error));
  CHECK(report.ram_bytes == ram_bytes && report.stream_bytes > 0 && report.id[0] != '\0');
  api->save_close(save);
  CHECK(!api->save_begin(session, (options.name = "never", &options), &save, &error));
  api->save_cancel(save);
  CHECK(!api->save_abort(save, &error));
  api->save_close(save);
  return 0;
}

static int load_all(struct qvmstate_session *session, uint32_t layout, const char *name,
                    const unsigned char *expected, unsigned char *ram) {
  struct qvmstate_load_options options = {.size = sizeof options,
                                          .flags = QVMSTATE_LOAD_SKIP_UNKNOWN};
  struct qvmstate_ram_block block = {sizeof block, 0, "ram", NULL, ram_bytes, 0};
  struct qvmstate_load_info info = {.size = sizeof info};
  struct qvmstate_block_info block_info = {.size = sizeof block_info};
  struct qvmstate_load *load;
  int seen = 0;
  block.address = ram;
  options.name = name;
  memset(ram, 0xcc, ram_bytes);
  CHECK(!api->load_begin(session, &options, &load, &error));
  CHECK(!api->load_info(load, &info, &error));
  CHECK(info.layout == layout && info.block_count == 1 && strcmp(info.machine, "frozen") == 0);
  CHECK(!api->load_block_info(load, 0, &block_info, &error));
  CHECK(strcmp(block_info.name, "ram") == 0 && block_info.bytes == ram_bytes);
  CHECK(!api->load_add_ram(load, &block, &error));
  CHECK(!api->load_ram(load, &error));
  CHECK(memcmp(ram, expected, ram_bytes) == 0);
  CHECK(!api->load_sections(load, read_section, &seen, &error));
  CHECK(seen == 2);
  api->load_cancel(load);
  api->load_close(load);
  return 0;
}

int main(int argc, char **argv) {
  struct qvmstate_session_options options = {.size = sizeof options,
                                             .flags = QVMSTATE_SESSION_WRITE};
  struct qvmstate_snapshot_info info = {.size = sizeof info};
  struct qvmstate_session *session;
  qvmstate_get_api_fn get_api;
  unsigned char *ram;
  uint64_t count = 0;
  int lines = 0;
  void *library = argc == 3 ? dlopen(argv[1], RTLD_NOW) : NULL;
  CHECK(library != NULL);
  *(void **)&get_api = dlsym(library, QVMSTATE_ENTRY);
  CHECK(get_api != NULL);
  api = get_api(QVMSTATE_API_VERSION, &error);
  CHECK(api != NULL && api->version >= 1 && api->size >= sizeof *api);
  ram = mmap(NULL, 2 * ram_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(ram != MAP_FAILED);
  memset(ram, 0x11, ram_bytes / 2);
  options.path = argv[2];
  options.log = on_log;
  options.log_user = &lines;
  CHECK(!api->session_open(&options, &session, &error));
  CHECK(save_all(session, QVMSTATE_LAYOUT_LEGACY, "stream", ram) == 0);
  CHECK(save_all(session, QVMSTATE_LAYOUT_MAPPED_RAM, "mapped", ram) == 0);
  CHECK(load_all(session, QVMSTATE_LAYOUT_LEGACY, "stream", ram, ram + ram_bytes) == 0);
  CHECK(load_all(session, QVMSTATE_LAYOUT_MAPPED_RAM, "mapped", ram, ram + ram_bytes) == 0);
  CHECK(!api->snapshot_count(session, &count, &error) && count == 2);
  CHECK(!api->snapshot_info(session, 1, &info, &error) && strcmp(info.name, "mapped") == 0);
  CHECK(!api->snapshot_delete(session, "stream", &error));
  CHECK(lines > 0);
  api->session_close(session);
  CHECK(api->session_open(NULL, &session, &error) == QVMSTATE_BAD_ARGUMENT);
  dlclose(library);
  puts("every function of version 1 works");
  return 0;
}
