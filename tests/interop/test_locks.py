"""Who keeps whom out of an image. While a save writes, qemu-img, another QEMU and another qvmstate are
refused as they are while QEMU runs; what only looks as if an image were ours is refused; and somebody
who takes the image while it changes hands is noticed."""

import os
import subprocess
import sys
import time

import bed
from bed import cases, full_only
from interrupted import SLOW, InterruptedTest

# Waits until nobody writes the image, takes a writer's locks as QEMU would, and holds them so long.
GRABBER = """
import fcntl, struct, sys, time
BYTES = (100, 101, 103, 201, 203)
file = open(sys.argv[1], "rb+")
def lock(command, kind, byte):
    request = struct.pack("hhxxxxqqixxxx", kind, 0, byte, 1, 0)
    return struct.unpack("hhxxxxqqixxxx", fcntl.fcntl(file, command, request))[0]
print("ready", flush=True)
while any(lock(36, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK for byte in BYTES[1:]):
    pass
for byte in BYTES:
    lock(37, fcntl.F_RDLCK, byte)
print("grabbed", flush=True)
time.sleep(float(sys.argv[2]))
"""


class Locks(InterruptedTest):
    def images_held(self, guest):
        return all(bed.held_locks(disk.path) == bed.LOCKS_OF_A_WRITER for disk in guest.disks)

    def start_save_until_it_writes(self, guest, name, *flags):
        process = self.start_save(guest, name, *SLOW, *flags)
        self.wait_stopped(guest, process)
        time.sleep(0.5)
        self.assertIsNone(process.poll(), "the save is over already")
        self.assertTrue(self.images_held(guest))
        return process

    def assert_ends_well(self, guest, process, possible):
        _, errors = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0, errors)
        self.assert_runs_within(guest, 1.0, time.monotonic())
        self.assert_images_active(guest)
        self.assert_sound(guest, possible)

    def assert_lock_refused(self, done):
        text = f"{' '.join(done.args)}: {done.returncode} {done.stdout}{done.stderr}"
        self.assertNotEqual(done.returncode, 0, text)
        self.assertIn("lock", done.stderr, text)

    def test_others_while_we_write(self):
        guest = self.make_vm("newest", "microvm").start()
        self.save(guest, "before")
        process = self.start_save_until_it_writes(guest, "half")
        qemu = guest.qemu
        for disk in guest.disks:
            path = qemu.inner(disk.path)
            for arguments in (["info"], ["check"], ["snapshot", "-l"], ["snapshot", "-c", "x"]):
                self.assert_lock_refused(qemu.img(*arguments, path, check=False))
            self.assertEqual(qemu.img("info", "-U", path, check=False).returncode, 0)
        second = [qemu.system("x86_64"), "-machine", "none", "-display", "none", "-blockdev",
                  f"driver=qcow2,node-name=x,file.driver=file,file.filename={path}"]
        self.assert_lock_refused(qemu.run(*second, check=False))
        self.assert_ends_well(guest, process, "^(before|half)$")

    def test_two_of_us(self):
        """Offline commands are kept out by the locks, online ones by the mark that a save leaves in
        QEMU, `resume` too: there is nothing to mend yet."""
        guest = self.make_vm("newest", "microvm").start()
        self.save(guest, "before")
        process = self.start_save_until_it_writes(guest, "half")
        path = guest.disks[0].path
        for arguments in (["list", path], ["info", path], ["check", path], ["delete", "before", path],
                          ["convert", path, "before"], ["diff", path, "before", "before"]):
            self.refused(arguments, "in use")
        other = guest.path("plugin.sock")
        for arguments in (["save", "second", "--qmp", other], ["delete", "before", "--qmp", other],
                          ["resume", "--qmp", other]):
            self.refused(arguments, "going on")
        self.assertNotEqual(guest.status(), "running")
        self.assert_ends_well(guest, process, "^(before|half)$")

    @cases("host", "newest", quick=["host"])
    def test_plugin_and_attached(self, qemu):
        """The plugin saves when another command attaches: before 10.0 QEMU does not tell that its
        disks are inactive, and 7.2 does not survive to be told to let go of them again."""
        guest = self.make_vm(qemu, "microvm", plugin=True).start()
        self.save(guest, "before")
        process = self.start_save_until_it_writes(guest, "half")
        for arguments in (["delete", "before", "--qmp", guest.tool_socket],
                          ["resume", "--qmp", guest.tool_socket]):
            self.refused(arguments, "going on")
        self.assertTrue(guest.alive(), guest.log_tail())
        self.assert_ends_well(guest, process, "^(before|half)$")

    @full_only
    def test_who_cannot_look_into_qemu(self):
        """The images stay QEMU's in a save to a file, so only its mark keeps `resume` from waking the
        guest; and who cannot look into QEMU's process cannot tell a mark from a dead one."""
        if os.geteuid() != 0:
            self.skipTest("only root can give up the right to look into its processes")
        guest = self.make_vm("newest", "microvm", plugin=True).start()
        target = f"file:{guest.path('state')}"
        process = self.start_tool(self.save_to_args(guest, "--to", target, *SLOW))
        self.wait_stopped(guest, process)
        for arguments in (["resume"], ["load", "x"], ["delete", "x"], ["save", "x"]):
            done = subprocess.run(["setpriv", "--bounding-set", "-sys_ptrace", self.program, *arguments,
                                   "--qmp", guest.tool_socket], stdin=subprocess.DEVNULL,
                                  capture_output=True, text=True, timeout=60, check=False)
            self.assertEqual(done.returncode, 1, done.stdout + done.stderr)
            self.assertRegex(done.stderr, "cannot tell.*as root or as QEMU's user")
            self.assertNotEqual(guest.status(), "running")
        _, errors = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0, errors)
        self.assert_runs_within(guest, 1.0, time.monotonic())
        self.assertEqual(self.info_layout(guest.path("state")), "legacy")

    def test_copy_on_read_filter(self):
        """The image lies under a filter: its own, but not where a snapshot can be made."""
        guest = self.make_vm("newest", "microvm")
        first, second = guest.disks
        guest.extra = ["-blockdev", "driver=copy-on-read,node-name=filter,file=d1",
                       "-device", second.device.replace("NODE", "filter")]
        second.device = None
        guest.guest_disks = 2
        guest.start()
        self.refused(self.save_args(guest, "one"), "filter", "copy-on-read")
        self.assertEqual(guest.status(), "running")
        self.assert_writes_go_on(guest)
        guest.quit()
        guest.check_image()
        self.assertEqual(guest.snapshot_names(first.path), [])

    def grab(self, path, seconds):
        grabber = subprocess.Popen([sys.executable, "-c", GRABBER, path, str(seconds)],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        self.addCleanup(grabber.communicate)
        self.addCleanup(grabber.kill)
        self.assertEqual(grabber.stdout.readline(), "ready\n")
        return grabber

    @cases("attach", "plugin", quick=["attach"])
    def test_grabbed_in_the_handover(self, how):
        """QEMU has let go and we have not got the locks yet, or the other way round: whoever comes
        then has the image. The save ends, or is complete, and the guest runs when he is gone."""
        guest = self.make_vm("newest", "microvm", plugin=how == "plugin").start()
        self.save(guest, "before")
        lost = 0
        for i in range(10):
            grabber = self.grab(guest.disks[1].path, 1)
            done = self.run_tool(*self.save_args(guest, "half", "--replace"))
            self.assertEqual(grabber.stdout.readline(), "grabbed\n")
            grabber.wait(timeout=30)
            self.assert_runs_within(guest, 1.0, time.monotonic())
            self.assert_images_active(guest)
            self.assert_writes_go_on(guest)
            self.assert_image_sound(guest)
            if done.returncode != 0:
                lost += 1
                self.assertRegex(done.stderr, "in use by another|another program locked it")
                break
        self.assertTrue(lost, "in ten saves nobody came between QEMU and us")
        self.assert_sound(guest, "^(before|half)$")

    @full_only
    def test_grabbed_for_long(self):
        """Longer than the save waits: it says what to do, and the guardian goes on waiting."""
        guest = self.make_vm("newest", "microvm").start()
        grabber = self.grab(guest.disks[1].path, 600)
        done = self.run_tool(*self.save_args(guest, "half"))
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("resume", done.stderr)
        self.assertNotEqual(guest.status(), "running")
        grabber.kill()
        grabber.wait(timeout=30)
        self.assert_runs_within(guest, 1.0, time.monotonic())
        self.assert_processes_end()
        self.assert_sound(guest, "^half$")
