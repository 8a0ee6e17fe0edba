"""Single writes fail, at any place of a save, a delete or a conversion, on a file system made for it:
what was to be done is reported and undone, or whole; the guest runs on; older snapshots load."""

import hashlib
import random

import bed
import vm
from bed import cases
from faulty import FaultyFolder
from interrupted import InterruptedTest

ERRORS = {"eio": "input/output error", "enospc": "no space"}


class FailingWrites(InterruptedTest):
    def setUp(self):
        super().setUp()
        self.faulty = FaultyFolder(self)
        self.random_seed = random.randrange(1 << 32)
        self.chance = random.Random(self.random_seed)
        self.failed = 0

    def make_guest(self, **options):
        return self.make_vm("newest", "microvm",
                            disks=lambda qemu, folder: vm.make_disks(qemu, self.faulty.path), **options)

    def places(self, writes, quick, full):
        """(error, writes before it), the last write always among them."""
        for kind in ERRORS:
            count = min(writes, quick if bed.Settings.quick else full)
            for skip in sorted({*self.chance.sample(range(writes), count), writes - 1}):
                yield kind, skip

    def run_with_fault(self, kind, skip, arguments):
        """Whether it failed, and then for this reason. (An operation does not always write as many
        times: at the last places it may be through.)"""
        with self.faulty.faults(kind, skip):
            done = self.run_tool(*arguments)
        if done.returncode == 0:
            return False
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertRegex(done.stderr.lower(), ERRORS[kind])
        self.failed += 1
        return True

    def assert_goes_on(self, guest, *names):
        """The guest runs, and each image has these names after the next command."""
        self.assertEqual(guest.status(), "running")
        self.assert_images_active(guest)
        self.assert_image_sound(guest)
        self.save(guest, "next", "--replace")
        self.assert_image_sound(guest)
        for disk in guest.disks:
            self.assertEqual(sorted(guest.snapshot_names(disk.path)), sorted([*names, "next"]))

    @cases("attach", "plugin")
    def test_save_and_delete(self, how):
        guest = self.make_guest(plugin=how == "plugin").start()
        guest.fill(7)
        self.save(guest, "before")
        guest.ask("pause-writes")  # or they would be the ones that fail
        save = self.save_args(guest, "k", "--replace")
        delete = ["delete", "k", "--qmp", guest.tool_socket]
        stored = seed = 7
        for kind, skip in self.places(self.faulty.writes_of(lambda: self.tool(*save)), 2, 25):
            with self.subTest(random_seed=self.random_seed, what="save", kind=kind, skip=skip):
                seed += 1
                guest.fill(seed)
                failed = self.run_with_fault(kind, skip, save)
                self.assert_goes_on(guest, "before", "k")
                guest.loadvm("k")
                found = guest.check()["seed"]
                # Over two images an interrupted save may have been finished by the next command.
                self.assertIn(found, {seed, stored} if failed else {seed})
                stored = found
        for kind, skip in self.places(self.faulty.writes_of(lambda: self.tool(*delete)), 2, 25):
            with self.subTest(random_seed=self.random_seed, what="delete", kind=kind, skip=skip):
                self.tool(*save)
                if self.run_with_fault(kind, skip, delete):
                    self.assertEqual(guest.status(), "running")
                    self.assert_image_sound(guest)
                    # The disk with the VM state is the first to lose it, so `loadvm k` refuses then.
                    left = ["k" in guest.snapshot_names(disk.path) for disk in guest.disks]
                    self.assertIn(left, [[True, True], [False, True], [False, False]])
                    if any(left):
                        self.tool(*delete)
                self.assert_goes_on(guest, "before")
        guest.fill(55)
        with self.faulty.faults("short", 0, 1 << 40):
            self.tool(*save)
        self.assert_image_sound(guest)
        print(f"        {self.failed} operations failed by a write", flush=True)
        self.assertGreater(self.failed, 4)
        guest.fill(66)
        guest.loadvm("k")
        self.assert_seed(guest, 55)
        guest.loadvm("before")
        self.assert_seed(guest, 7)
        self.assert_sound(guest, "^(before|k|next)$")

    def test_convert(self):
        guest = self.make_guest().start()
        guest.fill(7)
        self.save(guest, "before")
        guest.fill(8)
        self.save(guest, "k")
        guest.quit()
        path = guest.disks[0].path

        def fingerprints():
            out = {}
            for name in ("before", "k"):
                with open(self.extract(path, name, "--as", "raw"), "rb") as file:
                    out[name] = hashlib.file_digest(file, "sha256").hexdigest()
            return out

        def convert():
            other = {"legacy": "mapped-ram", "mapped-ram": "legacy"}[self.info_layout(path, "k")]
            return ["convert", path, "k", "--layout", other]

        expected = fingerprints()
        for kind, skip in self.places(self.faulty.writes_of(lambda: self.tool(*convert())), 3, 40):
            with self.subTest(random_seed=self.random_seed, kind=kind, skip=skip):
                self.run_with_fault(kind, skip, convert())
                guest.check_image()
                self.assertEqual(fingerprints(), expected)
        with self.faulty.faults("short", 0, 1 << 40):
            self.tool(*convert())
        guest.check_image()
        self.assertEqual(fingerprints(), expected)
        print(f"        {self.failed} conversions failed by a write", flush=True)
        self.assertGreater(self.failed, 4)
