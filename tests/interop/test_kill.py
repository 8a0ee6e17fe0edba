"""Processes are killed, and the connection to QEMU is cut, at random moments of a save: the guest runs
again within a second, the images are clean, the snapshot is there whole or not at all, and what was
there before loads. With the guardian killed too, `resume` does it."""

import contextlib
import ctypes
import os
import signal
import socket
import stat
import time

from bed import cases
from interrupted import SLOW, InterruptedTest, rounds

SYS_PIDFD_GETFD = 438


class Kill(InterruptedTest):
    def start_save_and_wait(self, guest, chance, name, *flags):
        """A slow save, at some moment of it; now and then before the guest is stopped."""
        process = self.start_save(guest, name, *SLOW, *flags)
        if chance.random() < 0.2:
            time.sleep(chance.random() * 0.3)
        else:
            self.wait_stopped(guest, process)
            time.sleep(chance.random() * 3)
        return process

    def resumed_at(self, guest, since):
        """When the guest ran again by QEMU's own clock, or `since` if it did not stand."""
        guest.status()  # the events before its answer have come now
        times = [event["timestamp"] for event in guest.qmp.events if event["event"] == "RESUME"]
        guest.qmp.events.clear()
        return max([since, *(at["seconds"] + at["microseconds"] / 1e6 for at in times)])

    @cases("plugin", "attach")
    def test_killed_at_random_moments(self, how):
        """All saves go to one name: what loads then is the last that came to its end, or this one."""
        guest = self.make_vm("newest", "microvm", plugin=how == "plugin").start()
        guest.fill(7)
        self.save(guest, "before")
        self.save(guest, "k")
        random_seed, chance = self.random_moments()
        possible = {7}
        killed = whole = 0
        longest = 0.0
        for i in range(rounds(4, 100)):
            with self.subTest(random_seed=random_seed, round=i):
                guest.fill(100 + i)
                possible.add(100 + i)
                process = self.start_save_and_wait(guest, chance, "k", "--replace")
                process.kill()
                since = time.time()
                process.communicate()
                killed += process.returncode == -signal.SIGKILL
                self.assert_runs_within(guest, 5.0, time.monotonic())
                stood = self.resumed_at(guest, since) - since
                self.assertLess(stood, 1.0)
                longest = max(longest, stood)
                self.assert_processes_end()
                self.assert_writes_go_on(guest)
                self.assert_image_sound(guest)
                for disk in guest.disks:
                    self.assertEqual(sorted(guest.snapshot_names(disk.path)), ["before", "k"])
                if i % 4 == 3:
                    guest.loadvm("k")
                    seed = guest.check()["seed"]
                    self.assertIn(seed, possible)
                    whole += seed == 100 + i
                    possible = {seed}
        looked_at = rounds(4, 100) // 4
        print(f"        {killed} killed of {rounds(4, 100)}; the guest stood {longest:.3f} s at most "
              f"afterwards; {whole} of {looked_at} states looked at were the newest", flush=True)
        guest.loadvm("before")
        self.assert_seed(guest, 7)
        self.assert_sound(guest, "^(k|before)$")

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

    def kill_both(self, process):
        """The saver and its guardian, neither of which sees the other one's end."""
        for pid in self.our_processes():
            os.kill(pid, signal.SIGSTOP)  # or one would act while the other is being killed
        for pid in self.our_processes():
            os.kill(pid, signal.SIGKILL)
        process.communicate()

    def test_guardian_killed_too(self):
        """Only then the guest stays stopped; the next command says so, and `resume` helps."""
        guest = self.make_vm("newest", "microvm").start()
        process = self.start_save(guest, "half", *SLOW)
        self.wait_stopped(guest, process)
        time.sleep(0.5)
        self.kill_both(process)
        time.sleep(1)
        self.assertNotEqual(guest.status(), "running")
        self.refused(self.save_args(guest, "next"), "resume")
        self.tool("resume", "--qmp", guest.tool_socket)
        self.assertEqual(guest.status(), "running")
        self.assertIn("nothing", self.tool("resume", "--qmp", guest.tool_socket))
        self.assert_sound(guest, "^$")

    def test_guardian_killed_too_at_random_moments(self):
        guest = self.make_vm("newest", "microvm").start()
        guest.fill(7)
        self.save(guest, "k")
        random_seed, chance = self.random_moments()
        seeds = {7}
        stood = 0
        for i in range(rounds(2, 20)):
            with self.subTest(random_seed=random_seed, round=i):
                guest.fill(100 + i)
                seeds.add(100 + i)
                self.kill_both(self.start_save_and_wait(guest, chance, "k", "--replace"))
                stood += guest.status() != "running"
                self.tool("resume", "--qmp", guest.tool_socket)
                self.assertEqual(guest.status(), "running")
                self.assert_images_active(guest)
                self.assert_writes_go_on(guest)
                self.assert_image_sound(guest)
                for disk in guest.disks:
                    self.assertEqual(guest.snapshot_names(disk.path), ["k"])
        print(f"        {stood} of {rounds(2, 20)} times the guest stood until resume", flush=True)
        guest.loadvm("k")
        self.assertIn(guest.check()["seed"], seeds)
        self.assert_sound(guest, "^k$")

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

    @cases("attach", "plugin")
    def test_qemu_killed(self, how):
        """QEMU goes away in the middle, and with it the memory that is being read: a clean end, and
        the images are the old ones."""
        guest = self.make_vm("newest", "microvm", plugin=how == "plugin").start()
        guest.fill(7)
        self.save(guest, "before")
        random_seed, chance = self.random_moments()
        for i in range(rounds(1, 10)):
            with self.subTest(random_seed=random_seed, round=i):
                process = self.start_save(guest, "half", *SLOW)
                self.wait_stopped(guest, process)
                time.sleep(chance.random() * 1.5)
                guest.kill()
                _, errors = process.communicate(timeout=20)
                self.assertEqual(process.returncode, 1, errors)
                for line in errors.splitlines():  # the saver's, and the guardian's
                    self.assertTrue(line.startswith("qvmstate: "), errors)
                self.assert_processes_end()
                guest.check_image()
                for disk in guest.disks:
                    self.assertEqual(guest.snapshot_names(disk.path), ["before"])
                guest.start(loadvm="before")
                self.assert_seed(guest, 7)

    def test_connection_cut(self):
        """The QMP connection ends in the middle, and with it the saver's way to wake the guest."""
        guest = self.make_vm("newest", "microvm").start()
        process = self.start_save(guest, "half", *SLOW)
        self.wait_stopped(guest, process)
        time.sleep(0.5)
        cut_connection(process.pid, guest.tool_socket)
        _, errors = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 1, errors)
        self.assert_runs_within(guest, 1.0, time.monotonic())
        self.assert_processes_end()
        # Saved or not, it is whole; the saver says which.
        self.assert_sound(guest, "^half$")


def cut_connection(pid, path):
    """Shuts down the sockets of a process that are connected to `path`, as QEMU would."""
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(pid)
    cut = 0
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            copy = libc.syscall(SYS_PIDFD_GETFD, process, int(name), 0)
            if copy < 0:
                continue
            if not stat.S_ISSOCK(os.fstat(copy).st_mode):
                os.close(copy)  # an image: a copy would hold its locks
                continue
            with socket.socket(fileno=copy) as theirs, contextlib.suppress(OSError):
                if theirs.getpeername() == path:
                    theirs.shutdown(socket.SHUT_RDWR)
                    cut += 1
    finally:
        os.close(process)
    if cut == 0:
        raise RuntimeError(f"process {pid} has no connection to {path}")
