/*
 * A file system that shows one folder and lets writes fail:  faulty_fs FOLDER MOUNTPOINT
 *
 * The file ".faults" in it is its control. A line "KIND SKIP COUNT" that is written there lets, after
 * SKIP further writes, COUNT fail: "eio" and "enospc" by that error, "short" by writing only the first
 * half, in whole sectors. Read, it tells how many writes there were since. Reserving space counts as a
 * write, and cannot be short. Nothing is cached above it, so each write is one of the program's.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 35
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse3/fuse.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

enum Kind { kNone, kEio, kEnospc, kShort };
enum { kSector = 512, kTextMax = 64 };
static const char control_path[] = "/.faults";

static int folder; /* all paths are relative to it */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static enum Kind kind;
static unsigned long skip, count, writes;

static const char *below(const char *path) { return path[1] == 0 ? "." : path + 1; }
static int is_control(const char *path) { return strcmp(path, control_path) == 0; }
static int answer(long result) { return result < 0 ? -errno : (int)result; }

/* What is to become of this write. */
static enum Kind next_write(void) {
  pthread_mutex_lock(&lock);
  const unsigned long number = writes++;
  const enum Kind now = number >= skip && number - skip < count ? kind : kNone;
  pthread_mutex_unlock(&lock);
  return now;
}

static int set_faults(const char *text, size_t bytes) {
  char line[kTextMax], word[16];
  unsigned long new_skip, new_count;
  snprintf(line, sizeof line, "%.*s", (int)bytes, text);
  if (sscanf(line, "%15s %lu %lu", word, &new_skip, &new_count) != 3) {
    return -EINVAL;
  }
  pthread_mutex_lock(&lock);
  kind = strcmp(word, "eio") == 0      ? kEio
         : strcmp(word, "enospc") == 0 ? kEnospc
         : strcmp(word, "short") == 0  ? kShort
                                       : kNone;
  skip = new_skip;
  count = new_count;
  writes = 0;
  pthread_mutex_unlock(&lock);
  return (int)bytes;
}

static int tell_writes(char *to, size_t bytes, off_t offset) {
  char text[kTextMax];
  pthread_mutex_lock(&lock);
  const int length = snprintf(text, sizeof text, "%lu\n", writes);
  pthread_mutex_unlock(&lock);
  if (offset >= length) {
    return 0;
  }
  const size_t part = (size_t)(length - offset) < bytes ? (size_t)(length - offset) : bytes;
  memcpy(to, text + offset, part);
  return (int)part;
}

static void *fs_init(struct fuse_conn_info *connection, struct fuse_config *config) {
  /* Where the kernel splits a direct write, it makes an error of a part that is written short. */
  connection->want &= ~FUSE_CAP_ASYNC_DIO;
  config->use_ino = 1;
  config->direct_io = 1;
  return NULL;
}

static int fs_getattr(const char *path, struct stat *status, struct fuse_file_info *file) {
  (void)file;
  if (is_control(path)) {
    *status = (struct stat){.st_mode = S_IFREG | 0600, .st_nlink = 1, .st_size = kTextMax};
    return 0;
  }
  return answer(fstatat(folder, below(path), status, AT_SYMLINK_NOFOLLOW));
}

static int fs_readdir(const char *path, void *buffer, fuse_fill_dir_t fill, off_t offset,
                      struct fuse_file_info *file, enum fuse_readdir_flags flags) {
  (void)offset, (void)file, (void)flags;
  const int opened = openat(folder, below(path), O_RDONLY | O_DIRECTORY);
  DIR *entries = opened < 0 ? NULL : fdopendir(opened);
  if (entries == NULL) {
    return -errno;
  }
  for (const struct dirent *entry; (entry = readdir(entries)) != NULL;) {
    fill(buffer, entry->d_name, NULL, 0, 0);
  }
  closedir(entries);
  return 0;
}

static int open_as(const char *path, struct fuse_file_info *file, mode_t mode) {
  if (is_control(path)) {
    return 0;
  }
  const int opened = openat(folder, below(path), file->flags & ~(O_DIRECT | O_APPEND), mode);
  file->fh = (uint64_t)opened;
  return opened < 0 ? -errno : 0;
}
static int fs_open(const char *path, struct fuse_file_info *file) { return open_as(path, file, 0); }
static int fs_create(const char *path, mode_t mode, struct fuse_file_info *file) {
  return open_as(path, file, mode);
}

static int fs_release(const char *path, struct fuse_file_info *file) {
  return is_control(path) ? 0 : answer(close((int)file->fh));
}

static int fs_read(const char *path, char *to, size_t bytes, off_t offset,
                   struct fuse_file_info *file) {
  return is_control(path) ? tell_writes(to, bytes, offset)
                          : answer(pread((int)file->fh, to, bytes, offset));
}

static int fs_write(const char *path, const char *from, size_t bytes, off_t offset,
                    struct fuse_file_info *file) {
  if (is_control(path)) {
    return set_faults(from, bytes);
  }
  const enum Kind now = next_write();
  if (now == kEio || now == kEnospc) {
    return now == kEio ? -EIO : -ENOSPC;
  }
  if (now == kShort && bytes > kSector) {
    bytes = bytes / 2 / kSector * kSector;
    bytes = bytes == 0 ? kSector : bytes;
  }
  return answer(pwrite((int)file->fh, from, bytes, offset));
}

static int fs_fallocate(const char *path, int mode, off_t offset, off_t bytes,
                        struct fuse_file_info *file) {
  (void)path;
  const enum Kind now = (mode & FALLOC_FL_PUNCH_HOLE) != 0 ? kNone : next_write();
  if (now == kEio || now == kEnospc) {
    return now == kEio ? -EIO : -ENOSPC;
  }
  return answer(fallocate((int)file->fh, mode, offset, bytes));
}

static int fs_truncate(const char *path, off_t bytes, struct fuse_file_info *file) {
  if (is_control(path)) {
    return 0;
  }
  if (file != NULL) {
    return answer(ftruncate((int)file->fh, bytes));
  }
  const int opened = openat(folder, below(path), O_WRONLY);
  const int result = opened < 0 ? -errno : answer(ftruncate(opened, bytes));
  if (opened >= 0) {
    close(opened);
  }
  return result;
}

static int fs_fsync(const char *path, int data_only, struct fuse_file_info *file) {
  (void)path;
  return answer(data_only ? fdatasync((int)file->fh) : fsync((int)file->fh));
}

static int fs_unlink(const char *path) { return answer(unlinkat(folder, below(path), 0)); }

static int fs_rename(const char *from, const char *to, unsigned flags) {
  return answer(renameat2(folder, below(from), folder, below(to), flags));
}

static int fs_statfs(const char *path, struct statvfs *status) {
  (void)path;
  return answer(fstatvfs(folder, status));
}

int main(int argc, char **argv) {
  if (argc != 3 || (folder = open(argv[1], O_RDONLY | O_DIRECTORY)) < 0) {
    fprintf(stderr, "usage: faulty_fs FOLDER MOUNTPOINT\n");
    return 2;
  }
  static const struct fuse_operations operations = {
      .init = fs_init,         .getattr = fs_getattr,   .readdir = fs_readdir, .open = fs_open,
      .create = fs_create,     .release = fs_release,   .read = fs_read,       .write = fs_write,
      .fallocate = fs_fallocate, .truncate = fs_truncate, .fsync = fs_fsync,   .unlink = fs_unlink,
      .rename = fs_rename,     .statfs = fs_statfs,
  };
  char *arguments[] = {argv[0], "-f", "-o", "fsname=faulty_fs", argv[2], NULL};
  return fuse_main(5, arguments, &operations, NULL);
}
