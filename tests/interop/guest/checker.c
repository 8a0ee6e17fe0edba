/*
 * The program that runs inside the test guest. It keeps writing to memory and to the virtio disks
 * and verifies all of it on demand, so that a snapshot that lost or mixed up one byte is noticed
 * by the guest itself.
 *
 * Invariants. Every page of the arena is exactly what make_page(seed, index, seq) makes, where seq
 * is the page's entry in an array kept elsewhere; about one page in eight is all zeroes, so that
 * pages turn from data to zero and back. Every record of a disk is exactly make_record(disk, slot,
 * seq) for the seq kept in memory. A writer changes a page or record and its expected number under
 * its own lock; a check takes all the locks.
 *
 * Commands come as lines "NONCE COMMAND [ARG]" on the console and are answered by one line
 * "@NONCE ANSWER". Threads: one for memory, one a disk, and the main thread for commands.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <termios.h>
#include <unistd.h>

enum { kPage = 4096, kWords = kPage / 8, kSlots = 256, kDisksMax = 4, kBurst = 64 };

struct Disk {
  char path[32];
  int fd;
  int number;
  uint64_t stride;
  uint64_t next;
  uint64_t seq[kSlots];
  uint64_t *buffer;
  char error[96];
  pthread_mutex_t lock;
  pthread_t thread;
};

static uint64_t *arena;
static size_t page_count;
static uint64_t *page_seq;
static uint64_t seed = 1;
static uint64_t memory_writes;
static size_t next_page;
static pthread_mutex_t memory_lock = PTHREAD_MUTEX_INITIALIZER;
static struct Disk disks[kDisksMax];
static int disk_count;
static atomic_int paused;
static int console_fd;

static uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

static void fill_words(uint64_t *out, uint64_t key, uint64_t a, uint64_t b) {
  uint64_t x = mix(key ^ mix(a ^ mix(b))) | 1;
  uint64_t sum = 0;
  out[0] = key;
  out[1] = a;
  out[2] = b;
  for (int i = 4; i < kWords; i++) {
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    out[i] = x;
    sum += x;
  }
  out[3] = sum;
}

static void make_page(uint64_t *out, uint64_t key, uint64_t index, uint64_t seq) {
  if (mix(key * 3 + mix(index + (seq << 32))) % 8 == 0) {
    memset(out, 0, kPage);
  } else {
    fill_words(out, key, index, seq);
  }
}

static void make_record(uint64_t *out, const struct Disk *disk, uint64_t slot) {
  fill_words(out, 0xd15c0000u + (uint64_t)disk->number, slot, disk->seq[slot]);
}

static void say(const char *format, ...) {
  char line[512];
  va_list args;
  va_start(args, format);
  int length = vsnprintf(line, sizeof line - 2, format, args);
  va_end(args);
  if (length > (int)sizeof line - 3) {
    length = sizeof line - 3;
  }
  line[length++] = '\n';
  for (int done = 0; done < length;) {
    ssize_t n = write(console_fd, line + done, (size_t)(length - done));
    if (n < 0 && errno != EINTR && errno != EAGAIN) {
      return;
    }
    done += n > 0 ? (int)n : 0;
  }
}

static void fill_arena(uint64_t new_seed) {
  pthread_mutex_lock(&memory_lock);
  seed = new_seed;
  for (size_t i = 0; i < page_count; i++) {
    page_seq[i] = 1;
    make_page(arena + i * kWords, seed, i, 1);
  }
  pthread_mutex_unlock(&memory_lock);
}

static void *write_memory(void *unused) {
  (void)unused;
  for (;;) {
    if (!paused) {
      pthread_mutex_lock(&memory_lock);
      for (int i = 0; i < kBurst; i++) {
        next_page = (next_page + 7919) % page_count; /* 7919 is prime: visits all */
        page_seq[next_page]++;
        make_page(arena + next_page * kWords, seed, next_page, page_seq[next_page]);
        memory_writes++;
      }
      pthread_mutex_unlock(&memory_lock);
    }
    usleep(2000);
  }
  return NULL;
}

/* The caller holds the disk's lock. */
static void write_record(struct Disk *disk, uint64_t slot) {
  disk->seq[slot]++;
  make_record(disk->buffer, disk, slot);
  off_t offset = (off_t)(slot * disk->stride);
  if (pwrite(disk->fd, disk->buffer, kPage, offset) != kPage && disk->error[0] == 0) {
    snprintf(disk->error, sizeof disk->error, "write of slot %llu: %s", (unsigned long long)slot,
             strerror(errno));
  }
  disk->next++;
  if (disk->next % 16 == 0 && fsync(disk->fd) != 0 && disk->error[0] == 0) {
    snprintf(disk->error, sizeof disk->error, "fsync: %s", strerror(errno));
  }
}

static void *write_disk(void *argument) {
  struct Disk *disk = argument;
  for (;;) {
    if (!paused) {
      pthread_mutex_lock(&disk->lock);
      write_record(disk, mix(disk->next) % kSlots);
      pthread_mutex_unlock(&disk->lock);
    }
    usleep(3000);
  }
  return NULL;
}

static int open_disk(struct Disk *disk, int number) {
  snprintf(disk->path, sizeof disk->path, "/dev/vd%c", 'a' + number);
  disk->number = number;
  for (int tries = 0; tries < 600; tries++) {
    disk->fd = open(disk->path, O_RDWR | O_DIRECT | O_CLOEXEC);
    if (disk->fd >= 0) {
      break;
    }
    usleep(50000);
  }
  uint64_t bytes = 0;
  if (disk->fd < 0 || ioctl(disk->fd, BLKGETSIZE64, &bytes) != 0) {
    return -1;
  }
  disk->stride = bytes / kSlots / kPage * kPage;
  disk->buffer = aligned_alloc(kPage, kPage);
  pthread_mutex_init(&disk->lock, NULL);
  for (uint64_t slot = 0; slot < kSlots; slot++) {
    write_record(disk, slot);
  }
  return disk->stride == 0 || disk->error[0] != 0 ? -1 : 0;
}

static void lock_all(void) {
  pthread_mutex_lock(&memory_lock);
  for (int i = 0; i < disk_count; i++) {
    pthread_mutex_lock(&disks[i].lock);
  }
}

static void unlock_all(void) {
  for (int i = disk_count - 1; i >= 0; i--) {
    pthread_mutex_unlock(&disks[i].lock);
  }
  pthread_mutex_unlock(&memory_lock);
}

/* All locks are held. Returns the number of wrong pages and records; the first is described. */
static unsigned long find_bad(char *why, size_t why_size) {
  static uint64_t expected[kWords] __attribute__((aligned(kPage)));
  unsigned long bad = 0;
  for (size_t i = 0; i < page_count; i++) {
    const uint64_t *page = arena + i * kWords;
    make_page(expected, seed, i, page_seq[i]);
    if (memcmp(page, expected, kPage) != 0 && bad++ == 0) {
      snprintf(why, why_size, "page %zu: seed=%llx seq=%llx, has key=%llx index=%llx seq=%llx", i,
               (unsigned long long)seed, (unsigned long long)page_seq[i],
               (unsigned long long)page[0], (unsigned long long)page[1],
               (unsigned long long)page[2]);
    }
  }
  for (int d = 0; d < disk_count; d++) {
    struct Disk *disk = &disks[d];
    if (disk->error[0] != 0 && bad++ == 0) {
      snprintf(why, why_size, "%s: %s", disk->path, disk->error);
    }
    for (uint64_t slot = 0; slot < kSlots; slot++) {
      make_record(expected, disk, slot);
      memset(disk->buffer, 0xee, kPage);
      ssize_t n = pread(disk->fd, disk->buffer, kPage, (off_t)(slot * disk->stride));
      if ((n != kPage || memcmp(disk->buffer, expected, kPage) != 0) && bad++ == 0) {
        snprintf(why, why_size, "%s slot %llu: read %zd, seq=%llx, has key=%llx slot=%llx seq=%llx",
                 disk->path, (unsigned long long)slot, n, (unsigned long long)disk->seq[slot],
                 (unsigned long long)disk->buffer[0], (unsigned long long)disk->buffer[1],
                 (unsigned long long)disk->buffer[2]);
      }
    }
  }
  return bad;
}

static uint64_t disk_writes(void) {
  uint64_t sum = 0;
  for (int i = 0; i < disk_count; i++) {
    sum += disks[i].next;
  }
  return sum;
}

static void check(const char *nonce) {
  char why[256] = "";
  lock_all();
  unsigned long bad = find_bad(why, sizeof why);
  if (bad == 0) {
    say("@%s CHECK OK seed=%llu seq=%llu pages=%zu disks=%d disk=%llu", nonce,
        (unsigned long long)seed, (unsigned long long)memory_writes, page_count, disk_count,
        (unsigned long long)disk_writes());
  } else {
    say("@%s CHECK BAD %lu wrong, first: %s", nonce, bad, why);
  }
  unlock_all();
}

/* Changes one byte behind the back of the expectations; a second call undoes it. */
static void corrupt(const char *nonce, const char *where) {
  int number = where[0] == 'd' ? where[4] - '0' : -1;
  lock_all();
  paused = 1; /* or a writer would soon put the byte right */
  if (number < 0) {
    ((uint8_t *)arena)[(page_count / 2) * kPage + 1234] ^= 0x10;
  } else if (number < disk_count) {
    struct Disk *disk = &disks[number];
    make_record(disk->buffer, disk, 77);
    static int flipped[kDisksMax];
    flipped[number] ^= 0x10;
    ((uint8_t *)disk->buffer)[4001] ^= (uint8_t)flipped[number];
    if (pwrite(disk->fd, disk->buffer, kPage, (off_t)(77 * disk->stride)) != kPage) {
      say("@%s FAILED %s", nonce, strerror(errno));
    }
  }
  unlock_all();
  say("@%s CORRUPTED %s", nonce, where);
}

static int write_file(const char *path, const char *text) {
  int fd = open(path, O_WRONLY);
  if (fd < 0) {
    return -1;
  }
  ssize_t n = write(fd, text, strlen(text));
  int error = errno;
  close(fd);
  errno = error;
  return n < 0 ? -1 : 0;
}

static void obey(char *line) {
  char nonce[32] = "", command[32] = "", argument[32] = "";
  if (sscanf(line, "%31s %31s %31s", nonce, command, argument) < 2) {
    return;
  }
  if (strcmp(command, "check") == 0) {
    check(nonce);
  } else if (strcmp(command, "tick") == 0) {
    char text[128];
    int length = snprintf(text, sizeof text, "%llu", (unsigned long long)memory_writes);
    for (int i = 0; i < disk_count; i++) {
      length += snprintf(text + length, sizeof text - (size_t)length, " %llu",
                         (unsigned long long)disks[i].next);
    }
    say("@%s TICK %s", nonce, text);
  } else if (strcmp(command, "fill") == 0) {
    fill_arena(strtoull(argument, NULL, 0));
    say("@%s FILLED %s", nonce, argument);
  } else if (strcmp(command, "corrupt") == 0) {
    corrupt(nonce, argument);
  } else if (strcmp(command, "pause-writes") == 0 || strcmp(command, "resume-writes") == 0) {
    lock_all();
    paused = command[0] == 'p';
    unlock_all();
    say("@%s DONE", nonce);
  } else if (strcmp(command, "suspend") == 0) {
    say("@%s SUSPENDING", nonce);
    tcdrain(console_fd);
    if (write_file("/sys/power/mem_sleep", "deep") != 0 ||
        write_file("/sys/power/state", "mem") != 0) {
      say("@%s FAILED %s", nonce, strerror(errno));
    }
  } else if (strcmp(command, "poweroff") == 0) {
    say("@%s POWERING OFF", nonce);
    tcdrain(console_fd);
    reboot(RB_POWER_OFF);
  } else {
    say("@%s UNKNOWN %s", nonce, command);
  }
}

static void read_commands(void) {
  char line[128];
  size_t length = 0;
  for (;;) {
    char c;
    ssize_t n = read(console_fd, &c, 1);
    if (n <= 0) {
      usleep(10000);
    } else if (c == '\n' || c == '\r') {
      line[length] = 0;
      obey(line);
      length = 0;
    } else if (length < sizeof line - 1) {
      line[length++] = c;
    }
  }
}

int main(int argc, char **argv) {
  if (argc != 4) {
    return 2;
  }
  console_fd = open(argv[1], O_RDWR | O_NOCTTY);
  page_count = strtoull(argv[2], NULL, 0) * 256;
  int wanted_disks = atoi(argv[3]);
  struct termios settings;
  tcgetattr(console_fd, &settings);
  cfmakeraw(&settings);
  tcsetattr(console_fd, TCSANOW, &settings);

  arena = mmap(NULL, page_count * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  page_seq = calloc(page_count, sizeof *page_seq);
  if (arena == MAP_FAILED || page_seq == NULL) {
    say("@start FAILED no memory for %s MiB", argv[2]);
    return 1;
  }
  fill_arena(1);
  for (int i = 0; i < wanted_disks && i < kDisksMax; i++) {
    if (open_disk(&disks[i], i) != 0) {
      say("@start FAILED %s: %s", disks[i].path, disks[i].error);
      return 1;
    }
    disk_count++;
  }
  pthread_t memory_thread;
  pthread_create(&memory_thread, NULL, write_memory, NULL);
  for (int i = 0; i < disk_count; i++) {
    pthread_create(&disks[i].thread, NULL, write_disk, &disks[i]);
  }
  say("@start READY pages=%zu disks=%d", page_count, disk_count);
  read_commands();
}
