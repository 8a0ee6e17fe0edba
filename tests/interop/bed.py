"""What the tests share: the folder of a run, the QEMUs and guests found once, the command under
test, and a base class that cleans up after each test and keeps the folder of one that failed."""

import atexit
import contextlib
import fcntl
import json
import os
import shutil
import struct
import subprocess
import tempfile
import unittest

import qemus
import vm
from guest import build as guest_build

SOURCE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
OFD_GETLK = 36
LOCKS_OF_A_WRITER = [100, 101, 103, 201, 203]


class Settings:
    """Set by run.py before the tests are loaded."""

    build = os.path.join(SOURCE, "build")
    quick = False
    base = None
    guests = {}
    qemus = {}
    kvm = {}


def base_folder():
    """The folder of this run. Short, because a socket's path may have 107 bytes."""
    if Settings.base is None:
        Settings.base = tempfile.mkdtemp(prefix="qvm-")
        atexit.register(remove_if_empty, Settings.base)
    return Settings.base


def remove_if_empty(folder):
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def find_guest(arch):
    """The guest, made once; a failure is kept too, so that it is not tried again by each test."""
    if arch not in Settings.guests:
        try:
            Settings.guests[arch] = guest_build.get_guest(qemus.cache_folder(), arch)
        except guest_build.Unavailable as error:
            Settings.guests[arch] = error
    found = Settings.guests[arch]
    if isinstance(found, Exception):
        raise unittest.SkipTest(f"no {arch} guest: {found}")
    return found


def find_qemu(name, elsewhere=False):
    """A QEMU to which the folder of this run is visible; elsewhere: at another path."""
    key = (name, elsewhere)
    if key not in Settings.qemus:
        try:
            Settings.qemus[key] = qemus.find(name)
            Settings.qemus[key].share(base_folder(), elsewhere)
        except qemus.Unavailable as error:
            Settings.qemus[key] = error
    found = Settings.qemus[key]
    if isinstance(found, Exception):
        raise unittest.SkipTest(str(found))
    return found


def need_kvm():
    """Skips the test unless a Linux guest boots under KVM here; tried once, by the host's QEMU."""
    if "why not" not in Settings.kvm:
        folder = tempfile.mkdtemp(prefix="kvm", dir=base_folder())
        Settings.kvm["why not"] = vm.linux_boots_under_kvm(find_qemu("host"), find_guest("x86_64"),
                                                          folder)
        shutil.rmtree(folder, ignore_errors=True)
    if Settings.kvm["why not"]:
        raise unittest.SkipTest(Settings.kvm["why not"])


def cases(*rows, quick=None):
    """Makes one test of each row of arguments; quick: which rows a --quick run keeps."""
    def decorate(function):
        function.rows = [(row if isinstance(row, tuple) else (row,)) for row in rows]
        function.quick_rows = None if quick is None else [
            (row if isinstance(row, tuple) else (row,)) for row in quick]
        return function
    return decorate


def full_only(function):
    """For a test that a --quick run leaves out."""
    function.full_only = True
    return function


def held_locks(path):
    """Which of QEMU's lock bytes of a writer somebody holds on this file."""
    held = []
    with open(path, "rb+") as file:
        for byte in LOCKS_OF_A_WRITER:
            # struct flock: type, whence, start, length, pid
            request = struct.pack("hhxxxxqqixxxx", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            answer = fcntl.fcntl(file.fileno(), OFD_GETLK, request)
            if struct.unpack("hhxxxxqqixxxx", answer)[0] != fcntl.F_UNLCK:
                held.append(byte)
    return held


class BedTest(unittest.TestCase):
    """A test with a folder of its own, in which every VM it makes is ended when it is over."""

    longMessage = True

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        for name, function in list(vars(cls).items()):
            if hasattr(function, "rows"):
                delattr(cls, name)
                for row in function.rows:
                    cls.add_case(name, function, row)

    @classmethod
    def add_case(cls, name, function, row):
        def test(self):
            function(self, *row)
        test.__doc__ = function.__doc__
        if function.quick_rows is not None and row not in function.quick_rows:
            test.full_only = True
        words = "_".join(str(word) for word in row).replace(".", "").replace("-", "_")
        setattr(cls, f"{name}_{words}", test)

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="t", dir=base_folder())
        self.vms = []
        self.addCleanup(self.end_vms)

    def end_vms(self):
        for machine in self.vms:
            machine.kill()

    def remove_folder(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def make_vm(self, qemu="host", machine="pc", plugin=False, elsewhere=False, **options):
        """A VM in a folder of its own, not started yet."""
        release = find_qemu(qemu, elsewhere) if isinstance(qemu, str) else qemu
        guest = find_guest(vm.MACHINES[machine].arch)
        folder = os.path.join(self.folder, f"vm{len(self.vms)}")
        os.makedirs(folder)
        library = None
        if plugin:
            library = shutil.copy(self.built("libqvmstate.so"), folder)
        disks = options.pop("disks", None)
        if callable(disks):
            disks = disks(release, folder)
        made = vm.VM(release, guest, folder, machine=machine, plugin=library, disks=disks, **options)
        self.vms.append(made)
        return made

    def built(self, name):
        path = os.path.join(Settings.build, name)
        if not os.path.exists(path):
            self.fail(f"{path} is missing; build it first, or name the build folder by --build")
        return path

    # The command under test.

    def run_tool(self, *args, timeout=180, **options):
        return subprocess.run([self.built("qvmstate"), *args], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=timeout, check=False, **options)

    def save_args(self, machine, name, *flags):
        where = (["--control", machine.control_socket] if machine.plugin
                 else ["--qmp", machine.tool_socket])
        return ["save", name, *where, *flags]

    def tool(self, *args, **options):
        """Runs the command, which must succeed, and returns what it printed."""
        done = self.run_tool(*args, **options)
        self.assertEqual(done.returncode, 0, f"qvmstate {' '.join(args)}: {done.stderr}{done.stdout}")
        return done.stdout

    def extract(self, *words):
        """Into a file of the test's folder, anew; returns its path."""
        out = os.path.join(self.folder, "out")
        if os.path.exists(out):
            os.unlink(out)
        self.tool("extract", *words, "-o", out)
        return out

    def save(self, machine, name, *flags):
        """Saves by the plugin if the VM has it, else by attaching; returns the report."""
        out = self.tool(*self.save_args(machine, name, "--format", "json", "--quiet", *flags))
        report = json.loads(out.strip().splitlines()[-1])
        self.assertEqual(report["name"], name)
        self.assertEqual(report["source"], "plugin" if machine.plugin else "attach")
        return report

    def save_to(self, machine, target, *flags, **options):
        """Saves into a file outside of the VM's images; returns the report."""
        out = self.tool(*self.save_to_args(machine, "--to", target, "--format", "json", "--quiet",
                                           *flags), **options)
        report = json.loads(out.strip().splitlines()[-1])
        self.assertEqual(report["source"], "plugin" if machine.plugin else "attach")
        return report

    def save_to_args(self, machine, *flags):
        args = self.save_args(machine, "", *flags)
        args.remove("")
        return args

    def assert_extracts(self, expected, *source):
        """What `extract` makes of each block of a snapshot or file is the RAM of that state."""
        out = os.path.join(self.folder, "block")
        for name, piece in expected.pieces.items():
            block = name.removeprefix("block ")
            self.tool("extract", *source, "--as", "block", block, "-o", out)
            with open(out, "rb") as file:
                found = vm.Piece(file.read())
            self.assert_same_state(vm.State("", {name: piece}), vm.State("", {name: found}))
            os.unlink(out)

    def info_layout(self, *source):
        said = json.loads(self.tool("info", *source, "--format", "json"))
        return said["stream"]["layout"]

    def refused(self, args, *words, **options):
        """Runs the command, which must refuse: status 1, nothing on stdout, one line on stderr that
        has each of the words (in any case)."""
        done = self.run_tool(*args, **options)
        text = f"qvmstate {' '.join(args)}: status {done.returncode}\n{done.stdout}{done.stderr}"
        self.assertEqual(done.returncode, 1, text)
        self.assertEqual(done.stdout, "", text)
        lines = [line for line in done.stderr.splitlines() if "warning" not in line.lower()]
        self.assertEqual(len(lines), 1, text)
        for word in words:
            self.assertIn(word.lower(), lines[0].lower(), text)
        return lines[0]

    # What holds of a VM.

    def assert_same_state(self, expected, state):
        differences = expected.differences(state)
        self.assertEqual(differences, [], "\n".join(differences[:20]))

    def assert_writes_go_on(self, machine):
        """The guest's writers make progress, on memory and on each disk."""
        before = machine.tick()
        deadline = 200
        while deadline and not all(b > a for a, b in zip(before, machine.tick())):
            deadline -= 1
        self.assertTrue(deadline, f"the guest does not write: {before} then {machine.tick()}")

    def assert_images_active(self, machine):
        for disk in machine.disks:
            self.assertEqual(held_locks(disk.path), LOCKS_OF_A_WRITER, disk.path)

    def assert_seed(self, machine, seed):
        self.assertEqual(machine.check()["seed"], seed)
