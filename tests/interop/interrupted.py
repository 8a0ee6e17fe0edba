"""What the tests share that disturb a save while it goes on: a slow save in a process of its own, and
what must hold of guest and images after it."""

import glob
import os
import random
import shutil
import subprocess
import time

import bed
from bed import BedTest

SLOW = ["--limit-rate", "40M"]  # about 90 MiB to write: more than two seconds


def rounds(quick, full):
    return quick if bed.Settings.quick else full


class InterruptedTest(BedTest):
    def setUp(self):
        super().setUp()
        # A copy, so that its processes can be told from those of other runs.
        self.program = shutil.copy(self.built("qvmstate"), self.folder)

    def random_moments(self):
        """A seed, which a failed round tells, and a generator of random numbers from it."""
        seed = random.randrange(1 << 32)
        return seed, random.Random(seed)

    def start_tool(self, arguments):
        return subprocess.Popen([self.program, *arguments], stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def start_save(self, guest, name, *flags):
        return self.start_tool(self.save_args(guest, name, *flags))

    def our_processes(self):
        """Ids of the processes that run our copy of the program: the saver and its guardian."""
        found = []
        for link in glob.glob("/proc/[0-9]*/exe"):
            try:
                if os.readlink(link) == self.program:
                    found.append(int(link.split("/")[2]))
            except OSError:
                pass
        return found

    def wait_stopped(self, guest, process):
        """Until the save has stopped the guest."""
        deadline = time.monotonic() + 30
        while guest.status() == "running":
            self.assertIsNone(process.poll(), "the save ended before it stopped the guest")
            self.assertLess(time.monotonic(), deadline, "the save does not stop the guest")
            time.sleep(0.002)

    def wait_until(self, holds, seconds, what):
        deadline = time.monotonic() + seconds
        while not holds():
            self.assertLess(time.monotonic(), deadline, what)
            time.sleep(0.01)

    def assert_runs_within(self, guest, seconds, since):
        while guest.status() != "running":
            self.assertLess(time.monotonic() - since, seconds, f"still {guest.status()}")
            time.sleep(0.01)

    def assert_processes_end(self):
        self.wait_until(lambda: not self.our_processes(), 5, "a process of the save is left")

    def assert_image_sound(self, guest):
        """As qemu-img sees it while the guest goes on."""
        guest.stop()  # flushes QEMU's caches, so that what is read is not torn
        guest.check_image(share=True)
        guest.cont()

    def assert_sound(self, guest, possible):
        """The images hold whole snapshots only, a new save works, and QEMU loads it."""
        self.assert_writes_go_on(guest)
        guest.check()
        guest.fill(11)
        self.save(guest, "after", "--replace")
        guest.fill(22)
        guest.loadvm("after")
        self.assert_seed(guest, 11)
        guest.quit()
        guest.check_image()
        names = [guest.snapshot_names(disk.path) for disk in guest.disks]
        for others in names[1:]:
            self.assertEqual(names[0], others)
        for name in names[0]:
            self.assertRegex(name, possible + "|^after$")
            guest.start(loadvm=name)
            guest.check()
            guest.quit()
