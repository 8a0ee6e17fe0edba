"""Kinds of images and of what they lie on that need a QEMU to be seen: many snapshots of QEMU's own,
persistent bitmaps, block devices, storage without O_DIRECT."""

import json
import os
import stat
import subprocess
import time
import unittest

import vm
from bed import BedTest, cases, full_only
from qmp import QmpError


class Kinds(BedTest):
    def one_disk(self, qemu="newest", how="attach", disks=None, **disk_options):
        def plain(release, folder):
            return vm.make_disks(release, folder, ["d0"], **disk_options)

        return self.make_vm(qemu, "microvm", plugin=how == "plugin", disks=disks or plain)

    def assert_loads(self, guest, name, seed=11):
        """Hot and cold; the images are clean afterwards."""
        guest.fill(99)
        guest.loadvm(name)
        self.assert_seed(guest, seed)
        guest.quit()
        guest.check_image()
        guest.start(loadvm=name)
        self.assert_seed(guest, seed)
        self.assert_writes_go_on(guest)
        guest.quit()
        guest.check_image()

    @full_only
    def test_thousand_snapshots(self):
        """Of QEMU's own, with data that changed between; ours beside them, in little time."""
        guest = self.one_disk(cache={"no-flush": True}).start()
        names = [f"s{number}" for number in range(1000)]
        for name in names:
            guest.qmp.execute("blockdev-snapshot-internal-sync", device="d0", name=name)
        guest.fill(11)
        started = time.monotonic()
        report = self.save(guest, "ours")
        self.save(guest, "ours", "--replace")
        self.tool("delete", "s500", "--qmp", guest.tool_socket)
        self.assertLess(time.monotonic() - started, 60)
        self.assertLess(report["pause-seconds"], 20)
        names.remove("s500")
        self.assert_writes_go_on(guest)
        self.assertEqual(guest.snapshot_names(), [*names, "ours"])
        self.assert_loads(guest, "ours")
        image = guest.disks[0].path
        listed = json.loads(self.tool("list", image, "--format", "json"))
        self.assertEqual([snapshot["name"] for snapshot in listed], [*names, "ours"])
        report = json.loads(self.tool("check", image, "--format", "json"))
        self.assertEqual(report["result"], "clean")
        for name in ("ours", "s0", "s999"):
            self.tool("delete", name, image)
        guest.qemu.img("snapshot", "-a", "s1", guest.qemu.inner(image))
        guest.check_image()
        self.assertEqual(guest.snapshot_names(), names[1:-1])

    def assert_loads_mapped_ram(self, guest, name, seed):
        """Cold, by a QEMU that has to be told the layout, and by our command."""
        guest.start(paused=True)
        self.tool("load", name, "--qmp", guest.tool_socket)
        guest.cont()
        self.assert_seed(guest, seed)
        self.assert_writes_go_on(guest)
        guest.quit()
        guest.check_image()

    @cases("attach", "plugin", quick=["attach"])
    def test_extended_l2_mapped_ram(self, how):
        """Clusters of 32 subclusters under a state at fixed offsets; converted and back."""
        guest = self.one_disk(how=how, options="extended_l2=on,cluster_size=128k").start()
        image = guest.disks[0].path
        guest.fill(11)
        self.save(guest, "one", "--layout", "mapped-ram")
        guest.fill(12)
        self.save(guest, "one", "--layout", "mapped-ram", "--replace")
        guest.fill(13)
        self.tool("load", "one", "--qmp", guest.tool_socket)
        self.assert_seed(guest, 12)
        guest.quit()
        guest.check_image()
        self.assert_loads_mapped_ram(guest, "one", 12)
        for words, layout in ((["--layout", "legacy"], "legacy"), (["--compress"], "legacy"),
                              (["--layout", "mapped-ram"], "mapped-ram"),
                              (["--layout", "mapped-ram", "--compress"], "mapped-ram")):
            self.tool("convert", image, "one", *words)
            guest.check_image()
            self.assertEqual(self.info_layout(image, "one"), layout)
            self.assertEqual(json.loads(self.tool("check", image, "--format", "json"))["result"],
                             "clean")
            self.assert_loads_mapped_ram(guest, "one", 12)

    # Persistent bitmaps.

    def bitmap(self, guest):
        """What QEMU says of the bitmap of a disk."""
        for node in guest.qmp.execute("query-named-block-nodes"):
            if node.get("node-name") == "d0":
                found = [bitmap for bitmap in node["dirty-bitmaps"] if bitmap.get("name") == "kept"]
                self.assertEqual(len(found), 1, node["dirty-bitmaps"])
                return found[0]
        raise self.failureException("no node d0")

    def assert_bitmap_in_image(self, guest):
        """As qemu-img sees it once QEMU has ended: stored, and not left in use."""
        image = guest.qemu.inner(guest.disks[0].path)
        said = json.loads(guest.qemu.img("info", "--output=json", image).stdout)
        bitmaps = said["format-specific"]["data"]["bitmaps"]
        self.assertEqual([(bitmap["name"], bitmap["flags"]) for bitmap in bitmaps],
                         [("kept", ["auto"])])

    @cases(("host", "plugin"), ("10.0", "attach"), ("newest", "plugin"), ("newest", "attach"),
           quick=[("host", "plugin"), ("newest", "attach")])
    def test_bitmaps(self, qemu, how):
        """QEMU stores them when it lets go of the image and reads them when it takes it back: they
        count on over a save. Load and bitmaps exclude each other."""
        guest = self.one_disk(qemu, how).start()
        guest.qmp.execute("block-dirty-bitmap-add", node="d0", name="kept", persistent=True,
                          granularity=65536)
        guest.fill(11)
        self.assert_writes_go_on(guest)
        self.refused(self.save_args(guest, "one"), "kept", "--allow-bitmaps")
        guest.stop()
        before = self.bitmap(guest)
        self.assertGreater(before["count"], 0)
        report = self.save(guest, "one", "--allow-bitmaps")
        self.assertTrue(any("kept" in warning for warning in report["warnings"]), report)
        self.assertEqual(self.bitmap(guest), before)
        guest.cont()
        self.save(guest, "two", "--allow-bitmaps")  # now one that lies in the image
        self.assertEqual(guest.status(), "running")
        self.tool("delete", "two", "--qmp", guest.tool_socket)
        self.save(guest, "one", "--allow-bitmaps", "--replace")
        self.assert_writes_go_on(guest)
        after = self.bitmap(guest)
        self.assertGreaterEqual(after["count"], before["count"])
        self.assertTrue(after["recording"] and after["persistent"])
        self.assertFalse(after.get("inconsistent", False))
        with self.assertRaises(QmpError):
            guest.loadvm("one")
        if guest.status() != "running":
            guest.cont()
        guest.quit()
        guest.check_image()
        self.assert_bitmap_in_image(guest)
        image = guest.disks[0].path
        self.tool("convert", image, "one", "--compress")
        guest.check_image()
        self.assert_bitmap_in_image(guest)
        guest.start(paused=True)
        self.assertFalse(self.bitmap(guest).get("inconsistent", False))
        self.assertGreaterEqual(self.bitmap(guest)["count"], before["count"])
        guest.qmp.execute("block-dirty-bitmap-remove", node="d0", name="kept")
        guest.loadvm("one")
        guest.cont()
        self.assert_seed(guest, 11)
        guest.quit()
        guest.check_image()

    # What images lie on.

    def loop_device(self, folder, size):
        """A node of a loop device in this folder, where every QEMU sees it."""
        file = os.path.join(folder, "backing")
        with open(file, "wb") as backing:
            backing.truncate(size)
        done = subprocess.run(["losetup", "-f", "--show", file], capture_output=True, text=True,
                              check=False)
        if done.returncode != 0:
            raise unittest.SkipTest(f"no loop device to be had: {done.stderr.strip()}")
        loop = done.stdout.strip()
        self.addCleanup(subprocess.run, ["losetup", "-d", loop], check=True)
        node = os.path.join(folder, "d0.device")
        os.mknod(node, stat.S_IFBLK | 0o600, os.stat(loop).st_rdev)
        return node

    def on_device(self, size, qemu="newest", how="attach"):
        def disks(release, folder):
            node = self.loop_device(folder, size)
            release.img("create", "-q", "-f", "qcow2", release.inner(node), "64M")
            return [vm.Disk("d0", node, file={"driver": "host_device"})]

        return self.one_disk(qemu, how, disks)

    @cases(("host", "plugin"), ("newest", "attach"), quick=[("newest", "attach")])
    def test_block_device(self, qemu, how):
        guest = self.on_device(700 << 20, qemu, how).start()
        guest.fill(11)
        self.save(guest, "one")
        self.assert_images_active(guest)
        self.assert_writes_go_on(guest)
        self.save(guest, "one", "--replace")
        self.assert_loads(guest, "one")

    def test_block_device_without_room(self):
        """It cannot become longer, which is seen before the guest is stopped."""
        guest = self.on_device(90 << 20).start()
        guest.fill(11)
        guest.qmp.execute("query-status")
        guest.qmp.events.clear()
        line = self.refused(self.save_args(guest, "one"), "block device", "make room")
        guest.qmp.execute("query-status")
        self.assertNotIn("STOP", [event["event"] for event in guest.qmp.events], line)
        self.assert_writes_go_on(guest)
        guest.quit()
        guest.check_image()
        self.assertEqual(guest.snapshot_names(), [])

    def test_storage_without_direct(self):
        """Through the page cache where that is left to us, and refused where it is not."""
        def disks(release, folder):
            mount = os.path.join(folder, "mount")
            os.makedirs(mount)
            done = subprocess.run(["mount", "-t", "ramfs", "none", mount], capture_output=True,
                                  text=True, check=False)
            if done.returncode != 0:
                raise unittest.SkipTest(f"no ramfs: {done.stderr.strip()}")
            self.addCleanup(subprocess.run, ["umount", "-l", mount], check=True)
            return vm.make_disks(release, mount, ["d0"])

        guest = self.one_disk(disks=disks).start()
        guest.fill(11)
        guest.qmp.execute("query-status")
        guest.qmp.events.clear()
        self.refused(self.save_args(guest, "one", "--direct", "on"), "O_DIRECT", "--direct")
        guest.qmp.execute("query-status")
        self.assertNotIn("STOP", [event["event"] for event in guest.qmp.events])
        report = self.save(guest, "one")
        self.assertNotIn("direct", report["io-engine"])
        self.assert_loads(guest, "one")
