"""Makes the kernel put a process's memory out of RAM, through process_madvise(MADV_PAGEOUT), and
tells how much of it is still there. Private memory needs swap to go to."""

import contextlib
import ctypes
import os
import struct
import subprocess

PIDFD_OPEN, PROCESS_MADVISE, MADV_PAGEOUT = 434, 440, 21  # x86_64 and aarch64 alike
LIBC = ctypes.CDLL(None, use_errno=True)


class Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def syscall(number, *args):
    result = LIBC.syscall(ctypes.c_long(number), *args)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def mappings(pid, min_bytes=32 << 20):
    """(start, end) of the process's large writable mappings: guest memory."""
    found = []
    with open(f"/proc/{pid}/maps", encoding="utf-8") as maps:
        for line in maps:
            ends, rights = line.split()[:2]
            start, end = (int(part, 16) for part in ends.split("-"))
            if rights.startswith("rw") and end - start >= min_bytes:
                found.append((start, end))
    return found


def present_bytes(pid):
    """Bytes of those mappings that the process's page tables have in RAM."""
    count = 0
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for start, end in mappings(pid):
            data = os.pread(pagemap.fileno(), (end - start) // 4096 * 8, start // 4096 * 8)
            count += sum(entry >> 63 for (entry,) in struct.iter_unpack("<Q", data))
    return count * 4096


def page_out(pid):
    fd = syscall(PIDFD_OPEN, ctypes.c_int(pid), ctypes.c_uint(0))
    try:
        for start, end in mappings(pid):
            vector = Iovec(start, end - start)
            syscall(PROCESS_MADVISE, ctypes.c_int(fd), ctypes.byref(vector), ctypes.c_size_t(1),
                    ctypes.c_int(MADV_PAGEOUT), ctypes.c_uint(0))
    finally:
        os.close(fd)


@contextlib.contextmanager
def swap(folder, mib=512):
    """Some swap for the time of a test. Yields None, or the reason why there is none."""
    with open("/proc/swaps", encoding="utf-8") as swaps:
        if len(swaps.readlines()) > 1:
            yield None
            return
    path = os.path.join(folder, "swap")
    with open(path, "wb") as file:
        os.chmod(path, 0o600)
        for _ in range(mib):
            file.write(bytes(1 << 20))  # a hole would be refused
    error = None
    for command in (["mkswap", path], ["swapon", path]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            error = f"{command[0]}: {done.stderr.strip()}"
            break
    try:
        yield error
    finally:
        if error is None:
            subprocess.run(["swapoff", path], check=True, timeout=120)
        os.unlink(path)
