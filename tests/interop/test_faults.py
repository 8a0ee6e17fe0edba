"""Storage that fails under a save: a file system that fills up, a device that gives errors. The save
says so, the guest runs on, the images are as they were, and an older snapshot loads."""

import copy
import os
import shutil
import subprocess
import time
import unittest

import bed
import vm
from bed import cases
from interrupted import SLOW, InterruptedTest

MIB = 1 << 20


class Faults(InterruptedTest):
    def command(self, *words):
        """A tool of the machine; one that is missing or not allowed here skips the test."""
        if shutil.which(words[0]) is None:
            raise unittest.SkipTest(f"{words[0]} is not installed")
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              check=False)
        if done.returncode != 0:
            raise unittest.SkipTest(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def mount(self, *words):
        folder = os.path.join(self.folder, f"mount{len(os.listdir(self.folder))}")
        os.makedirs(folder)
        self.command("mount", *words, folder)
        self.addCleanup(subprocess.run, ["umount", "-l", folder], check=True)
        return folder

    def small_ext4(self, mib):
        """A file system of its own, in a file."""
        image = os.path.join(self.folder, "ext4")
        with open(image, "wb") as file:
            file.truncate(mib * MIB)
        self.command("mkfs.ext4", "-q", "-F", "-m", "0", image)
        return self.mount("-o", "loop", image)

    def fill(self, folder):
        """Leaves no room in the file system, at once; returns the file that took it."""
        path = os.path.join(folder, "filler")
        space = os.statvfs(folder)
        piece = space.f_bfree * space.f_frsize
        size = 0
        with open(path, "wb") as file:
            while piece >= 4096:
                try:
                    os.posix_fallocate(file.fileno(), size, piece)
                    size += piece
                except OSError:
                    piece //= 2
        return path

    def assert_failed(self, process, words):
        _, errors = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 1, errors)
        self.assertRegex(errors.lower(), words)
        return time.monotonic()

    def assert_as_before(self, guest, since):
        """The guest runs on; `before` is the only snapshot, and loads."""
        self.wait_until(lambda: guest.status() in ("running", "io-error"), 1, "the guest stands")
        self.assertLess(time.monotonic() - since, 1.5)
        if guest.status() == "io-error":
            guest.cont()  # the guest itself wrote into what was full
        self.assert_writes_go_on(guest)
        guest.check()
        self.assert_image_sound(guest)
        for disk in guest.disks:
            self.assertEqual(guest.snapshot_names(disk.path), ["before"])
        guest.loadvm("before")
        self.assert_seed(guest, 7)
        self.assert_sound(guest, "^before$")

    @cases(*[(how, layout) for how in ("attach", "plugin") for layout in ("legacy", "mapped-ram")],
           quick=[("attach", "legacy"), ("plugin", "mapped-ram")])
    def test_file_system_fills_up(self, how, layout):
        small = self.small_ext4(900)
        guest = self.make_vm("newest", "microvm", plugin=how == "plugin",
                             disks=lambda qemu, folder: vm.make_disks(qemu, small)).start()
        guest.fill(7)
        self.save(guest, "before")
        self.assert_writes_go_on(guest)
        process = self.start_save(guest, "half", "--layout", layout, *SLOW)
        # Between the look at the free space and the moment when it is taken.
        self.wait_stopped(guest, process)
        filler = self.fill(small)
        since = self.assert_failed(process, "no space")
        os.unlink(filler)
        self.assert_as_before(guest, since)

    def loop_device(self, path):
        device = self.command("losetup", "--find", "--show", path)
        self.addCleanup(subprocess.run, ["losetup", "-d", device], check=True)
        return device

    def test_device_gives_errors(self):
        """The image lies on a block device whose store is full behind the first part: what the guest
        writes to is there, what a save takes anew is not."""
        # The one that sees this machine's devices; 7.2 is served by the plugin alone.
        release = copy.copy(bed.find_qemu("host"))
        release.inner = lambda name: name
        store = self.mount("-t", "tmpfs", "-o", "size=400M", "none")
        path = os.path.join(store, "device")
        release.img("create", "-q", "-f", "qcow2", "-o", "preallocation=full", path, "64M")
        first = os.path.getsize(path)
        os.truncate(path, 1024 * MIB)
        device = self.loop_device(path)

        def disks(qemu, folder):
            return [vm.Disk("d0", device, file={"driver": "host_device"})]

        # On an iothread 7.2 now and then hangs in `quit`.
        guest = self.make_vm(release, "microvm", plugin=True, disks=disks, iothread=False).start()
        self.assertGreater(first, 64 * MIB)
        filler = self.fill(store)
        process = self.start_save(guest, "half")
        since = self.assert_failed(process, "input/output error|no space")
        os.unlink(filler)
        self.assert_runs_within(guest, 1.0, since)
        self.assert_writes_go_on(guest)
        guest.check()
        guest.stop()
        guest.check_image(share=True)
        self.assertEqual(guest.snapshot_names(), [])
        guest.cont()
        # The store is mended.
        self.assert_sound(guest, "^$")
