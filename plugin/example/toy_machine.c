/* A whole emulator, as small as can be, whose state libqvmstate.so saves and loads:
 *
 *   toy_machine PLUGIN run STEPS                 run, and print a checksum of the machine
 *   toy_machine PLUGIN save IMAGE NAME STEPS     run, then save it as snapshot NAME
 *   toy_machine PLUGIN load IMAGE NAME STEPS     load NAME, run on, and print the checksum
 *
 * So `save i n 1000` and `load i n 500` in a new process print what `run 1500` prints. IMAGE is a
 * qcow2 image, made with `qemu-img create -f qcow2 IMAGE 1M`. */
#include <dlfcn.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "plugin/qvmstate.h"

/* The machine: RAM, a processor that scribbles in it, and a timer that interrupts it. */
enum { ram_bytes = 16 << 20 };
struct machine {
  uint8_t *ram;
  uint64_t cpu;    /* the processor's only register */
  uint32_t ticks;  /* of the timer */
  uint32_t alarms; /* how often it went off */
};

static void run(struct machine *m, unsigned long steps) {
  for (; steps > 0; --steps) {
    m->cpu = m->cpu * 6364136223846793005u + 1442695040888963407u;
    m->ram[(m->cpu >> 33) % ram_bytes] += (uint8_t)m->cpu;
    if (++m->ticks == 100) {
      m->ticks = 0;
      m->cpu ^= ++m->alarms;
    }
  }
}

static uint64_t checksum(const struct machine *m) {
  uint64_t sum = m->cpu ^ m->ticks ^ ((uint64_t)m->alarms << 32);
  for (size_t i = 0; i < ram_bytes; ++i) {
    sum = sum * 31 + m->ram[i];
  }
  return sum;
}

/* What the plugin is told of the machine: its RAM, and its devices in bytes of their own formats.
 * (Bytes that other computers shall read want an order; these are this computer's.) */
static const struct qvmstate_api *api;
static struct qvmstate_error error;

static struct qvmstate_ram_block ram_of(struct machine *m) {
  struct qvmstate_ram_block block = {.size = sizeof block, .name = "main.ram"};
  block.address = m->ram;
  block.bytes = ram_bytes;
  return block;
}

static struct qvmstate_section section(const char *name, const void *data, size_t bytes) {
  struct qvmstate_section section = {.size = sizeof section, .version = 1, .name = name};
  section.data = data;
  section.bytes = bytes;
  return section;
}

static int write_machine(struct qvmstate_save *save, struct machine *m) {
  const struct qvmstate_ram_block ram = ram_of(m);
  const uint32_t timer[2] = {m->ticks, m->alarms};
  const struct qvmstate_section cpu_state = section("cpu", &m->cpu, sizeof m->cpu);
  const struct qvmstate_section timer_state = section("timer", timer, sizeof timer);
  return api->save_add_ram(save, &ram, &error) || api->save_ram(save, NULL, 0, &error) ||
         api->save_section(save, &cpu_state, &error) ||
         api->save_section(save, &timer_state, &error) || api->save_end(save, NULL, &error);
}

/* Takes one section; called for each in the order in which they were saved. */
static int take_section(void *user, const struct qvmstate_section *section) {
  struct machine *m = user;
  uint32_t timer[2];
  if (strcmp(section->name, "cpu") == 0 && section->version == 1 &&
      section->bytes == sizeof m->cpu) {
    memcpy(&m->cpu, section->data, sizeof m->cpu);
    return 0;
  }
  if (strcmp(section->name, "timer") == 0 && section->version == 1 &&
      section->bytes == sizeof timer) {
    memcpy(timer, section->data, sizeof timer);
    m->ticks = timer[0];
    m->alarms = timer[1];
    return 0;
  }
  return QVMSTATE_SECTION_UNKNOWN;
}

static int read_machine(struct qvmstate_load *load, struct machine *m) {
  const struct qvmstate_ram_block ram = ram_of(m);
  return api->load_add_ram(load, &ram, &error) || api->load_ram(load, &error) ||
         api->load_sections(load, take_section, m, &error);
}

static int save_machine(struct qvmstate_session *session, const char *name, struct machine *m) {
  struct qvmstate_save_options options = {.size = sizeof options, .flags = QVMSTATE_SAVE_REPLACE};
  struct qvmstate_save *save;
  int failed;
  options.name = name;
  options.machine = "toy-1.0";
  options.layout = QVMSTATE_LAYOUT_MAPPED_RAM;
  failed = api->save_begin(session, &options, &save, &error) || write_machine(save, m);
  api->save_close(save); /* undoes what did not get to its end */
  return failed;
}

static int load_machine(struct qvmstate_session *session, const char *name, struct machine *m) {
  struct qvmstate_load_options options = {.size = sizeof options};
  struct qvmstate_load *load;
  int failed;
  options.name = name;
  options.machine = "toy-1.0"; /* of any other it is refused */
  failed = api->load_begin(session, &options, &load, &error) || read_machine(load, m);
  api->load_close(load);
  return failed;
}

static int with_image(const char *image, int write, const char *name, struct machine *m) {
  struct qvmstate_session_options options = {.size = sizeof options};
  struct qvmstate_session *session;
  int failed;
  options.path = image;
  options.flags = write ? QVMSTATE_SESSION_WRITE : 0;
  if (api->session_open(&options, &session, &error)) {
    return 1;
  }
  failed = write ? save_machine(session, name, m) : load_machine(session, name, m);
  api->session_close(session);
  return failed;
}

static int find_plugin(const char *path) {
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  qvmstate_get_api_fn get_api;
  if (library == NULL) {
    snprintf(error.message, sizeof error.message, "%s", dlerror());
    return 1;
  }
  *(void **)&get_api = dlsym(library, QVMSTATE_ENTRY);
  if (get_api == NULL) {
    snprintf(error.message, sizeof error.message, "%s: has no C ABI; load a newer one", path);
    return 1;
  }
  api = get_api(QVMSTATE_API_VERSION, &error);
  return api == NULL;
}

int main(int argc, char **argv) {
  struct machine m = {NULL, 1, 0, 0};
  int failed;
  int save = argc == 6 && strcmp(argv[2], "save") == 0;
  int load = argc == 6 && strcmp(argv[2], "load") == 0;
  if (!save && !load && !(argc == 4 && strcmp(argv[2], "run") == 0)) {
    fprintf(stderr, "usage: %s PLUGIN run STEPS | save IMAGE NAME STEPS | load IMAGE NAME STEPS\n",
            argv[0]);
    return 2;
  }
  /* Page aligned, as guest RAM has to be. */
  m.ram = mmap(NULL, ram_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (m.ram == MAP_FAILED) {
    perror("mmap");
    return 1;
  }
  failed = find_plugin(argv[1]) || (load && with_image(argv[3], 0, argv[4], &m));
  if (!failed) {
    run(&m, strtoul(argv[argc - 1], NULL, 10));
    failed = save && with_image(argv[3], 1, argv[4], &m);
  }
  if (failed) {
    fprintf(stderr, "toy_machine: %s\n", error.message);
    return 1;
  }
  printf("%016" PRIx64 "\n", checksum(&m));
  return 0;
}
