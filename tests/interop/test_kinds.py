"""Kinds of images and of what they lie on that need a QEMU to be seen: many snapshots of QEMU's own,
block devices, storage without O_DIRECT."""

import json
import os
import stat
import subprocess
import time
import unittest

import vm
from bed import BedTest, cases, full_only


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
