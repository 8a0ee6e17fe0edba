"""Saves that write only what has changed since another one (--base), in the layout stream-aligned:
every QEMU loads them, RAM comes back byte for byte, and each outlives the others. The plugin reads
only what the kernel has seen written since the save before."""

import json
import random
import signal

import vm
from bed import BedTest, cases, need_kvm
from interrupted import SLOW, InterruptedTest

ALIGNED = ["--layout", "stream-aligned"]
ROWS = [("host", "pc", "plugin"), ("10.0", "q35", "attach"), ("10.0", "virt", "plugin"),
        ("newest", "pc", "attach"), ("newest", "microvm", "plugin"), ("newest", "virt", "attach")]
QUICK = [("host", "pc", "plugin"), ("10.0", "q35", "attach"), ("newest", "microvm", "plugin")]
FORMATS = ["cluster_size=512", "cluster_size=4k,compat=0.10", "cluster_size=128k",
           "cluster_size=2M", "refcount_bits=8", "cluster_size=64k,extended_l2=on"]


class AlignedTest(BedTest):
    def aligned_save(self, guest, name, *flags):
        report = self.save(guest, name, *flags)
        self.assertEqual(report["layout"], "stream-aligned")
        pages = report["data-pages"] + report["zero-pages"] + report["untouched-pages"]
        self.assertEqual(pages * 4096, report["ram-bytes"])
        if not guest.plugin:
            self.assertEqual((report["tracked-groups"], report["untracked"]), (0, ""))
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

    def load_hot(self, guest, name, state, seed=11):
        guest.stop()
        guest.loadvm(name)
        self.assert_same_state(state, guest.state())
        guest.cont()
        self.assert_seed(guest, seed)


class Incremental(AlignedTest):
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


TRACKED_ROWS = [("host", "microvm"), ("10.0", "q35"), ("newest", "pc"), ("newest", "virt")]


class Tracked(AlignedTest, InterruptedTest):
    """By the plugin. An ordinary save of the same moment, which reads all of RAM, is what each is
    compared with."""

    def setUp(self):
        super().setUp()
        self.pairs = {}  # names of snapshots that must not differ
        self.saves = 0

    def make_plugin_vm(self, qemu="newest", machine="microvm", **options):
        return self.make_vm(qemu, machine, plugin=True, **options).start()

    def compared_save(self, guest, name, *flags):
        """Of a guest that stands. Leaves it so."""
        report = self.aligned_save(guest, name, *flags)
        self.assertEqual(report["untracked"], "")
        self.pairs[name] = f"reference-{self.saves}"
        self.saves += 1
        self.save(guest, self.pairs[name])
        return report

    def tracked_save(self, guest, name, base, *flags):
        """Fails unless a good part of RAM is not read."""
        guest.stop()
        report = self.compared_save(guest, name, "--base", base, *flags)
        self.assertGreater(report["tracked-groups"], 500)
        self.assertGreater(report["read-groups"], 0)
        guest.cont()
        return report

    def untracked_save(self, guest, name, *flags):
        """Fails unless all of RAM is read."""
        guest.stop()
        report = self.compared_save(guest, name, *flags)
        self.assertEqual(report["tracked-groups"], 0)
        guest.cont()
        return report

    def compare(self, guest):
        guest.quit()
        guest.check_image()
        image = guest.disks[0].path
        for pair in self.pairs.items():
            with self.subTest(pair=pair):
                found = json.loads(self.tool("diff", image, *pair, "--format", "json"))
                self.assertEqual([block for block in found["ram-blocks"] if block["pages-differ"]], [])
        self.tool("check", image)

    @cases(*TRACKED_ROWS, quick=[("host", "microvm"), ("newest", "pc")])
    def test_some_in_a_row(self, qemu, machine):
        guest = self.make_plugin_vm(qemu, machine)
        self.go_on(guest)

    @cases("host", "newest", quick=["newest"])
    def test_kvm(self, qemu):
        need_kvm()
        self.go_on(self.make_plugin_vm(qemu, "q35", accel="kvm"))

    def go_on(self, guest):
        guest.fill(11)
        self.untracked_save(guest, "s0", *ALIGNED)
        for number in range(1, 4):
            if number == 2:
                guest.fill(22)  # writes to all of its arena
            self.assert_writes_go_on(guest)
            self.tracked_save(guest, f"s{number}", f"s{number - 1}")
        # Any base will do, and the snapshot of the save before may be gone.
        guest.delvm("s3")
        del self.pairs["s3"]
        self.assert_writes_go_on(guest)
        self.tracked_save(guest, "s4", "s2")
        self.assert_writes_go_on(guest)
        guest.stop()
        self.compared_save(guest, "s5", "--base", "s4")
        state = guest.state()
        guest.cont()
        self.load_hot(guest, "s5", state, seed=22)
        self.compare(guest)
        guest.start(loadvm="s5", paused=True)
        self.assert_same_state(state, guest.state())
        guest.cont()
        self.assert_seed(guest, 22)

    def test_replaced_by_itself(self):
        guest = self.make_plugin_vm()
        guest.fill(11)
        self.untracked_save(guest, "same", *ALIGNED)
        for _ in range(4):
            self.assert_writes_go_on(guest)
            self.tracked_save(guest, "same", "same", "--replace")
        self.compare(guest)

    def test_loads_are_writes(self):
        guest = self.make_plugin_vm()
        guest.fill(11)
        self.untracked_save(guest, "one", *ALIGNED)
        guest.fill(22)
        self.tracked_save(guest, "two", "one")
        guest.loadvm("one")
        self.assert_seed(guest, 11)
        guest.stop()
        self.compared_save(guest, "three", "--base", "two")
        state = guest.state()
        guest.cont()
        guest.loadvm("two")
        self.assert_seed(guest, 22)
        self.load_hot(guest, "three", state)
        self.compare(guest)

    def test_live_in_between(self):
        """It takes RAM over, so that the next save has to read it all."""
        guest = self.make_plugin_vm(second_block=False)
        guest.fill(11)
        self.untracked_save(guest, "one", *ALIGNED)
        self.assert_writes_go_on(guest)
        self.tracked_save(guest, "two", "one")
        self.save(guest, "live", "--live")
        self.assert_writes_go_on(guest)
        self.untracked_save(guest, "three", "--base", "two")
        self.assert_writes_go_on(guest)
        self.tracked_save(guest, "four", "three")
        self.compare(guest)

    def test_cancelled(self):
        """What a save has found out that does not come to its end is not believed."""
        guest = self.make_plugin_vm()
        guest.fill(11)
        self.untracked_save(guest, "one", *ALIGNED)
        guest.fill(22)
        process = self.start_save(guest, "cancelled", "--base", "one", *SLOW)
        self.wait_stopped(guest, process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        self.assertEqual(process.returncode, 1, errors)
        self.untracked_save(guest, "two", "--base", "one")
        self.assert_writes_go_on(guest)
        self.tracked_save(guest, "three", "two")
        self.compare(guest)

    @cases("memfd-shared", "file-private", quick=["memfd-shared"])
    def test_memory_that_cannot_be(self, memory):
        guest = self.make_plugin_vm(memory=memory)
        guest.fill(11)
        report = self.aligned_save(guest, "one", *ALIGNED)
        self.assertIn("mem0", report["untracked"])
        self.assertEqual("shared" in report["untracked"], memory == "memfd-shared")
        self.assert_writes_go_on(guest)
        line = self.tool(*self.save_args(guest, "two", "--base", "one"))
        self.assertRegex(line, r"shared with 'one', \d+ read \(RAM block 'mem0'")
        guest.fill(22)
        guest.loadvm("two")
        self.assert_seed(guest, 11)
