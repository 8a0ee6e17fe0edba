"""States in files outside of the images: what `save --to` writes, QEMU loads by -incoming; what QEMU
writes by `migrate file:`, `extract` reads. Descriptors that somebody else opened, and full disks."""

import os
import socket
import subprocess
import time

import mapped
from bed import BedTest, Settings, cases
from qmp import QmpError

MAPPED = ["--layout", "mapped-ram"]
OFFSETS = (0, 0x3000, 0x1234)
SLOW = ["--limit-rate", "40M"]
FDSET = 7


class Files(BedTest):
    def booted(self, qemu="newest", machine="microvm", how="attach"):
        """A guest that only works on its memory, because a file has none of the disks."""
        guest = self.make_vm(qemu, machine, plugin=how == "plugin")
        guest.guest_disks = 0
        guest.start()
        guest.fill(11)
        return guest

    def path_for(self, guest, name, offset=0):
        """A new file that somebody already wrote to, up to the offset."""
        path = guest.path(name)
        with open(path, "wb") as file:
            file.write(b"\x5a" * offset)
        return path

    def assert_head_kept(self, path, offset):
        with open(path, "rb") as file:
            self.assertEqual(file.read(offset), b"\x5a" * offset)

    def save_file(self, guest, name, offset=0, layout="mapped-ram"):
        path = self.path_for(guest, name, offset)
        target = f"file:{path}" + (f",offset={offset}" if offset else "")
        report = self.save_to(guest, target, "--layout", layout)
        self.assertEqual(report["layout"], layout)
        self.assertIn(path, report["target"])
        self.assert_head_kept(path, offset)
        return path

    def receive(self, guest, state, path, way, offset=0):
        mapped.receive(guest, path, way, offset)
        self.assertNotEqual(guest.status(), "running")
        self.assert_same_state(state, guest.state())
        guest.cont()
        self.assert_seed(guest, 11)
        self.assert_writes_go_on(guest)
        guest.kill()

    @cases(*[(qemu, machine, how) for qemu in ("10.0", "newest")
             for machine in ("pc", "microvm", "virt") for how in ("plugin", "attach")],
           quick=[("10.0", "microvm", "attach")])
    def test_mapped_ram(self, qemu, machine, how):
        guest = self.booted(qemu, machine, how)
        running = self.save_file(guest, "running")
        self.assertEqual(guest.status(), "running")
        self.assert_images_active(guest)
        self.assert_writes_go_on(guest)
        guest.stop()
        paths = {offset: self.save_file(guest, f"paused-{offset:x}", offset) for offset in OFFSETS}
        self.assertEqual(guest.status(), "paused")
        self.assert_images_active(guest)
        state = guest.state()
        guest.cont()
        self.assert_writes_go_on(guest)
        guest.kill()
        for offset, path in paths.items():
            found = mapped.MappedFile(path, offset).pieces()
            self.assertEqual(found.keys(), state.pieces.keys())
            self.assertEqual([name for name in found
                              if found[name].sums != state.pieces[name].sums], [])
            source = [path, *(["--offset", str(offset)] if offset else [])]
            self.assertEqual(self.info_layout(*source), "mapped-ram")
            self.assert_extracts(state, *source)
            ways = ("plain", "multifd", "direct", "direct4") if offset == 0 else ("plain", "direct")
            for name in ways[-1:] if Settings.quick else ways:
                with self.subTest(offset=offset, way=name):
                    self.receive(guest, state, path, mapped.WAYS[name], offset)
        mapped.receive(guest, running, mapped.Way())
        guest.cont()
        self.assert_seed(guest, 11)

    @cases(("pc", "main"), ("pc", "dimm"), ("microvm", "main"), ("virt", "main"), quick=[])
    def test_odd_sizes(self, machine, size):
        guest = self.make_vm("newest", machine, plugin=size == "dimm")
        guest.guest_disks = 0
        mapped.set_odd_memory(guest, size)
        guest.start()
        guest.fill(11)
        guest.stop()
        path = self.save_file(guest, "odd")
        state = guest.state()
        guest.kill()
        self.assert_extracts(state, path)
        for way in ("plain", "direct"):
            self.receive(guest, state, path, mapped.WAYS[way])

    @cases("plugin", "attach", quick=[])
    def test_zero_pages_take_no_space(self, how):
        guest = self.make_vm("newest", "microvm", plugin=how == "plugin")
        guest.memory_options = ["-m", "1G"]
        guest.kernel_options = "qvm.mem=8"
        guest.start()
        guest.stop()
        path = self.save_file(guest, "sparse")
        state = guest.state()
        self.assertLess(os.stat(path).st_blocks * 512, mapped.used_bytes(state, 1 << 16) + (8 << 20))

    @cases(("host", "pc", "plugin"), ("host", "virt", "plugin"), ("host", "microvm", "plugin"),
           ("10.0", "q35", "attach"), ("newest", "microvm", "plugin"), ("newest", "pc", "attach"),
           quick=[("host", "microvm", "plugin")])
    def test_legacy(self, qemu, machine, how):
        """7.2 reads it through a pipe, later ones themselves."""
        guest = self.booted(qemu, machine, how)
        running = self.save_file(guest, "running", layout="legacy")
        self.assertEqual(guest.status(), "running")
        self.assert_writes_go_on(guest)
        guest.stop()
        offsets = OFFSETS if guest.qemu.version >= (8, 2) else OFFSETS[:1]
        paths = {offset: self.save_file(guest, f"paused-{offset:x}", offset, "legacy")
                 for offset in offsets}
        self.assertEqual(guest.status(), "paused")
        state = guest.state()
        guest.kill()
        for offset, path in paths.items():
            source = [path, *(["--offset", str(offset)] if offset else [])]
            self.assertEqual(self.info_layout(*source), "legacy")
            if guest.qemu.version >= (8, 2):
                self.assert_extracts(state, *source)
            self.receive(guest, state, path, mapped.WAYS["legacy"], offset)
        mapped.receive(guest, running, mapped.WAYS["legacy"])
        guest.cont()
        self.assert_seed(guest, 11)

    @cases("plugin", "attach", quick=[])
    def test_with_disks(self, how):
        """The disks as they were at that moment are all that a file does not have."""
        guest = self.make_vm("newest", "pc", plugin=how == "plugin").start()
        guest.fill(11)
        guest.stop()
        path = self.save_file(guest, "paused")
        state = guest.state()
        guest.quit()
        guest.check_image()
        self.assertEqual(guest.snapshot_names(), [])
        self.receive(guest, state, path, mapped.WAYS["direct"])

    @cases("plugin", "attach", quick=[])
    def test_no_image_at_all(self, how):
        guest = self.make_vm("newest", "microvm", plugin=how == "plugin", disks=[]).start()
        guest.fill(11)
        guest.stop()
        path = self.save_file(guest, "paused")
        state = guest.state()
        guest.kill()
        self.receive(guest, state, path, mapped.WAYS["plain"])

    @cases(("10.0", "microvm"), ("10.0", "virt"), ("newest", "microvm"), ("newest", "pc"),
           ("newest", "virt"), quick=[("newest", "microvm")])
    def test_files_of_qemu(self, qemu, machine):
        guest = self.booted(qemu, machine)
        ways = ("plain", "direct4") if Settings.quick else tuple(mapped.WAYS)
        for name, way in ((name, mapped.WAYS[name]) for name in ways):
            for offset in OFFSETS[::2] if name in ("plain", "direct") else OFFSETS[:1]:
                with self.subTest(way=name, offset=offset):
                    if guest.status() != "running":
                        guest.cont()
                    path = self.path_for(guest, "own", offset)
                    guest.stop()
                    mapped.migrate(guest, path, way, offset)
                    state = guest.state()
                    source = [path, *(["--offset", str(offset)] if offset else [])]
                    self.assertEqual(self.info_layout(*source),
                                     "mapped-ram" if way.mapped else "legacy")
                    self.assert_extracts(state, *source)
                    os.unlink(path)

    # Descriptors that somebody else opened.

    def add_fd(self, guest, path, flags, fdset=FDSET):
        """Gives QEMU a descriptor of this file, as one of a set."""
        descriptor = os.open(path, flags)
        message = ('{"execute": "add-fd", "arguments": {"fdset-id": %d}}' % fdset).encode()
        socket.send_fds(guest.qmp.socket, [message], [descriptor])
        os.close(descriptor)
        while True:
            answer = guest.qmp.read_message(20)
            if "error" in answer:
                raise QmpError(answer["error"]["desc"])
            if "return" in answer:
                return

    def make_fdset(self, guest, paths, flags):
        for path, flag in zip(paths, flags):
            self.add_fd(guest, path, flag)

    @cases(("10.0", "attach"), ("newest", "plugin"), ("newest", "attach"),
           quick=[])
    def test_fdset(self, qemu, how):
        guest = self.booted(qemu, how=how)
        guest.stop()
        path = self.path_for(guest, "set")
        self.make_fdset(guest, [path] * 2, [os.O_WRONLY, os.O_WRONLY | os.O_DIRECT])
        report = self.save_to(guest, f"file:/dev/fdset/{FDSET}", *MAPPED)
        self.assertEqual(report["layout"], "mapped-ram")
        self.assertEqual(guest.status(), "paused")
        guest.cont()
        self.assert_writes_go_on(guest)
        guest.stop()
        # A second save into the same set takes the place of the first.
        self.save_to(guest, f"file:/dev/fdset/{FDSET}", *MAPPED)
        state = guest.state()
        guest.kill()
        self.assert_extracts(state, path)
        self.receive(guest, state, path, mapped.WAYS["direct"])

    @cases("plugin", "attach", quick=[])
    def test_wrong_fdset(self, how):
        """Refused by name, where QEMU 11.1 itself ends with a segmentation fault."""
        guest = self.booted(how=how)
        one, other = self.path_for(guest, "one"), self.path_for(guest, "other")
        plain, direct = os.O_WRONLY, os.O_WRONLY | os.O_DIRECT
        args = self.save_to_args(guest, "--to", f"file:/dev/fdset/{FDSET}", *MAPPED)
        self.refused(args, "fdset")
        for paths, flags in (([one], [plain]), ([one], [direct]), ([one, one], [direct, direct]),
                             ([one, one], [plain, plain]), ([one, other], [plain, direct]),
                             ([one, one], [os.O_RDONLY, os.O_RDONLY | os.O_DIRECT])):
            with self.subTest(paths=paths, flags=flags):
                self.make_fdset(guest, paths, flags)
                self.refused(args, "descriptor")
                self.assertEqual(guest.status(), "running")
                guest.qmp.execute("remove-fd", fdset_id=FDSET)
        self.assert_writes_go_on(guest)
        self.assertEqual(os.path.getsize(one), 0)

    @cases("plugin", "attach", quick=["attach"])
    def test_given_descriptors(self, how):
        """Descriptors of the command's own process, as a manager of VMs would open them."""
        guest = self.booted(how=how)
        guest.stop()
        path, other = self.path_for(guest, "given"), self.path_for(guest, "other")
        plain = os.open(path, os.O_WRONLY)
        direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
        also_plain = os.open(path, os.O_WRONLY)
        also_direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
        wrong = os.open(other, os.O_WRONLY | os.O_DIRECT)
        opened = (plain, direct, also_plain, also_direct, wrong)
        self.addCleanup(lambda: [os.close(fd) for fd in opened])
        for pair in ((plain, wrong), (direct, also_direct), (plain, also_plain), (plain, 99)):
            with self.subTest(pair=pair):
                self.refused(self.save_to_args(guest, "--fd", str(pair[0]), "--direct-fd",
                                               str(pair[1]), *MAPPED),
                             "descriptor", pass_fds=opened)
                self.assertEqual(guest.status(), "paused")
        args = self.save_to_args(guest, "--fd", str(plain), "--direct-fd", str(direct), *MAPPED)
        self.tool(*args, pass_fds=(plain, direct))
        self.assertEqual(guest.status(), "paused")
        state = guest.state()
        guest.kill()
        self.assert_extracts(state, path)
        self.receive(guest, state, path, mapped.WAYS["direct"])

    # Failures.

    def small_folder(self, mib):
        small = os.path.join(self.folder, "small")
        os.makedirs(small)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}M", "none", small], check=True)
        self.addCleanup(subprocess.run, ["umount", "-l", small], check=True)
        return small

    @cases(*[(how, layout) for how in ("plugin", "attach") for layout in ("mapped-ram", "legacy")],
           quick=[("attach", "mapped-ram")])
    def test_no_space(self, how, layout):
        """Known beforehand or found in the middle: the guest runs again, and no file is left."""
        small = self.small_folder(300)
        guest = self.booted(how=how)
        path = os.path.join(small, "state")
        args = self.save_to_args(guest, "--to", f"file:{path}", "--layout", layout)
        process = subprocess.Popen([self.built("qvmstate"), *args, "--quiet", *SLOW],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 30
        while guest.status() == "running":
            self.assertIsNone(process.poll(), "the save ended before it stopped the guest")
            self.assertLess(time.monotonic(), deadline, "the save does not stop the guest")
            time.sleep(0.002)
        filler = os.path.join(small, "filler")
        with open(filler, "wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(1 << 20))
                except OSError:
                    break
        _, errors = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 1, errors)
        self.assertRegex(errors.lower(), "no space")
        self.assert_back(guest, small, ["filler"])
        self.refused(args, "make room")
        self.assert_back(guest, small, ["filler"])

    def assert_back(self, guest, folder, names):
        deadline = time.monotonic() + 1
        while guest.status() != "running":
            self.assertLess(time.monotonic(), deadline, f"still {guest.status()}")
            time.sleep(0.01)
        self.assert_images_active(guest)
        self.assert_writes_go_on(guest)
        guest.check()
        self.assertEqual(os.listdir(folder), names)

    @cases("plugin", "attach", quick=[])
    def test_no_such_folder(self, how):
        guest = self.booted(how=how)
        path = guest.path("missing/state")
        self.refused(self.save_to_args(guest, "--to", f"file:{path}", *MAPPED), path)
        self.refused(self.save_to_args(guest, "--to", f"file:{guest.folder}", *MAPPED), guest.folder)
        self.assertEqual(guest.status(), "running")
        self.assert_writes_go_on(guest)

    @cases("plugin", "attach", quick=[])
    def test_an_image_of_the_vm_is_no_target(self, how):
        """The state would go over the disk."""
        guest = self.booted(how=how)
        image = guest.disks[0].path
        self.refused(self.save_to_args(guest, "--to", f"file:{image}", *MAPPED), image)
        self.assertEqual(guest.status(), "running")
        guest.quit()
        guest.check_image()
