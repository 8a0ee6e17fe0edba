"""Snapshots in the mapped-ram layout: QEMU 11.1 loads them once its capability says so, `qvmstate
load` sees to that, and RAM comes back byte for byte, also where a stale page could stay."""

import json
import os
import signal
import subprocess
import time

import mapped
import vm
from bed import BedTest, cases, full_only
from qmp import QmpError

MAPPED = ["--layout", "mapped-ram"]
STALE = b"\xa5"


class MappedRam(BedTest):
    def mapped_save(self, guest, name, *flags):
        report = self.save(guest, name, *MAPPED, *flags)
        self.assertEqual(report["layout"], "mapped-ram")
        if guest.plugin:
            self.assertEqual(report["copied-bytes"], 0)
        return report

    def load(self, guest, name):
        """By the command, which leaves the capabilities as they are."""
        before = mapped.capabilities(guest)
        self.tool("load", name, "--qmp", guest.tool_socket)
        self.assertEqual(mapped.capabilities(guest), before)

    def load_cold(self, guest, name, state=None, seed=11):
        with mapped.cold_capability(guest):
            guest.start(loadvm=name, paused=True)
        if state is not None:
            self.assert_same_state(state, guest.state())
        guest.cont()
        self.assert_seed(guest, seed)
        self.assert_writes_go_on(guest)
        guest.quit()
        guest.check_image()

    def main_block(self, guest):
        return max(guest.ram_blocks(), key=lambda block: block[1])[0]

    def load_into_running(self, guest, name, state):
        """Into a guest that runs on at once, so only most of its memory can be compared: no page may
        have kept what was put there before."""
        block = self.main_block(guest)
        guest.stop()
        stale = mapped.overwrite_zero_pages(guest, state, block)
        guest.cont()
        self.load(guest, name)
        guest.stop()
        pairs = zip(state.pieces[f"block {block}"].sums, guest.state().pieces[f"block {block}"].sums)
        kept = sum(was == vm.ZERO_PAGE != now for was, now in pairs)
        self.assertLess(kept, stale // 10, "stale pages")
        guest.cont()
        self.assert_seed(guest, 11)
        self.assert_writes_go_on(guest)

    @cases(*[(machine, how) for machine in vm.MACHINES for how in ("plugin", "attach")],
           quick=[("q35", "plugin"), ("virt", "attach")])
    def test_save_load(self, machine, how):
        guest = self.make_vm("newest", machine, plugin=how == "plugin").start()
        guest.fill(11)
        report = self.mapped_save(guest, "run1")
        self.assertTrue(report["was-running"])
        self.assertEqual(guest.status(), "running")
        self.assert_images_active(guest)
        self.assert_writes_go_on(guest)
        guest.stop()
        self.mapped_save(guest, "p1")
        self.assertEqual(guest.status(), "paused")
        self.assert_images_active(guest)
        state = guest.state()
        guest.cont()
        guest.fill(22)
        guest.stop()
        for name, _, _ in guest.ram_blocks():
            mapped.overwrite_zero_pages(guest, state, name)
        self.load(guest, "p1")
        self.assertNotEqual(guest.status(), "running")
        self.assert_same_state(state, guest.state())
        guest.cont()
        self.assert_seed(guest, 11)
        guest.fill(33)
        # Whatever the capabilities are when it starts.
        mapped.set_capabilities(guest, multifd=True)
        self.load_into_running(guest, "p1", state)
        mapped.set_capabilities(guest, multifd=False)
        guest.quit()
        guest.check_image()
        self.assertEqual(self.info_layout(guest.disks[0].path, "p1"), "mapped-ram")
        self.assert_extracts(state, guest.disks[0].path, "p1")
        self.load_cold(guest, "p1", state)
        self.load_cold(guest, "run1")
        guest.start()
        for name in ("run1", "p1"):
            guest.delvm(name)
        guest.quit()
        guest.check_image()

    def test_layouts_mixed(self):
        """`load` sets the capability as each snapshot needs it, and QEMU's own `loadvm` refuses
        where it is off; that has reset the VM by then, as always, and a load brings it back."""
        guest = self.make_vm("newest", "microvm").start()
        guest.fill(11)
        self.mapped_save(guest, "mapped")
        guest.fill(22)
        self.assertEqual(self.save(guest, "legacy", "--layout", "legacy")["layout"], "legacy")
        guest.fill(33)
        with self.assertRaisesRegex(QmpError, "mapped-ram"):
            guest.loadvm("mapped")
        self.assertTrue(guest.alive())
        guest.cont()
        for capability in (False, True):
            mapped.set_capabilities(guest, mapped_ram=capability)
            for name, seed in (("mapped", 11), ("legacy", 22)):
                self.load(guest, name)
                self.assert_seed(guest, seed)
        guest.loadvm("mapped")
        self.assert_seed(guest, 11)
        guest.quit()
        guest.check_image()

    @cases("cluster_size=512", "cluster_size=512,compat=0.10", "cluster_size=4k",
           "cluster_size=4k,compat=0.10", "compat=0.10", "cluster_size=2M",
           "cluster_size=2M,compat=0.10", "refcount_bits=8",
           quick=["cluster_size=512,compat=0.10"])
    def test_formats(self, options):
        guest = self.make_vm("newest", "microvm",
                             disks=lambda qemu, folder: vm.make_disks(qemu, folder,
                                                                      options=options)).start()
        self.round_trip(guest)

    def round_trip(self, guest):
        guest.fill(11)
        guest.stop()
        self.mapped_save(guest, "one")
        state = guest.state()
        guest.cont()
        self.assert_writes_go_on(guest)
        guest.fill(22)
        guest.stop()
        mapped.overwrite_zero_pages(guest, state, self.main_block(guest))
        self.load(guest, "one")
        self.assert_same_state(state, guest.state())
        guest.cont()
        self.assert_seed(guest, 11)
        guest.quit()
        guest.check_image()
        self.load_cold(guest, "one", state)
        self.tool("delete", "one", *[disk.path for disk in guest.disks])
        guest.check_image()
        return state

    @cases("", "compat=0.10", "cluster_size=4k", quick=[])
    def test_backing_file(self, options):
        """An overlay over a larger base, of which nothing may show in the state."""
        def disks(qemu, folder):
            base = os.path.join(folder, "base.raw")
            with open(base, "wb") as file:
                for _ in range(512):
                    file.write(STALE * (1 << 20))
            out = []
            for name in ("d0", "d1"):
                path = os.path.join(folder, name + ".qcow2")
                qemu.img("create", "-q", "-f", "qcow2", "-b", qemu.inner(base), "-F", "raw",
                         *(["-o", options] if options else []), qemu.inner(path), "64M")
                out.append(vm.Disk(name, path))
            return out

        self.round_trip(self.make_vm("newest", "microvm", disks=disks).start())

    @cases(("pc", "main"), ("pc", "dimm"), ("pc", "round"), ("microvm", "main"), ("virt", "main"),
           quick=[])
    def test_odd_sizes(self, machine, size):
        guest = self.make_vm("newest", machine, plugin=size == "dimm")
        mapped.set_odd_memory(guest, size)
        self.round_trip(guest.start())

    @full_only
    def test_sparse_bitmap(self):
        """Zero pages are not stored: enough for a guest that runs when it is loaded."""
        guest = self.make_vm("newest", "microvm").start()
        guest.fill(11)
        guest.stop()
        self.mapped_save(guest, "sparse", "--sparse-bitmap")
        state = guest.state()
        guest.cont()
        guest.fill(22)
        self.load_into_running(guest, "sparse", state)
        guest.quit()
        guest.check_image()
        self.assert_extracts(state, guest.disks[0].path, "sparse")

    @cases("microvm", "pc", "virt", quick=[])
    def test_by_qemu_itself(self, machine):
        """What QEMU's own savevm writes in this layout is read, and loaded by the command."""
        guest = self.make_vm("newest", machine).start()
        guest.fill(11)
        guest.stop()
        mapped.set_capabilities(guest, mapped_ram=True)
        guest.savevm("own")
        mapped.set_capabilities(guest, mapped_ram=False)
        state = guest.state()
        guest.cont()
        guest.fill(22)
        self.load_into_running(guest, "own", state)
        guest.quit()
        self.assertEqual(self.info_layout(guest.disks[0].path, "own"), "mapped-ram")
        self.assert_extracts(state, guest.disks[0].path, "own")

    @cases("10.0", "newest", quick=["10.0"])
    def test_legacy_by_qemu_itself(self, qemu):
        guest = self.make_vm(qemu, "pc").start()
        guest.fill(11)
        guest.stop()
        guest.savevm("own")
        state = guest.state()
        guest.quit()
        self.assertEqual(self.info_layout(guest.disks[0].path, "own"), "legacy")
        self.assert_extracts(state, guest.disks[0].path, "own")

    @cases(*[(how, options) for how in ("plugin", "attach")
             for options in ("cluster_size=64k", "cluster_size=4k", "cluster_size=2M")],
           quick=[])
    def test_zero_pages_take_no_space(self, how, options):
        """The image grows by the clusters that hold a page that is not zero."""
        guest = self.make_vm("newest", "microvm", plugin=how == "plugin",
                             disks=lambda qemu, folder: vm.make_disks(qemu, folder,
                                                                      options=options))
        guest.memory_options = ["-m", "1G"]
        guest.kernel_options = "qvm.mem=8"
        guest.start()
        guest.stop()
        before = os.stat(guest.disks[0].path).st_blocks * 512
        self.mapped_save(guest, "one")
        grown = os.stat(guest.disks[0].path).st_blocks * 512 - before
        state = guest.state()
        guest.quit()
        info = json.loads(guest.qemu.img("info", "--output=json",
                                         guest.qemu.inner(guest.disks[0].path)).stdout)
        self.assertLess(grown, mapped.used_bytes(state, info["cluster-size"]) + (8 << 20))
        guest.check_image()

    @full_only
    def test_killed(self):
        """The attaching saver is killed in the middle: the guardian brings the guest back, and the
        image is as it was."""
        guest = self.make_vm("newest", "microvm").start()
        for delay in (0.3, 1.0, 2.0):
            process = subprocess.Popen(
                [self.built("qvmstate"),
                 *self.save_args(guest, "half", *MAPPED, "--limit-rate", "40M")],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            deadline = time.monotonic() + 30
            while guest.status() == "running":
                self.assertIsNone(process.poll(), "the save ended before it stopped the guest")
                self.assertLess(time.monotonic(), deadline, "the save does not stop the guest")
                time.sleep(0.002)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            since = time.monotonic()
            process.communicate()
            while guest.status() != "running":
                self.assertLess(time.monotonic() - since, 1.0, f"still {guest.status()}")
                time.sleep(0.01)
            self.assert_writes_go_on(guest)
        self.assertEqual(guest.snapshot_names(), [])
        self.round_trip(guest)
