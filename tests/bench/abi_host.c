/* A host of the C ABI with much RAM, of which half is random, a quarter zero, a quarter like text.
 *
 *   abi_host PLUGIN save IMAGE GIB legacy|mapped-ram    into snapshot "bench"
 *   abi_host PLUGIN load IMAGE GIB                      from there; fails if RAM is not the same
 *   abi_host PLUGIN load IMAGE GIB new                  into RAM that was never touched before
 *   abi_host PLUGIN touch - GIB                         a byte a page of as much RAM as is loaded, by
 *                                                       two threads: what the kernel needs for it
 *   abi_host PLUGIN naive FILE GIB                      the legacy layout's records of RAM, written
 *                                                       by write(2) in pieces of 32 KiB, and fsync
 *
 * Prints "ready", waits for a line, works, and prints its seconds, those of the processor, and the
 * bytes written. */
#include <dlfcn.h>
#include <endian.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "plugin/qvmstate.h"

enum { page = 4096, piece = 32 * 1024, record = 8 + page, region = 64 << 20 };

static const struct qvmstate_api *api;
static struct qvmstate_error error;

static int complain(const char *what) {
  fprintf(stderr, "abi_host: %s: %s\n", what, error.message);
  return 1;
}

/* What page `number` holds: regions of random, zero, random, text. */
static void make_page(uint64_t number, unsigned char *to) {
  static const char *words[] = {"kernel ", "0x0000 ", "return ", "error\n",
                                "static ", "int ",    "; "};
  uint64_t state = number * 0x9e3779b97f4a7c15u + 1;
  uint64_t kind = number / (region / page) % 4;
  if (kind == 1) {
    memset(to, 0, page);
    return;
  }
  for (size_t at = 0; at < page;) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    const void *from = &state;
    size_t bytes = sizeof state;
    if (kind == 3) {
      from = words[state % (sizeof words / sizeof *words)];
      bytes = strlen(from);
    }
    bytes = bytes < page - at ? bytes : page - at;
    memcpy(to + at, from, bytes);
    at += bytes;
  }
}

static double now(clockid_t clock) {
  struct timespec time;
  clock_gettime(clock, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static struct qvmstate_session *open_image(const char *path, uint32_t flags) {
  struct qvmstate_session_options options = {.size = sizeof options, .flags = flags};
  struct qvmstate_session *session;
  options.path = path;
  return api->session_open(&options, &session, &error) ? NULL : session;
}

static int save(const char *image, const char *layout, const struct qvmstate_ram_block *ram,
                uint64_t *written) {
  struct qvmstate_session *session = open_image(image, QVMSTATE_SESSION_WRITE);
  struct qvmstate_save_options options = {.size = sizeof options};
  struct qvmstate_save_report report = {.size = sizeof report};
  struct qvmstate_save *save;
  options.name = "bench";
  options.machine = "bench";
  options.layout =
      strcmp(layout, "legacy") == 0 ? QVMSTATE_LAYOUT_LEGACY : QVMSTATE_LAYOUT_MAPPED_RAM;
  if (session == NULL || api->save_begin(session, &options, &save, &error) ||
      api->save_add_ram(save, ram, &error) || api->save_ram(save, NULL, 0, &error) ||
      api->save_end(save, &report, &error)) {
    return complain("save");
  }
  api->session_close(session);
  *written = report.written_bytes;
  return 0;
}

static int load(const char *image, const struct qvmstate_ram_block *ram) {
  struct qvmstate_session *session = open_image(image, 0);
  struct qvmstate_load_options options = {.size = sizeof options};
  struct qvmstate_load *load;
  options.name = "bench";
  if (session == NULL || api->load_begin(session, &options, &load, &error) ||
      api->load_add_ram(load, ram, &error) || api->load_ram(load, &error)) {
    return complain("load");
  }
  api->session_close(session);
  return 0;
}

static int is_zero(const unsigned char *data) {
  return data[0] == 0 && memcmp(data, data + 1, page - 1) == 0;
}

static int naive(const char *path, const struct qvmstate_ram_block *ram, uint64_t *written) {
  static unsigned char buffer[piece + record];
  size_t used = 0;
  int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  for (uint64_t at = 0; at < ram->bytes; at += page) {
    const unsigned char *data = (const unsigned char *)ram->address + at;
    int zero = is_zero(data);
    uint64_t head = htobe64(at | (zero ? 0x22 : 0x28));
    memcpy(buffer + used, &head, sizeof head);
    memcpy(buffer + used + sizeof head, data, zero ? 1 : page);
    used += zero ? sizeof head + 1 : record;
    if (used >= piece || at + page == ram->bytes) {
      size_t bytes = used < piece ? used : piece;
      if (write(file, buffer, bytes) != (ssize_t)bytes) {
        perror("abi_host: write");
        return 1;
      }
      *written += bytes;
      used -= bytes;
      memmove(buffer, buffer + bytes, used);
    }
  }
  return fsync(file) || close(file);
}

struct half {
  unsigned char *ram;
  uint64_t bytes;
};

static void *touch_half(void *opaque) {
  const struct half *half = opaque;
  for (uint64_t at = 0; at < half->bytes; at += page) {
    if (at / region % 4 != 1) { /* where no zero pages are loaded */
      half->ram[at] = 1;
    }
  }
  return NULL;
}

static int touch(const struct qvmstate_ram_block *ram) {
  unsigned char *data = ram->address;
  struct half halves[2] = {{data, ram->bytes / 2}, {data + ram->bytes / 2, ram->bytes / 2}};
  pthread_t second;
  if (pthread_create(&second, NULL, touch_half, &halves[1])) {
    fprintf(stderr, "abi_host: touch: cannot start a thread\n");
    return 1;
  }
  touch_half(&halves[0]);
  return pthread_join(second, NULL);
}

static int check(const struct qvmstate_ram_block *ram) {
  unsigned char expected[page];
  for (uint64_t number = 0; number < ram->bytes / page; ++number) {
    make_page(number, expected);
    if (memcmp((unsigned char *)ram->address + number * page, expected, page) != 0) {
      fprintf(stderr, "abi_host: page %llu is not what was saved\n", (unsigned long long)number);
      return 1;
    }
  }
  return 0;
}

int main(int argc, char **argv) {
  struct qvmstate_ram_block ram = {.size = sizeof ram, .name = "ram"};
  qvmstate_get_api_fn get_api;
  uint64_t written = 0;
  double begin, seconds, cpu;
  int failed, is_load = argc >= 5 && strcmp(argv[2], "load") == 0;
  int is_touch = argc == 5 && strcmp(argv[2], "touch") == 0;
  void *library = argc >= 5 ? dlopen(argv[1], RTLD_NOW) : NULL;
  if (library == NULL) {
    fprintf(stderr, "usage: abi_host PLUGIN save|load|touch|naive FILE GIB [LAYOUT|new]\n");
    return 2;
  }
  *(void **)&get_api = dlsym(library, QVMSTATE_ENTRY);
  api = get_api(QVMSTATE_API_VERSION, &error);
  ram.bytes = strtoull(argv[4], NULL, 10) << 30;
  ram.address = mmap(NULL, ram.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (api == NULL || ram.bytes == 0 || ram.address == MAP_FAILED) {
    return complain("start");
  }
  madvise(ram.address, ram.bytes, MADV_HUGEPAGE); /* as emulators do for guest RAM */
  if (is_load && argc == 5) {
    memset(ram.address, 0xa5, ram.bytes); /* what the guest had before */
  }
  for (uint64_t number = 0; number < ram.bytes / page && !is_load && !is_touch; ++number) {
    make_page(number, (unsigned char *)ram.address + number * page);
  }
  puts("ready");
  fflush(stdout);
  (void)getchar();
  begin = now(CLOCK_MONOTONIC);
  cpu = now(CLOCK_PROCESS_CPUTIME_ID);
  if (is_load) {
    failed = load(argv[3], &ram);
  } else if (is_touch) {
    failed = touch(&ram);
  } else if (argc == 6) {
    failed = save(argv[3], argv[5], &ram, &written);
  } else {
    failed = naive(argv[3], &ram, &written);
  }
  seconds = now(CLOCK_MONOTONIC) - begin;
  cpu = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
  if (failed || (is_load && check(&ram))) {
    return 1;
  }
  printf("{\"seconds\": %.6f, \"cpu\": %.6f, \"bytes\": %llu}\n", seconds, cpu,
         (unsigned long long)written);
  return 0;
}
