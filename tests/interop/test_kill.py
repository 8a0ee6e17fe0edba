"""The saver is killed at random moments: the guest runs again within a second, the images are clean,
and the snapshot is there whole or not at all. With the guardian killed too, `resume` does it."""

import glob
import os
import random
import re
import shutil
import signal
import subprocess
import time

from bed import BedTest, cases

SLOW = ["--limit-rate", "40M"]  # about 90 MiB to write: more than two seconds


class Kill(BedTest):
    def setUp(self):
        super().setUp()
        # A copy, so that its processes can be told from those of other runs.
        self.program = shutil.copy(self.built("qvmstate"), self.folder)

    def start_save(self, guest, name, *flags):
        return subprocess.Popen([self.program, *self.save_args(guest, name, *flags)],
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)

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

    def assert_runs_within(self, guest, seconds, since):
        while guest.status() != "running":
            self.assertLess(time.monotonic() - since, seconds, f"still {guest.status()}")
            time.sleep(0.01)

    def assert_processes_end(self):
        deadline = time.monotonic() + 5
        while self.our_processes():
            self.assertLess(time.monotonic(), deadline, "a process of the save is left")
            time.sleep(0.05)

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
        self.assertEqual(names[0], names[1])
        for name in names[0]:
            self.assertRegex(name, possible + "|^after$")
            guest.start(loadvm=name)
            guest.check()
            guest.quit()

    @cases("plugin", "attach")
    def test_killed_at_random_moments(self, how):
        guest = self.make_vm("newest", "microvm", plugin=how == "plugin").start()
        seed = random.randrange(1 << 32)
        chance = random.Random(seed)
        for i in range(8):
            with self.subTest(seed=seed, round=i):
                process = self.start_save(guest, f"k{i}", *SLOW)
                self.wait_stopped(guest, process)
                time.sleep(chance.random() * 3)
                process.kill()
                since = time.monotonic()
                process.communicate()
                self.assert_runs_within(guest, 1.0, since)
                self.assert_processes_end()
                self.assert_writes_go_on(guest)
                guest.stop()  # flushes QEMU's caches, so that what is read is not torn
                guest.check_image(share=True)
                guest.cont()
        self.assert_sound(guest, r"^k\d$")

    @cases((signal.SIGINT, "attach"), (signal.SIGTERM, "attach"), (signal.SIGINT, "plugin"),
           quick=[(signal.SIGINT, "attach"), (signal.SIGINT, "plugin")])
    def test_cancelled(self, number, how):
        guest = self.make_vm("newest", "microvm", plugin=how == "plugin").start()
        process = self.start_save(guest, "half", *SLOW)
        self.wait_stopped(guest, process)
        time.sleep(0.5)
        process.send_signal(number)
        since = time.monotonic()
        _, errors = process.communicate(timeout=20)
        self.assertNotEqual(process.returncode, 0)
        self.assertRegex(errors.lower(), "cancel|interrupt")
        self.assert_runs_within(guest, 1.0, since)
        self.assert_processes_end()
        self.assert_sound(guest, "^$")

    def test_guardian_killed_too(self):
        """Only then the guest stays stopped; the next command says so, and `resume` helps."""
        guest = self.make_vm("newest", "microvm").start()
        process = self.start_save(guest, "half", *SLOW)
        self.wait_stopped(guest, process)
        time.sleep(0.5)
        for pid in self.our_processes():
            os.kill(pid, signal.SIGSTOP)  # or one would act while the other is being killed
        for pid in self.our_processes():
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        time.sleep(1)
        self.assertNotEqual(guest.status(), "running")
        self.refused(self.save_args(guest, "next"), "resume")
        self.tool("resume", "--qmp", guest.tool_socket)
        self.assertEqual(guest.status(), "running")
        self.assertIn("nothing", self.tool("resume", "--qmp", guest.tool_socket))
        self.assert_sound(guest, "^$")

    def test_guardian_killed_alone(self):
        """The save notices or not, but the guest runs and the images are sound."""
        guest = self.make_vm("newest", "microvm").start()
        process = self.start_save(guest, "half", *SLOW)
        self.wait_stopped(guest, process)
        guardians = [pid for pid in self.our_processes() if pid != process.pid]
        self.assertEqual(len(guardians), 1, "one guardian expected")
        os.kill(guardians[0], signal.SIGKILL)
        process.communicate(timeout=60)
        self.assert_runs_within(guest, 1.0, time.monotonic())
        self.assert_sound(guest, "^half$")

    def test_qemu_killed(self):
        """QEMU goes away in the middle: a clean end, and the images are the old ones."""
        guest = self.make_vm("newest", "microvm").start()
        self.save(guest, "before")
        process = self.start_save(guest, "half", *SLOW)
        self.wait_stopped(guest, process)
        time.sleep(0.5)
        guest.kill()
        _, errors = process.communicate(timeout=20)
        self.assertEqual(process.returncode, 1, errors)
        for line in errors.splitlines():  # the saver's, and the guardian's
            self.assertTrue(line.startswith("qvmstate: "), errors)
        self.assert_processes_end()
        guest.check_image()
        self.assertTrue(re.fullmatch("before", " ".join(guest.snapshot_names())))
        guest.start(loadvm="before")
        guest.check()
