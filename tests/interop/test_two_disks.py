"""A VM with several disks: which one gets the state, which ones a snapshot of the disk only, and that
all of them come back together."""

import os

import vm
from bed import BedTest, cases
from qmp import QmpError


def sizes(machine, disk):
    """{name: size of the state as qemu-img prints it} of one image."""
    text = machine.qemu.img("snapshot", "-l", "-U", machine.qemu.inner(disk.path)).stdout
    return {line.split()[1]: " ".join(line.split()[2:4]) for line in text.splitlines()[2:]}


class TwoDisks(BedTest):
    @cases("plugin", "attach")
    def test_state_in_the_first(self, how):
        guest = self.make_vm("newest", "microvm", plugin=how == "plugin").start()
        guest.fill(11)
        report = self.save(guest, "both")
        self.assertEqual([(disk["node"], disk["has-vmstate"]) for disk in report["disks"]],
                         [("d0", True), ("d1", False)])
        self.assertNotEqual(sizes(guest, guest.disks[0])["both"], "0 B")
        self.assertEqual(sizes(guest, guest.disks[1])["both"], "0 B")
        guest.fill(22)
        guest.loadvm("both")  # the guest's check covers both disks
        self.assert_seed(guest, 11)
        guest.quit()
        guest.check_image()

    @cases(("10.0", "plugin"), ("newest", "attach"), ("newest", "plugin"),
           quick=[("newest", "attach")])
    def test_iothread(self, qemu, how):
        """Disks on an iothread. One save and one load a process only: see VM.iothread; on 7.2 every
        test has its disks on one."""
        guest = self.make_vm(qemu, "microvm", plugin=how == "plugin", iothread=True).start()
        guest.fill(11)
        self.save(guest, "one")
        self.assertEqual(guest.status(), "running")
        self.assert_images_active(guest)
        guest.quit()
        guest.check_image()
        guest.start(loadvm="one")
        self.assert_seed(guest, 11)
        self.assert_writes_go_on(guest)

    def test_order_of_the_devices_counts(self):
        """The first node for loadvm is that of the first device, not of the first -blockdev."""
        guest = self.make_vm("newest", "microvm")
        first, second = guest.disks
        late = first.arguments(guest.qemu, guest.iothread)
        guest.extra = late[2:]
        first.device = None
        guest.start(wait=False)
        report = self.save(guest, "one")
        self.assertEqual({disk["node"]: disk["has-vmstate"] for disk in report["disks"]},
                         {first.node: False, second.node: True})
        guest.stop()
        guest.loadvm("one")

    def test_state_in_the_second(self):
        """As asked; a warning says that plain loadvm will refuse, and a job can load it."""
        guest = self.make_vm("newest", "microvm").start()
        guest.fill(11)
        report = self.save(guest, "second", "--vmstate-node", "d1")
        self.assertTrue(any("loadvm" in warning for warning in report["warnings"]), report)
        self.assertEqual(sizes(guest, guest.disks[0])["second"], "0 B")
        guest.fill(22)
        with self.assertRaises(QmpError):
            guest.loadvm("second")
        if guest.status() != "running":
            guest.cont()
        guest.qmp.run_job("snapshot-load", tag="second", vmstate="d1", devices=["d0", "d1"])
        guest.cont()
        self.assert_seed(guest, 11)
        guest.quit()
        guest.check_image()

    def test_read_only_disk_stays_out(self):
        def disks(qemu, folder):
            path = os.path.join(folder, "cd.raw")
            with open(path, "wb") as file:
                file.truncate(1 << 20)
            cd = vm.Disk("cd", path, driver="raw", read_only=True,
                         device="virtio-blk-pci,serial=cd,drive=NODE")
            return vm.make_disks(qemu, folder) + [cd]

        guest = self.make_vm("newest", "microvm", disks=disks).start()
        guest.fill(11)
        report = self.save(guest, "one")
        self.assertEqual([disk["node"] for disk in report["disks"]], ["d0", "d1"])
        guest.fill(22)
        guest.loadvm("one")
        self.assert_seed(guest, 11)

    def test_luks_disk_takes_part(self):
        """The disk of a LUKS image joins when the state is elsewhere."""
        def disks(qemu, folder):
            path = os.path.join(folder, "d1.qcow2")
            qemu.img("create", "-q", "-f", "qcow2", "--object", "secret,id=s0,data=abc", "-o",
                     "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10",
                     qemu.inner(path), "64M")
            return [*vm.make_disks(qemu, folder, ["d0"]),
                    vm.Disk("d1", path, encrypt={"format": "luks", "key-secret": "s0"})]

        guest = self.make_vm("newest", "microvm", disks=disks,
                             extra=["-object", "secret,id=s0,data=abc"]).start()
        guest.fill(11)
        self.save(guest, "one")
        guest.fill(22)
        guest.loadvm("one")
        self.assert_seed(guest, 11)
        guest.quit()
        guest.check_image()
        guest.start(loadvm="one")
        self.assert_seed(guest, 11)

    @cases("cluster_size=4k", "compat=0.10", "refcount_bits=8", "lazy_refcounts=on",
           "cluster_size=2M,preallocation=metadata", "extended_l2=on", "extended_l2=on,cluster_size=16k",
           quick=["cluster_size=4k", "compat=0.10", "extended_l2=on"])
    def test_formats(self, options):
        """Images of other geometry go the same way."""
        guest = self.make_vm("newest", "microvm",
                             disks=lambda qemu, folder: vm.make_disks(qemu, folder,
                                                                      options=options)).start()
        guest.fill(11)
        self.save(guest, "one")
        self.assert_writes_go_on(guest)
        guest.fill(22)
        guest.loadvm("one")
        self.assert_seed(guest, 11)
        guest.quit()
        guest.check_image()
        guest.start(loadvm="one")
        self.assert_seed(guest, 11)

    def test_backing_file(self):
        """An overlay over a larger base: what is not allocated must not show the base in the state."""
        def disks(qemu, folder):
            base = os.path.join(folder, "base.raw")
            with open(base, "wb") as file:
                file.write(b"\xa5" * (96 << 20))
                file.truncate(1 << 30)
            out = []
            for name in ("d0", "d1"):
                path = os.path.join(folder, name + ".qcow2")
                qemu.img("create", "-q", "-f", "qcow2", "-b", qemu.inner(base), "-F", "raw",
                         qemu.inner(path), "64M")
                out.append(vm.Disk(name, path))
            return out

        guest = self.make_vm("newest", "microvm", disks=disks).start()
        guest.fill(11)
        self.save(guest, "one")
        guest.fill(22)
        guest.loadvm("one")
        self.assert_seed(guest, 11)
        guest.quit()
        guest.check_image()
        guest.start(loadvm="one")
        self.assert_seed(guest, 11)
