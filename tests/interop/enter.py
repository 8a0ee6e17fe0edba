"""Becomes a program in a chroot, in a mount namespace of its own, which ends with the process: no
mount is left behind whatever happens.  enter.py ROOT OUTER INNER PROGRAM [ARG]...

The folder OUTER is seen inside as INNER."""

import ctypes
import errno
import os
import sys

# <sched.h>, <sys/mount.h>
CLONE_NEWNS = 0x20000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000

LIBC = ctypes.CDLL(None, use_errno=True)


def check(result, what):
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def mount(source, target, kind, flags):
    check(LIBC.mount(os.fsencode(source), os.fsencode(target), kind, ctypes.c_ulong(flags), None),
          target)


def keep_mounts_inside(other_root):
    """No mount of this namespace shall be seen in another."""
    try:
        mount("none", "/", None, MS_REC | MS_PRIVATE)
        return
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    # In a chroot that is no mount point, the mount can only be named from outside: with the root
    # somewhere below, the way up from the working directory is free.
    inside = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    os.chdir("/")
    os.chroot(other_root)
    while not os.path.samestat(os.stat("."), os.stat("..")):
        os.chdir("..")
    mount("none", ".", None, MS_REC | MS_PRIVATE)
    os.fchdir(inside)
    os.chroot(".")
    os.close(inside)


def main():
    root, outer, inner = sys.argv[1:4]
    check(LIBC.unshare(CLONE_NEWNS), "unshare")
    keep_mounts_inside(root)
    mount("none", root + "/tmp", b"tmpfs", 0)
    os.makedirs(root + inner, exist_ok=True)
    mount(outer, root + inner, None, MS_BIND | MS_REC)
    mount("/dev", root + "/dev", None, MS_BIND | MS_REC)
    mount("/proc", root + "/proc", None, MS_BIND)
    os.chroot(root)
    os.chdir("/")
    os.execv("/usr/bin/env", ["env", *sys.argv[4:]])  # of the new root, as is its PATH


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"enter.py: {error}")
