"""A folder whose files take writes and then, as it is told, do not (faulty_fs.c, through FUSE)."""

import contextlib
import os
import shlex
import subprocess
import time
import unittest

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "faulty_fs.c")


def build(folder):
    """Compiles the file system, or skips the test with what is missing."""
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "fuse3"], capture_output=True,
                           text=True, check=False)
    if flags.returncode != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise unittest.SkipTest("libfuse3-dev is not installed" if flags.returncode != 0 else
                                "/dev/fuse cannot be used")
    program = os.path.join(folder, "faulty_fs")
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-pthread", SOURCE, "-o", program,
                    *shlex.split(flags.stdout)], check=True)
    return program


class FaultyFolder:
    def __init__(self, test):
        """Mounted until the test is over."""
        self.below = os.path.join(test.folder, "below")
        self.path = os.path.join(test.folder, "faulty")
        program = build(test.folder)
        for path in (self.below, self.path):
            os.makedirs(path)
        process = subprocess.Popen([program, self.below, self.path], stdin=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE)
        test.addCleanup(process.communicate)
        test.addCleanup(subprocess.run, ["umount", "-l", self.path], check=False)
        deadline = time.monotonic() + 20
        while not os.path.ismount(self.path):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise unittest.SkipTest(f"FUSE: {process.communicate()[1].decode().strip()}")
            time.sleep(0.01)

    def say(self, line):
        with open(os.path.join(self.path, ".faults"), "w", encoding="utf-8") as control:
            control.write(line)

    @contextlib.contextmanager
    def faults(self, kind, skip, count=1):
        """After `skip` writes `count` fail: "eio", "enospc" or "short"."""
        self.say(f"{kind} {skip} {count}")
        try:
            yield
        finally:
            self.say("none 0 0")

    def writes_of(self, work):
        """How many writes these are."""
        self.say("none 0 0")
        work()
        with open(os.path.join(self.path, ".faults"), encoding="utf-8") as control:
            return int(control.read())
