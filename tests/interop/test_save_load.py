"""Saves of a running and of a paused guest, by the plugin and by attaching, on each QEMU and each
machine, and everything that QEMU itself can then do with the snapshot."""

import hashlib
import os
import re

import vm
from bed import BedTest, cases, need_kvm

ROWS = [(qemu, machine, how) for qemu in ("host", "10.0", "newest") for machine in vm.MACHINES
        for how in ("plugin", "attach") if (qemu, how) != ("host", "attach")]
QUICK = [("host", "pc", "plugin"), ("host", "virt", "plugin"), ("10.0", "q35", "attach"),
         ("newest", "pc", "plugin"), ("newest", "microvm", "attach"), ("newest", "virt", "attach")]


def listed(machine, name):
    """The columns of one snapshot in qemu-img's list, as a dictionary."""
    text = machine.qemu.img("snapshot", "-l", "-U", machine.qemu.inner(machine.disks[0].path)).stdout
    titles = text.splitlines()[1]
    line = next(line for line in text.splitlines()[2:] if line.split()[1] == name)
    words = line.split()
    # ID TAG SIZE unit DATE TIME CLOCK [ICOUNT]; older releases leave the last one empty.
    return {"size": f"{words[2]} {words[3]}", "date": f"{words[4]} {words[5]}", "clock": words[6],
            "icount": words[7:], "titles": titles}


class SaveLoad(BedTest):
    @cases(*ROWS, quick=QUICK)
    def test_save_load(self, qemu, machine, how):
        self.go_through_all(self.make_vm(qemu, machine, plugin=how == "plugin"))

    @cases(("host", "plugin"), ("10.0", "attach"), ("newest", "plugin"), ("newest", "attach"))
    def test_save_load_kvm(self, qemu, how):
        need_kvm()
        self.go_through_all(self.make_vm(qemu, "q35", plugin=how == "plugin", accel="kvm"))

    def go_through_all(self, guest):
        guest.start()
        guest.fill(11)
        self.save_while_running(guest)
        state = self.save_while_paused(guest)
        self.load_hot(guest, state)
        self.load_by_job(guest)
        guest.quit()
        guest.check_image()
        self.load_cold(guest, state)
        self.use_qemu_img(guest)

    def save_while_running(self, guest):
        report = self.save(guest, "run1")
        self.assertTrue(report["was-running"])
        self.assertEqual(guest.status(), "running")
        self.assert_images_active(guest)
        self.assert_writes_go_on(guest)
        self.assert_seed(guest, 11)
        self.assertIn("run1", guest.qmp.hmp("info snapshots"))

    def save_while_paused(self, guest):
        """Beside it QEMU saves one of its own at the same moment, for comparison."""
        guest.stop()
        self.save(guest, "p1")
        self.assertEqual(guest.status(), "paused")
        self.assert_images_active(guest)
        state = guest.state()
        guest.savevm("own")
        ours, own = listed(guest, "p1"), listed(guest, "own")
        self.assertEqual(ours["clock"], own["clock"])
        self.assertEqual(ours["icount"], own["icount"])
        self.assertRegex(ours["date"], r"^20\d\d-\d\d-\d\d \d\d:\d\d:\d\d$")
        self.assertRegex(ours["size"], r"^[1-9][\d.]* [KMG]iB$")
        guest.cont()
        return state

    def load_hot(self, guest, state):
        guest.fill(22)
        self.assert_seed(guest, 22)
        guest.stop()
        guest.loadvm("p1")
        self.assert_same_state(state, guest.state())
        guest.cont()
        self.assert_seed(guest, 11)
        guest.fill(33)
        guest.loadvm("run1")  # into a running guest
        self.assert_seed(guest, 11)
        self.assert_writes_go_on(guest)
        guest.loadvm("own")
        self.assert_seed(guest, 11)

    def load_by_job(self, guest):
        guest.fill(44)
        nodes = [disk.node for disk in guest.disks]
        guest.qmp.run_job("snapshot-load", tag="run1", vmstate=nodes[0], devices=nodes)
        guest.cont()
        self.assert_seed(guest, 11)

    def load_cold(self, guest, state):
        for name in ("p1", "run1"):
            guest.start(loadvm=name, paused=True)
            if name == "p1":
                self.assert_same_state(state, guest.state())
            guest.cont()
            self.assert_seed(guest, 11)
            self.assert_writes_go_on(guest)
            guest.quit()
            guest.check_image()

    def raw_of(self, guest, disk, *options):
        """A digest of the disk's content as qemu-img convert reads it."""
        out = os.path.join(guest.folder, "content.raw")
        guest.qemu.img("convert", *options, "-O", "raw", guest.qemu.inner(disk.path),
                       guest.qemu.inner(out))
        with open(out, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.unlink(out)
        return digest

    def use_qemu_img(self, guest):
        """-a brings the disk back, on which the state still loads; -d leaves no trace."""
        for disk in guest.disks:
            image = guest.qemu.inner(disk.path)
            content = self.raw_of(guest, disk, "-l", "snapshot.name=p1")
            guest.qemu.run("qemu-io", "-c", "write -P 0x5a 4k 64k", image)
            self.assertNotEqual(content, self.raw_of(guest, disk))
            guest.qemu.img("snapshot", "-a", "p1", image)
            self.assertEqual(content, self.raw_of(guest, disk))
            guest.check_image(disk.path)
        guest.start(loadvm="p1")
        self.assert_seed(guest, 11)
        guest.quit()
        for disk in guest.disks:
            guest.qemu.img("snapshot", "-d", "p1", guest.qemu.inner(disk.path))
            guest.check_image(disk.path)
            self.assertEqual(guest.snapshot_names(disk.path), ["run1", "own"])
        guest.start(loadvm="run1")
        self.assert_seed(guest, 11)
        guest.qmp.hmp_quiet("delvm run1")
        guest.quit()
        guest.check_image()

    def test_load_and_delete_by_the_command(self):
        """`load` and `delete` on the running VM, `list`, `info` and `delete` on the images."""
        guest = self.make_vm("newest", "pc").start()
        images = [disk.path for disk in guest.disks]
        guest.fill(11)
        for name in ("one", "two", "three"):
            self.save(guest, name)
        guest.fill(22)
        self.tool("load", "one", "--qmp", guest.tool_socket)
        self.assertEqual(guest.status(), "running")
        self.assert_seed(guest, 11)
        self.tool("delete", "two", "--qmp", guest.tool_socket)
        self.assertEqual(guest.status(), "running")
        self.assert_writes_go_on(guest)
        self.refused(["load", "two", "--qmp", guest.tool_socket], "two")
        self.refused(["delete", "two", "--qmp", guest.tool_socket], "two")
        guest.quit()
        guest.check_image()
        for image in images:
            self.assertEqual(guest.snapshot_names(image), ["one", "three"])
        text = self.tool("list", images[0])
        self.assertTrue(re.search(r"\bone\b", text) and re.search(r"\bthree\b", text), text)
        self.assertIn("pc.ram", self.tool("info", images[0], "one"))
        self.tool("delete", "three", *images)
        guest.check_image()
        guest.start(loadvm="one")
        self.assert_seed(guest, 11)

    def test_attach_to_7_2_is_refused(self):
        """7.2 does not tell where its RAM is; the refusal names the ways out."""
        guest = self.make_vm("host", "microvm").start()
        self.refused(self.save_args(guest, "one"), "plugin")
        self.assertEqual(guest.status(), "running")
        self.assert_writes_go_on(guest)
        guest.quit()
        guest.check_image()
        self.assertEqual(guest.snapshot_names(), [])

    @cases("plugin", "attach")
    def test_replace(self, how):
        """The new snapshot takes the old one's name; without --replace the name is refused."""
        guest = self.make_vm("newest", "microvm", plugin=how == "plugin").start()
        guest.fill(11)
        self.save(guest, "same")
        guest.fill(22)
        self.refused(self.save_args(guest, "same"), "same", "--replace")
        self.assert_seed(guest, 22)
        self.save(guest, "same", "--replace")
        guest.fill(33)
        for disk in guest.disks:
            self.assertEqual(guest.snapshot_names(disk.path), ["same"])
        guest.loadvm("same")
        self.assert_seed(guest, 22)
        guest.quit()
        guest.check_image()
