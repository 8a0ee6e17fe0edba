"""What cannot be saved is refused up front: status 1, one line that names the cause, nothing
changed, and the VM goes on as before."""

import contextlib
import os
import shutil
import socket
import subprocess
import time

import vm
from bed import BedTest, cases

BOTH = [("host", "plugin"), ("newest", "attach")]


class Refusals(BedTest):
    def booted(self, qemu="newest", machine="microvm", how="attach", **options):
        return self.make_vm(qemu, machine, plugin=how == "plugin", **options).start()

    def started(self, qemu="newest", machine="microvm", how="attach", **options):
        """A running VM whose guest is not waited for."""
        guest = self.make_vm(qemu, machine, plugin=how == "plugin", **options).start(wait=False)
        self.assertEqual(guest.status(), "running")
        return guest

    def refuse_save(self, guest, *words, name="snap", flags=(), status="running"):
        line = self.refused(self.save_args(guest, name, *flags), *words)
        self.assertTrue(guest.alive(), guest.log_tail())
        self.assertEqual(guest.status(), status)
        return line

    def lives_on(self, guest):
        """The guest still works, and the save left nothing in the images."""
        self.assert_writes_go_on(guest)
        guest.check()
        self.unchanged(guest)

    def unchanged(self, guest, names=()):
        guest.quit()
        guest.check_image()
        for disk in guest.disks:
            if disk.driver == "qcow2":
                self.assertEqual(guest.snapshot_names(disk.path), list(names))

    # Run states and migrations.

    @cases(*BOTH, quick=BOTH[1:])
    def test_suspended(self, qemu, how):
        # The console must not lose bytes over the suspend.
        guest = self.booted(qemu, "pc", how, kernel_options="no_console_suspend")
        guest.console.sendall(b"\nx suspend\n")
        guest.qmp.wait_event("SUSPEND", 30)
        self.refuse_save(guest, "suspended", status="suspended")
        guest.qmp.execute("system_wakeup")
        guest.qmp.wait_event("WAKEUP", 30)
        self.lives_on(guest)

    @cases(*BOTH, quick=BOTH[1:])
    def test_shut_down(self, qemu, how):
        guest = self.booted(qemu, "pc", how, extra=["-no-shutdown"])
        guest.console.sendall(b"\nx poweroff\n")
        guest.qmp.wait_event("SHUTDOWN", 30)
        deadline = time.monotonic() + 10
        while guest.status() != "shutdown" and time.monotonic() < deadline:
            time.sleep(0.05)
        self.refuse_save(guest, "shut", status="shutdown")
        guest.qmp.execute("system_reset")
        guest.console_text = b""
        guest.cont()
        guest.wait_console(rb"@start READY", 90)
        self.lives_on(guest)

    @cases(*BOTH, quick=BOTH[1:])
    def test_running_migration(self, qemu, how):
        # Not on an iothread: 7.2 then now and then hangs in `quit` after a cancelled migration.
        guest = self.booted(qemu, how=how, iothread=False)
        guest.qmp.execute("migrate-set-parameters", max_bandwidth=4096)
        guest.qmp.execute("migrate", uri="exec:cat >/dev/null")
        deadline = time.monotonic() + 10
        while guest.qmp.execute("query-migrate")["status"] != "active":
            self.assertLess(time.monotonic(), deadline, "the migration does not start")
            time.sleep(0.05)
        self.refuse_save(guest, "migration")
        self.assertEqual(guest.qmp.execute("query-migrate")["status"], "active")
        guest.qmp.execute("migrate_cancel")
        while guest.qmp.execute("query-migrate")["status"] != "cancelled":
            self.assertLess(time.monotonic(), deadline + 20, "the migration does not end")
            time.sleep(0.05)
        self.lives_on(guest)

    @cases(*BOTH)
    def test_writable_export(self, qemu, how):
        guest = self.make_vm(qemu, "microvm", plugin=how == "plugin")
        for disk in guest.disks:
            disk.device = "virtio-blk-pci,drive=NODE,share-rw=on"
        guest.guest_disks = 2
        guest.start()
        path = guest.qemu.inner(guest.path("nbd.sock"))
        guest.qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
        guest.qmp.execute("block-export-add", type="nbd", id="export0", node_name="d0",
                          writable=True)
        self.refuse_save(guest, "export")
        self.assert_images_active(guest)
        guest.qmp.execute("block-export-del", id="export0")
        self.lives_on(guest)

    # Machines and devices.

    def test_unmigratable_device(self):
        guest = self.make_vm("host", "pc", plugin=True)
        guest.disks[1].device = "nvme,drive=NODE,serial=one"
        guest.guest_disks = 1
        guest.start()
        self.refuse_save(guest, "nvme")
        self.lives_on(guest)

    def test_unknown_machine(self):
        guest = self.make_vm("newest", "microvm")
        guest.machine = vm.Machine("x86_64", "ttyS0", ["-machine", "isapc", "-smp", "1,maxcpus=1"],
                                   False, None)
        for disk in guest.disks:
            disk.device = "ide-hd,drive=NODE"
        guest.start(wait=False)
        self.refuse_save(guest, "isapc")
        self.unchanged(guest)

    def test_icount(self):
        guest = self.started(extra=["-icount", "shift=3"])
        self.refuse_save(guest, "icount")
        self.unchanged(guest)

    # Images.

    def test_no_locks(self):
        guest = self.make_vm("newest", "microvm")
        for disk in guest.disks:
            disk.file = {"locking": "off"}
        guest.start()
        self.refuse_save(guest, "lock")
        self.lives_on(guest)

    def test_raw_pflash(self):
        def disks(qemu, folder):
            path = os.path.join(folder, "vars.raw")
            with open(path, "wb") as file:
                file.truncate(64 << 20)
            return vm.make_disks(qemu, folder)

        guest = self.make_vm("newest", "virt", disks=disks)
        path = guest.qemu.inner(guest.path("vars.raw"))
        guest.extra = ["-drive", f"if=pflash,unit=1,format=raw,file={path}"]
        guest.start()
        self.refuse_save(guest, "pflash")
        self.lives_on(guest)

    def test_raw_disk(self):
        def disks(qemu, folder):
            path = os.path.join(folder, "d1.raw")
            with open(path, "wb") as file:
                file.truncate(64 << 20)
            return vm.make_disks(qemu, folder, ["d0"]) + [vm.Disk("d1", path, driver="raw")]

        guest = self.booted(disks=disks)
        self.refuse_save(guest, "d1", "raw")
        self.lives_on(guest)

    def test_no_disk(self):
        guest = self.booted(disks=lambda qemu, folder: [])
        self.refuse_save(guest, "qcow2")
        guest.check()

    def test_persistent_bitmap(self):
        guest = self.booted()
        guest.qmp.execute("block-dirty-bitmap-add", node="d1", name="backup", persistent=True)
        self.refuse_save(guest, "bitmap")
        guest.qmp.execute("block-dirty-bitmap-remove", node="d1", name="backup")
        self.lives_on(guest)

    def test_luks(self):
        """No state into a LUKS image; its disk may take part when the state is elsewhere."""
        def disks(qemu, folder):
            path = os.path.join(folder, "d0.qcow2")
            qemu.img("create", "-q", "-f", "qcow2", "--object", "secret,id=s0,data=abc", "-o",
                     "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10",
                     qemu.inner(path), "64M")
            return [vm.Disk("d0", path, encrypt={"format": "luks", "key-secret": "s0"}),
                    *vm.make_disks(qemu, folder, ["d1"])]

        guest = self.booted(disks=disks, extra=["-object", "secret,id=s0,data=abc"])
        self.refuse_save(guest, "luks")
        self.lives_on(guest)

    def test_data_file(self):
        def disks(qemu, folder):
            data = qemu.inner(os.path.join(folder, "d0.data"))
            return vm.make_disks(qemu, folder, options=f"data_file={data}")[:1]

        guest = self.booted(disks=disks)
        self.refuse_save(guest, "external")
        self.lives_on(guest)

    def test_temporary_snapshot(self):
        guest = self.make_vm("newest", "microvm")
        path = guest.qemu.inner(guest.disks[0].path)
        guest.disks = []
        guest.extra = ["-drive", f"if=none,id=x,file={path}", "-device", "virtio-blk-pci,drive=x",
                       "-snapshot"]
        guest.guest_disks = 1
        guest.start()
        self.refuse_save(guest, "-snapshot")
        self.assert_writes_go_on(guest)
        guest.check()

    def test_no_space(self):
        """Estimated before the stop: the guest's clock shows no pause."""
        small = os.path.join(self.folder, "small")
        os.makedirs(small)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=70M", "none", small], check=True)
        self.addCleanup(subprocess.run, ["umount", "-l", small], check=True)
        guest = self.booted(disks=lambda qemu, folder: vm.make_disks(qemu, small))
        guest.qmp.execute("query-status")
        guest.qmp.events.clear()
        self.refuse_save(guest, "make room")
        guest.qmp.execute("query-status")
        self.assertNotIn("STOP", [event["event"] for event in guest.qmp.events])
        self.lives_on(guest)

    # Names.

    def test_names(self):
        guest = self.booted()
        guest.qmp.execute("query-status")
        guest.savevm("taken")
        self.refuse_save(guest, "taken", name="taken")
        self.refuse_save(guest, "number", name="123")
        self.refuse_save(guest, "name", name="x" * 256)
        self.refuse_save(guest, "nosuchnode", flags=["--vmstate-node", "nosuchnode"])
        self.assert_writes_go_on(guest)
        self.unchanged(guest, ["taken"])

    # Sockets and rights.

    def test_wrong_socket(self):
        guest = self.booted()
        missing = guest.path("missing.sock")
        self.refused(["save", "one", "--qmp", missing], missing)
        self.refused(["save", "one", "--control", missing], missing)
        plain = guest.path("plain")
        with open(plain, "wb"):
            pass
        self.refused(["save", "one", "--qmp", plain], plain)
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as deaf:
            path = guest.path("deaf.sock")
            deaf.bind(path)
            deaf.listen(1)  # accepts, and never says anything
            self.refused(["save", "one", "--qmp", path], path)
        self.lives_on(guest)

    def test_no_permission(self):
        """Another user who may speak to the socket, but not read the process."""
        guest = self.booted()
        program = shutil.copy(self.built("qvmstate"), guest.folder)
        folder = guest.folder
        while folder != "/tmp" and folder != "/":
            os.chmod(folder, 0o755)
            folder = os.path.dirname(folder)
        os.chmod(guest.tool_socket, 0o666)
        done = subprocess.run([program, "save", "one", "--qmp", guest.tool_socket], user=65534,
                              group=65534, extra_groups=[], capture_output=True, text=True,
                              timeout=60, check=False)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
        self.assertRegex(done.stderr.lower(), "permi|root|user")
        self.assertEqual(guest.status(), "running")
        self.lives_on(guest)
