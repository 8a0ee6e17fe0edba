"""Saves that write only what has changed since another one (--base), in the layout stream-aligned:
every QEMU loads them, RAM comes back byte for byte, and each outlives the others."""

import json
import random

import vm
from bed import BedTest, cases

ALIGNED = ["--layout", "stream-aligned"]
ROWS = [("host", "pc", "plugin"), ("10.0", "q35", "attach"), ("10.0", "virt", "plugin"),
        ("newest", "pc", "attach"), ("newest", "microvm", "plugin"), ("newest", "virt", "attach")]
QUICK = [("host", "pc", "plugin"), ("10.0", "q35", "attach"), ("newest", "microvm", "plugin")]
FORMATS = ["cluster_size=512", "cluster_size=4k,compat=0.10", "cluster_size=128k",
           "cluster_size=2M", "refcount_bits=8", "cluster_size=64k,extended_l2=on"]


class Incremental(BedTest):
    def aligned_save(self, guest, name, *flags):
        report = self.save(guest, name, *flags)
        self.assertEqual(report["layout"], "stream-aligned")
        pages = report["data-pages"] + report["zero-pages"] + report["untouched-pages"]
        self.assertEqual(pages * 4096, report["ram-bytes"])
        return report

    def save_on_base(self, guest, name, base, *flags):
        """Fails unless little more is written than the groups that are not shared."""
        report = self.aligned_save(guest, name, "--base", base, *flags)
        self.assertEqual(report["base"], base)
        self.assertGreater(report["shared-groups"], 0)
        metadata = sum(disk["metadata-bytes"] for disk in report["disks"])
        zero_records = 9 * (report["zero-pages"] + report["untouched-pages"])
        groups = report["written-groups"] + 3  # with the head, the devices and what is kept
        self.assertLess(report["written-bytes"] - metadata,
                        groups * report["group-bytes"] + zero_records + (2 << 20))
        return report

    def states(self, guest):
        """Two snapshots, one on the other, and what each must bring back."""
        guest.fill(11)
        guest.stop()
        first = self.aligned_save(guest, "one", *ALIGNED)
        self.assertEqual((first["base"], first["shared-groups"]), ("", 0))
        one = guest.state()
        guest.cont()
        self.assert_writes_go_on(guest)
        guest.stop()
        self.save_on_base(guest, "two", "one")
        two = guest.state()
        self.assertNotEqual(one.differences(two), [])
        guest.cont()
        return {"one": one, "two": two}

    def load_hot(self, guest, name, state):
        guest.stop()
        guest.loadvm(name)
        self.assert_same_state(state, guest.state())
        guest.cont()
        self.assert_seed(guest, 11)

    def load_cold(self, guest, name, state=None):
        guest.start(loadvm=name, paused=True)
        if state is not None:
            self.assert_same_state(state, guest.state())
        guest.cont()
        self.assert_seed(guest, 11)
        self.assert_writes_go_on(guest)
        guest.quit()
        guest.check_image()

    def go_through_all(self, guest):
        states = self.states(guest)
        guest.fill(22)
        for name, state in states.items():
            self.load_hot(guest, name, state)
        guest.quit()
        guest.check_image()
        image = guest.disks[0].path
        for name, state in states.items():
            self.assertEqual(self.info_layout(image, name), "legacy")
            if guest.qemu.version >= (8,):  # before, it does not tell where its blocks are
                self.assert_extracts(state, image, name)
            self.load_cold(guest, name, state)
        self.tool("check", image, "--independent")
        guest.qemu.img("snapshot", "-d", "one", guest.qemu.inner(image))
        guest.check_image(image)
        guest.qemu.img("snapshot", "-d", "one", guest.qemu.inner(guest.disks[1].path))
        self.load_cold(guest, "two", states["two"])
        self.tool("check", image)
        self.tool("delete", "two", *[disk.path for disk in guest.disks])
        guest.check_image()

    @cases(*ROWS, quick=QUICK)
    def test_save_load(self, qemu, machine, how):
        self.go_through_all(self.make_vm(qemu, machine, plugin=how == "plugin").start())

    @cases(*FORMATS, quick=["cluster_size=4k,compat=0.10", "cluster_size=2M"])
    def test_formats(self, options):
        if "extended_l2" in options:
            guest = self.make_with("newest", options)
            guest.fill(11)
            guest.stop()
            self.aligned_save(guest, "one", *ALIGNED)
            self.save_on_base(guest, "two", "one")
            state = guest.state()
            self.load_hot(guest, "two", state)
            guest.quit()
            guest.check_image()
            return
        self.go_through_all(self.make_with("newest", options))

    def make_with(self, qemu, options, **disks):
        return self.make_vm(qemu, "microvm", disks=lambda release, folder: vm.make_disks(
            release, folder, options=options, **disks)).start()

    def test_narrow_refcounts(self):
        """Counts of two bits: what cannot be counted once more is written anew."""
        # One disk: the second of two has the old and the new snapshot for a moment, which these
        # counts do not allow.
        guest = self.make_with("newest", "refcount_bits=2", names=("d0",))
        guest.fill(11)
        guest.stop()
        self.aligned_save(guest, "one", *ALIGNED)
        # The disk's own clusters allow one snapshot, so the next takes the place of the first.
        report = self.aligned_save(guest, "one", "--base", "one", "--replace")
        state = guest.state()
        self.assertGreater(report["shared-groups"], 0)
        self.load_hot(guest, "one", state)
        guest.quit()
        guest.check_image()

    @cases("plugin", "attach", quick=["attach"])
    def test_replace_the_base(self, how):
        """Over and over on itself, with QEMU's own saves and loads in between."""
        guest = self.make_vm("newest", "microvm", plugin=how == "plugin").start()
        guest.fill(11)
        self.aligned_save(guest, "same", *ALIGNED)
        for number in range(5):
            self.assert_writes_go_on(guest)
            guest.stop()
            self.save_on_base(guest, "same", "same", "--replace")
            state = guest.state()
            guest.check_image(share=True)
            guest.cont()
            if number % 2:
                guest.savevm("own")
            self.load_hot(guest, "same", state)
        guest.quit()
        guest.check_image()
        self.load_cold(guest, "same", state)

    def test_refusals(self):
        guest = self.make_vm("newest", "microvm").start()
        guest.fill(11)
        self.save(guest, "plain")
        guest.savevm("own")
        for base in ("plain", "own"):
            self.refused(self.save_args(guest, "two", "--base", base), base,
                         "--layout stream-aligned")
        self.refused(self.save_args(guest, "two", "--base", "none"), "none", "--base")
        self.assertEqual(guest.status(), "running")
        # A state written anew is no base any more.
        self.aligned_save(guest, "one", *ALIGNED)
        guest.quit()
        self.tool("convert", guest.disks[0].path, "one", "--layout", "legacy")
        guest.check_image()
        guest.start(loadvm="one")
        self.refused(self.save_args(guest, "two", "--base", "one"), "--layout stream-aligned")
        self.assert_writes_go_on(guest)

    def test_converted(self):
        """Compressed and plain again, exported and imported: the same state."""
        guest = self.make_vm("newest", "microvm").start()
        state = self.states(guest)["two"]
        guest.quit()
        image = guest.disks[0].path
        self.tool("convert", image, "two", "--compress")
        self.tool("check", image)
        self.assert_extracts(state, image, "two")
        self.tool("convert", image, "two", "--layout", "mapped-ram")
        self.assert_extracts(state, image, "two")
        differing = json.loads(self.tool("diff", image, "one", "two", "--format", "json"))
        self.assertGreater(sum(block["pages-differ"] for block in differing["ram-blocks"]), 0)
        guest.check_image()
        self.load_cold(guest, "one")

    @cases(("newest", "attach", 100), ("host", "plugin", 100), ("newest", "attach", 12),
           quick=[("newest", "attach", 12)])
    def test_many(self, qemu, how, count):
        """A chain of saves, each on the one before, deleted in any order by ours and by QEMU, with
        a check after each; what is left loads."""
        guest = self.make_vm(qemu, "microvm", plugin=how == "plugin").start()
        chance = random.Random(count)
        self.aligned_save(guest, "s0", *ALIGNED)
        seeds = {"s0": guest.check()["seed"]}
        for number in range(1, count):
            if number % 10 == 0:
                guest.fill(1000 + number)
            self.aligned_save(guest, f"s{number}", "--base", f"s{number - 1}")
            seeds[f"s{number}"] = guest.check()["seed"]
        order = list(seeds)
        chance.shuffle(order)
        for name in order:
            with self.subTest(name=name):
                guest.loadvm(name)
                self.assert_seed(guest, seeds[name])
                self.assert_writes_go_on(guest)
                if chance.random() < 0.5:
                    guest.delvm(name)
                else:
                    self.tool("delete", name, "--qmp", guest.tool_socket)
                guest.stop()
                guest.check_image(share=True)
                guest.cont()
        guest.quit()
        guest.check_image()
        self.assertEqual(guest.snapshot_names(), [])
