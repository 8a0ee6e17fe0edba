"""Saves while the guest runs on: what is saved is the state at the first pause, however much the guest
writes meanwhile; what is cut short leaves a snapshot that QEMU takes for one of the disk, and that the
next command removes."""

import json
import os
import signal
import time

from bed import cases
from interrupted import SLOW, InterruptedTest, rounds
from qmp import QmpError

ROWS = [("host", "pc"), ("host", "microvm"), ("10.0", "q35"), ("newest", "pc"), ("newest", "virt")]
QUICK = [("host", "microvm"), ("newest", "pc")]


class Live(InterruptedTest):
    def make_live_vm(self, qemu="newest", machine="microvm", **options):
        """Without a DIMM, whose memory could be unplugged while it is read."""
        return self.make_vm(qemu, machine, plugin=True, second_block=False, **options)

    def names(self, guest):
        return guest.snapshot_names(guest.disks[0].path)

    def start_live(self, guest, name, *flags):
        """A slow save, up to where the images are QEMU's again and RAM is being copied."""
        process = self.start_save(guest, name, "--live", *SLOW, *flags)
        begun = None  # allocated bytes when the clusters were reserved

        def is_copying():
            nonlocal begun
            allocated = os.stat(guest.disks[0].path).st_blocks * 512
            if begun is None and name + ".saving" in self.names(guest):
                begun = allocated
            return process.poll() is not None or (begun and allocated > begun + (4 << 20))

        self.wait_until(is_copying, 60, "the save does not begin")
        self.assertIsNone(process.poll(), "the save ended too early")
        return process

    def end_save(self, process):
        out, errors = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 0, errors + out)
        return out

    @cases(*ROWS, quick=QUICK)
    def test_state_is_that_of_the_pause(self, qemu, machine):
        """RAM byte by byte: an ordinary save of the same moment is what it is compared with. The guest
        stands when the save begins and is let run as soon as the copying has begun."""
        guest = self.make_live_vm(qemu, machine).start()
        guest.fill(11)
        guest.stop()
        self.save(guest, "reference")
        process = self.start_live(guest, "live", "--format", "json", "--quiet")
        guest.cont()
        guest.fill(22)  # writes to all of its arena
        self.assert_writes_go_on(guest)
        report = json.loads(self.end_save(process).strip().splitlines()[-1])
        self.assertGreater(report["writes-served"], 10)
        self.assertFalse(report["was-running"])
        self.assertEqual(guest.status(), "running")
        self.assert_images_active(guest)
        self.assert_seed(guest, 22)
        self.assertEqual(self.names(guest), ["reference", "live"])
        guest.stop()
        guest.loadvm("reference")
        expected = guest.state()
        guest.cont()  # aarch64 QEMU 11.1 crashes in it after two loads, of its own savevm as well
        guest.stop()
        guest.loadvm("live")
        self.assert_same_state(expected, guest.state())
        guest.cont()
        self.assert_seed(guest, 11)
        self.assert_writes_go_on(guest)
        guest.quit()
        guest.check_image()
        for disk in guest.disks:
            self.tool("check", disk.path)
        guest.start(loadvm="live", paused=True)
        self.assert_same_state(expected, guest.state())
        guest.cont()
        self.assert_seed(guest, 11)
        guest.quit()
        guest.check_image()

    @cases("host", "newest", quick=["newest"])
    def test_five_in_a_row(self, qemu):
        """Under the writes of the guest, which checks all of its memory and disks after each load."""
        guest = self.make_live_vm(qemu).start()
        for seed in range(5):
            guest.fill(seed)
            report = self.save(guest, f"s{seed % 3}", "--live", "--replace")
            self.assertTrue(report["was-running"])
            self.assertEqual(len(report["pauses-seconds"]), 2)
            self.assertEqual(report["pause-seconds"], max(report["pauses-seconds"]))
            self.assert_writes_go_on(guest)
            self.assert_image_sound(guest)
        self.assertEqual(sorted(self.names(guest)), ["s0", "s1", "s2"])
        for name, seed in (("s1", 4), ("s0", 3), ("s2", 2)):
            guest.loadvm(name)
            self.assert_seed(guest, seed)
        sizes = [os.path.getsize(disk.path) for disk in guest.disks]
        for seed in range(5, 8):
            self.save(guest, f"s{seed % 3}", "--live", "--replace")
        for disk, size in zip(guest.disks, sizes):
            self.assertLess(os.path.getsize(disk.path), 2 * size)
        guest.quit()
        guest.check_image()

    def test_other_commands_wait(self):
        guest = self.make_live_vm().start()
        process = self.start_live(guest, "one")
        self.refused(["delete", "one.saving", "--qmp", guest.tool_socket], "going on")
        with self.assertRaises(QmpError):
            guest.loadvm("one.saving")
        guest.cont()  # QEMU has stopped it before it looked
        self.end_save(process)
        guest.fill(22)
        guest.loadvm("one")
        self.assert_writes_go_on(guest)
        guest.quit()
        guest.check_image()

    def test_cancelled(self):
        """With --replace: the old snapshot of that name stays."""
        guest = self.make_live_vm().start()
        guest.fill(7)
        self.save(guest, "k")
        guest.fill(8)
        process = self.start_live(guest, "k", "--replace")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        self.assertEqual(process.returncode, 1, errors)
        self.assertRegex(errors.lower(), "cancel")
        self.assertEqual(guest.status(), "running")
        self.assert_images_active(guest)
        self.assert_image_sound(guest)
        self.assertEqual(self.names(guest), ["k"])
        self.assert_seed(guest, 8)
        guest.loadvm("k")
        self.assert_seed(guest, 7)
        self.assert_sound(guest, "^k$")

    def test_reservation_deleted(self):
        """QEMU's allocator may give the clusters to the disk then: the copying stops at once."""
        guest = self.make_live_vm().start()
        guest.fill(7)
        process = self.start_live(guest, "k")
        guest.delvm("k.saving")
        out, errors = process.communicate(timeout=30)
        self.assertEqual(process.returncode, 1, errors + out)
        self.assertIn("'k.saving' that held the place of 'k' was deleted", errors)
        self.assertEqual(self.names(guest), [])
        self.assert_images_active(guest)
        self.assert_image_sound(guest)
        self.assert_seed(guest, 7)
        self.assert_sound(guest, "^$")

    @cases(("kill", "next save"), ("kill", "delvm"), ("kill", "qemu-img"), ("quit", "next save"),
           quick=[("kill", "next save"), ("quit", "next save")])
    def test_qemu_ends(self, end, way):
        """What is left is clean, is refused by loadvm, and goes with the next command, or QEMU's."""
        guest = self.make_live_vm().start()
        guest.fill(7)
        self.save(guest, "k")
        process = self.start_live(guest, "k", "--replace")
        guest.stop()  # a QEMU that is killed while it writes leaks clusters of its own
        if end == "quit":
            guest.quit()
            self.assertEqual(guest.process.returncode, 0)
        else:
            guest.kill()
        _, errors = process.communicate(timeout=20)
        self.assertEqual(process.returncode, 1, errors)
        guest.check_image()
        for disk in guest.disks:
            self.assertEqual(guest.snapshot_names(disk.path), ["k", "k.saving"])
            self.tool("check", disk.path)
        if way == "qemu-img":
            for disk in guest.disks:
                guest.qemu.img("snapshot", "-d", "k.saving", guest.qemu.inner(disk.path))
            guest.check_image()
        guest.start(loadvm="k")
        self.assert_seed(guest, 7)
        if way != "qemu-img":
            with self.assertRaises(QmpError):
                guest.loadvm("k.saving")
            guest.cont()
        if way == "delvm":
            guest.delvm("k.saving")
        elif way == "next save":
            self.save(guest, "new", "--live")
        self.assertNotIn("k.saving", self.names(guest))
        self.assert_image_sound(guest)
        self.assert_sound(guest, "^(k|new)$")

    def start_at_random_moment(self, guest, chance):
        """A save of between one second and two, up to some moment of it; the first pause is early."""
        process = self.start_save(guest, "k", "--live", "--replace", "--limit-rate", "80M")
        time.sleep(chance.random() * (0.4 if chance.random() < 0.5 else 2.5))
        return process

    def test_client_killed_at_random_moments(self):
        """What loads is the last save that came to its end, or this one; nothing else is left."""
        guest = self.make_live_vm().start()
        guest.fill(7)
        self.save(guest, "k")
        random_seed, chance = self.random_moments()
        possible = {7}
        for i in range(rounds(4, 40)):
            with self.subTest(random_seed=random_seed, round=i):
                guest.fill(100 + i)
                possible.add(100 + i)
                process = self.start_at_random_moment(guest, chance)
                process.kill()
                process.communicate()
                time.sleep(0.3)  # until the plugin has seen it
                self.wait_until(lambda: not guest.qmp.execute("query-fdsets"), 5,
                                "the save is neither finished nor undone")
                self.assertEqual(guest.status(), "running")
                self.assertEqual(self.names(guest), ["k"])
                self.assert_images_active(guest)
                self.assert_writes_go_on(guest)
                self.assert_image_sound(guest)
                if i % 4 == 3:
                    guest.loadvm("k")
                    seed = guest.check()["seed"]
                    self.assertIn(seed, possible)
                    possible = {seed}
        self.assert_sound(guest, "^k$")

    def test_qemu_killed_at_random_moments(self):
        """The guest stands, so that nothing is left half done but what the save does."""
        guest = self.make_live_vm().start()
        guest.fill(7)
        self.save(guest, "k")
        random_seed, chance = self.random_moments()
        possible = {7}
        for i in range(rounds(2, 20)):
            with self.subTest(random_seed=random_seed, round=i):
                guest.fill(100 + i)
                possible.add(100 + i)
                guest.stop()
                process = self.start_at_random_moment(guest, chance)
                guest.kill()
                process.communicate(timeout=20)
                guest.check_image()
                for disk in guest.disks:
                    self.assertLessEqual(set(guest.snapshot_names(disk.path)), {"k", "k.saving"})
                guest.start(loadvm="k")
                seed = guest.check()["seed"]
                self.assertIn(seed, possible)
                possible = {seed}
        self.assert_sound(guest, "^k$")

    def test_refusals(self):
        """Before the guest is stopped."""
        guest = self.make_live_vm().start()
        self.refused(["save", "x", "--live", "--qmp", guest.tool_socket], "--live", "plugin")
        self.refused(self.save_args(guest, "x", "--live", "--direct", "on"), "page cache")
        for options in ({"memory": "memfd-shared"}, {"memory": "file-private"}):
            other = self.make_live_vm(**options).start()
            line = self.refused(self.save_args(other, "x", "--live"), "mem0", "without --live")
            self.assertEqual("shared" in line, options["memory"] == "memfd-shared")
            self.assertNotIn("STOP", [event["event"] for event in other.qmp.events])
            other.kill()
        with_dimm = self.make_vm("newest", "pc", plugin=True).start()
        self.refused(self.save_args(with_dimm, "x", "--live"), "dimm0", "without --live")
        self.assert_writes_go_on(with_dimm)
