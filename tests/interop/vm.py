"""A virtual machine that runs the test guest: starts QEMU, talks to the guest's checker, and reads
registers and memory so that two moments can be compared byte for byte.

QEMU's process is the direct child of the test and is ended by its process id only. Every wait has a
limit. The folder of a VM holds its images, sockets and logs.
"""

import json
import os
import platform
import re
import select
import signal
import socket
import subprocess
import time
import unittest

from qmp import Qmp, QmpError

PAGE = 4096
VIRTIO_BLK = "virtio-blk-pci,drive=NODE"


class GuestError(Exception):
    """The guest did not do what it was told; the text has the end of its console."""


def clock_option():
    """Tells a guest kernel its clock rate, which under TCG is the host's. A microvm has only the PIT
    to measure it by, fails to on a busy host, and then hangs."""
    if platform.machine() != "x86_64":
        return ""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        found = re.search(r"cpu MHz\s*: ([\d.]+)", file.read())
    return f"tsc_early_khz={round(float(found.group(1)) * 1000)}" if found else ""


class Machine:
    """What differs between the kinds of machine."""

    def __init__(self, arch, console, options, vga, second_block, kernel_options=""):
        self.arch = arch
        self.console = console
        self.options = options
        self.vga = vga
        self.second_block = second_block  # "dimm", "numa" or None
        self.kernel_options = kernel_options


MACHINES = {
    "pc": Machine("x86_64", "ttyS0", ["-machine", "pc"], True, "dimm"),
    "q35": Machine("x86_64", "ttyS0", ["-machine", "q35"], True, "dimm"),
    # With PCIe, because an iothread needs ioeventfd, which virtio-mmio has only under KVM.
    "microvm": Machine("x86_64", "ttyS0", ["-machine", "microvm,pcie=on"], False, None,
                       clock_option()),
    "virt": Machine("aarch64", "ttyAMA0", ["-machine", "virt", "-cpu", "cortex-a57"], False, "numa"),
}
MEMORY_KINDS = ["private", "memfd-shared", "file-shared", "file-private", "hugepages"]


class Disk:
    """A block node and the image below it. QEMU sees the image as the node's file."""

    def __init__(self, node, path, driver="qcow2", device=VIRTIO_BLK, file=None, **options):
        self.node = node
        self.path = path
        self.driver = driver
        self.device = device
        self.file = file or {}
        self.options = options

    def arguments(self, qemu, iothread):
        iothread = iothread and self.device is not None and "virtio-blk-pci" in self.device
        file = {"driver": "file", "filename": qemu.inner(self.path), "node-name": self.node + "-file"}
        node = {"driver": self.driver, "node-name": self.node, "file": {**file, **self.file}}
        node.update({key.replace("_", "-"): value for key, value in self.options.items()})
        out = ["-blockdev", json.dumps(node)]
        if self.device is not None:
            thread = ",iothread=io0" if iothread else ""
            out += ["-device", self.device.replace("NODE", self.node) + thread]
        return out


def make_disks(qemu, folder, names=("d0", "d1"), size="64M", options="", **disk_options):
    """Makes qcow2 images with this QEMU's qemu-img and returns their Disks."""
    disks = []
    for name in names:
        path = os.path.join(folder, name + ".qcow2")
        extra = ["-o", options] if options else []
        qemu.img("create", "-q", "-f", "qcow2", *extra, qemu.inner(path), size)
        disks.append(Disk(name, path, **disk_options))
    return disks


class VM:
    """One QEMU. Start it with start(); restart() ends it and starts it again on the same images."""

    guest_mib = 96  # that the guest's checker fills and verifies

    def __init__(self, qemu, guest, folder, machine="pc", memory="private", disks=None, plugin=None,
                 accel="tcg", extra=(), kernel_options="", second_block=True, iothread=None):
        self.qemu = qemu
        self.guest = guest
        self.folder = folder
        self.machine = MACHINES[machine]
        self.memory = memory
        self.memory_options = None  # a test's own, in place of those of a kind of memory
        self.disks = make_disks(qemu, folder) if disks is None else disks
        self.plugin = plugin
        self.accel = accel
        self.extra = list(extra)
        self.kernel_options = kernel_options
        self.second_block = self.machine.second_block if second_block else None
        # From 10.0 on (10.0.13 and 11.1.3, TCG, x86) a plain stop and cont now and then ends all
        # interrupts of a virtio disk on an iothread, without any part of ours: the guest waits for
        # good. So there the disks are on one only where a test asks for it and then lets nothing
        # depend on the guest's disks after a `cont`.
        self.iothread = qemu.version < (8, 0, 0) if iothread is None else iothread
        self.process = None
        self.console = None
        self.qmp = None
        self.console_text = b""
        self.nonce = 0
        self.starts = 0
        self.guest_disks = sum(1 for disk in self.disks if disk.device == VIRTIO_BLK)
        os.makedirs(folder, exist_ok=True)

    def path(self, name):
        return os.path.join(self.folder, name)

    # The socket for qvmstate in attach mode, and that of the plugin for qvmstate.
    @property
    def tool_socket(self):
        return self.path("tool.sock")

    @property
    def control_socket(self):
        return self.path("control.sock")

    @property
    def pid(self):
        return self.process.pid

    def memory_backend(self, name, mib):
        """The -object for one block of this VM's kind of memory."""
        size = f"id={name},size={mib}M"
        file = self.path(f"ram-{name}")
        if self.memory == "private":
            return f"memory-backend-ram,{size}"
        if self.memory == "memfd-shared":
            return f"memory-backend-memfd,{size},share=on"
        if self.memory == "hugepages":
            return f"memory-backend-memfd,{size},share=on,hugetlb=on,hugetlbsize=2M"
        if os.path.exists(file):
            os.unlink(file)  # the memory of an earlier run must not show through
        share = "on" if self.memory == "file-shared" else "off"
        return f"memory-backend-file,{size},mem-path={self.qemu.inner(file)},share={share}"

    def memory_arguments(self):
        if self.memory_options is not None:
            return self.memory_options
        if self.second_block == "numa":
            return ["-m", "256M", "-object", self.memory_backend("mem0", 192), "-object",
                    self.memory_backend("mem1", 64), "-numa", "node,memdev=mem0",
                    "-numa", "node,memdev=mem1"]
        if self.second_block is None:
            out, mib = ["-m", "256M"], 256
        else:
            # Linux takes memory that is plugged in only by the 128 MiB.
            out, mib = ["-m", "128M,slots=2,maxmem=1G"], 128
        if self.memory != "private":
            out += ["-object", self.memory_backend("mem0", mib), "-machine", "memory-backend=mem0"]
        if self.second_block == "dimm":
            out += ["-object", self.memory_backend("dimm0", 128),
                    "-device", "pc-dimm,id=dimm0-device,memdev=dimm0"]
        return out

    def arguments(self, loadvm, paused, incoming=None):
        machine = self.machine
        console = machine.console
        append = (f"console={console} quiet loglevel=3 panic=-1 mitigations=off swiotlb=noforce "
                  f"memhp_default_state=online qvm.console={console} qvm.mem={self.guest_mib} "
                  f"qvm.disks={self.guest_disks} {machine.kernel_options} "
                  f"{self.kernel_options}").strip()
        out = ["-nodefaults", "-no-user-config", "-display", "none", "-smp", "2"]
        out += machine.options + ["-accel", self.accel] + self.memory_arguments()
        out += ["-kernel", self.qemu.inner(self.path("kernel")),
                "-initrd", self.qemu.inner(self.path("initrd")), "-append", append]
        if machine.vga:
            out += ["-device", "VGA"]
        for name in ("test", "tool", "plugin"):
            sock = self.qemu.inner(self.path(name + ".sock"))
            out += ["-qmp", f"unix:{sock},server=on,wait=off"]
        out += ["-serial", f"unix:{self.qemu.inner(self.path('console.sock'))},server=on,wait=off"]
        out += ["-object", "iothread,id=io0"]
        for disk in self.disks:
            out += disk.arguments(self.qemu, self.iothread)
        if self.plugin:
            out += ["-plugin", f"{self.qemu.inner(self.plugin)},"
                               f"qmp={self.qemu.inner(self.path('plugin.sock'))},"
                               f"control={self.qemu.inner(self.control_socket)}"]
        out += self.extra
        if loadvm:
            out += ["-loadvm", loadvm]
        if incoming:
            out += ["-incoming", incoming]
        if paused:
            out += ["-S"]
        return out

    def start(self, loadvm=None, paused=False, wait=True, boot_timeout=90, incoming=None):
        """Starts QEMU; waits for the guest to be ready unless it is paused, loaded or wait=False."""
        for name in ("test.sock", "tool.sock", "plugin.sock", "control.sock", "console.sock"):
            if os.path.exists(self.path(name)):
                os.unlink(self.path(name))
        for name in ("kernel", "initrd"):
            if not os.path.exists(self.path(name)):
                source = getattr(self.guest, name)
                try:
                    os.link(source, self.path(name))
                except OSError:
                    with open(source, "rb") as data, open(self.path(name), "wb") as copy:
                        copy.write(data.read())
        command = self.qemu.command(self.qemu.system(self.machine.arch),
                                    *self.arguments(loadvm, paused, incoming))
        self.starts += 1
        with open(self.path("command.txt"), "a", encoding="utf-8") as log:
            log.write(" ".join(f"'{word}'" for word in command) + "\n")
        with open(self.path(f"qemu-{self.starts}.log"), "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            start_new_session=True)
        self.console_text = b""
        deadline = time.monotonic() + 60
        while self.qmp is None:
            if self.process.poll() is not None:
                raise GuestError(f"QEMU ended with {self.process.returncode}: {self.log_tail()}")
            try:
                self.qmp = Qmp(self.path("test.sock"), timeout=0.5)
            except (OSError, ConnectionError):
                if time.monotonic() > deadline:
                    raise
        self.console = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.console.connect(self.path("console.sock"))
        if wait and not loadvm and not paused and not incoming:
            self.wait_console(rb"@start (READY|FAILED)[^\n]*\n", boot_timeout)
            if b"@start READY" not in self.console_text:
                raise GuestError(f"the guest did not start: {self.console_tail()}")
        return self

    def log_tail(self):
        with open(self.path(f"qemu-{self.starts}.log"), "rb") as log:
            return log.read()[-1000:].decode(errors="replace").strip()

    def console_tail(self):
        return self.console_text[-600:].decode(errors="replace").strip()

    def kill(self):
        """Ends QEMU at once, as a power cut would."""
        for connection in (self.qmp, self.console):
            if connection is not None:
                connection.close()
        self.qmp = self.console = None
        if self.process is not None:
            if self.process.poll() is None:
                os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=30)

    def quit(self):
        """Ends QEMU in good order, so that its images are as it leaves them: clean."""
        try:
            self.qmp.execute("quit", timeout=30)
            self.process.wait(timeout=30)
        except (TimeoutError, subprocess.TimeoutExpired):
            if self.qemu.version >= (8,):
                raise
            raise unittest.SkipTest(f"{self.qemu} hung in `quit`, as it now and then does without "
                                    "qvmstate too; what the test shows before held") from None
        finally:
            self.kill()

    def restart(self, **options):
        self.quit()
        return self.start(**options)

    def alive(self):
        return self.process is not None and self.process.poll() is None

    # The guest.

    def wait_console(self, pattern, timeout):
        deadline = time.monotonic() + timeout
        while True:
            found = re.search(pattern, self.console_text)
            if found:
                return found.group(0).decode(errors="replace")
            left = deadline - time.monotonic()
            if left <= 0:
                raise GuestError(f"no {pattern!r} within {timeout} s; console: {self.console_tail()}")
            readable, _, _ = select.select([self.console], [], [], left)
            if readable:
                data = self.console.recv(65536)
                if not data:
                    raise GuestError(f"QEMU closed the console: {self.log_tail()}")
                self.console_text += data

    def ask(self, command, timeout=60):
        """Sends a command to the checker and returns its answer. The guest must be running."""
        self.nonce += 1
        # Unique across the processes that a snapshot is loaded into.
        nonce = f"{os.getpid()}.{self.starts}.{self.nonce}"
        self.console.sendall(f"\n{nonce} {command}\n".encode())
        try:
            line = self.wait_console(rf"@{re.escape(nonce)} [^\n]*\n".encode(), timeout)
        except GuestError as error:
            raise GuestError(f"'{command}' not answered, VM {self.status()}: {error}") from error
        return line.split(" ", 1)[1].strip()

    def check(self):
        """Has the guest verify its memory and disks; returns seed, seq, pages and disk as numbers."""
        answer = self.ask("check")
        if not answer.startswith("CHECK OK "):
            raise GuestError(answer)
        return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", answer)}

    def fill(self, seed):
        self.ask(f"fill {seed}")

    def tick(self):
        """Numbers of the writes so far: to memory, and to each disk."""
        return tuple(map(int, self.ask("tick").split()[1:]))

    # QEMU.

    def status(self):
        return self.qmp.execute("query-status")["status"]

    def stop(self):
        self.qmp.execute("stop")

    def cont(self):
        self.qmp.execute("cont")

    def registers(self):
        return self.qmp.hmp("info registers -a")

    def ram_blocks(self):
        """(name, used bytes, host address or None) of every block that has a name."""
        blocks = []
        for line in self.qmp.hmp("info ramblock").splitlines()[1:]:
            # Name, page size (two words), offset, used, total[, HVA, RO]; the name may be empty.
            found = re.match(r"\s*(\S*)\s+\d+ \S+\s+0x\w+\s+0x(\w+)\s+0x\w+(?:\s+0x(\w+)\s+\S+)?", line)
            if found and found.group(1):
                address = int(found.group(3), 16) if found.group(3) else None
                blocks.append((found.group(1), int(found.group(2), 16), address))
        return blocks

    def physical_ranges(self):
        """(address, bytes) of the RAM and ROM that the CPUs see."""
        text = self.qmp.hmp("info mtree -f")
        view = next((part for part in text.split("FlatView")
                     if re.search(r'AS "memory", root: system', part)), "")
        ranges = []
        for first, last, kind in re.findall(r"(\w{16})-(\w{16}) \(prio -?\d+, (\w+)\):", view):
            if kind in ("ram", "rom"):
                ranges.append((int(first, 16), int(last, 16) - int(first, 16) + 1))
        if not ranges:
            raise RuntimeError("info mtree -f shows no RAM")
        return ranges

    def state(self):
        """The state of a stopped VM: registers, and all memory as {piece: Piece}. Reading faults
        pages in, so take it after a save, not before."""
        if self.status() == "running":
            raise RuntimeError("the VM must be stopped")
        blocks = self.ram_blocks()
        if all(address is not None for _, _, address in blocks):
            with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
                pieces = {f"block {name}": Piece(read_at(memory, address, size))
                          for name, size, address in blocks}
        else:
            pieces = self.physical_pieces()
        return State(self.registers(), pieces)

    def physical_pieces(self):
        """What the CPUs see, for QEMU before 8.0, which does not tell where its blocks are. Memory
        that is hidden below the VGA window is not among it."""
        pieces = {}
        file = self.path("piece")
        for address, size in self.physical_ranges():
            self.qmp.execute("pmemsave", val=address, size=size, filename=self.qemu.inner(file))
            with open(file, "rb") as data:
                pieces[f"physical {address:#x}+{size:#x}"] = Piece(data.read())
            os.unlink(file)
        return pieces

    # Snapshots by QEMU itself.

    def savevm(self, name):
        self.qmp.hmp_quiet(f"savevm {name}")

    def loadvm(self, name):
        self.qmp.hmp_quiet(f"loadvm {name}")

    def delvm(self, name):
        self.qmp.hmp_quiet(f"delvm {name}")

    def image_arguments(self, path):
        """How qemu-img is told of an image, with its key if it is encrypted."""
        disk = next((disk for disk in self.disks if disk.path == path), None)
        driver = "file" if disk is None else disk.file.get("driver", "file")
        options = f"driver=qcow2,file.driver={driver},file.filename={self.qemu.inner(path)}"
        if disk is not None and "encrypt" in disk.options:
            return ["--object", "secret,id=s0,data=abc", "--image-opts",
                    options + ",encrypt.format=luks,encrypt.key-secret=s0"]
        return ["--image-opts", options]

    def snapshot_names(self, path=None):
        """Names that qemu-img lists for an image, the first disk's unless told; VM may be running."""
        image = self.image_arguments(path or self.disks[0].path)
        text = self.qemu.img("snapshot", "-l", "-U", *image).stdout
        return [line.split()[1] for line in text.splitlines()[2:]]

    def check_image(self, path=None, share=False):
        """Runs qemu-img check on one image or all and raises unless each exits with 0."""
        for image in [path] if path else [disk.path for disk in self.disks if disk.driver == "qcow2"]:
            done = self.qemu.img("check", *(["-U"] if share else []), *self.image_arguments(image),
                                 check=False)
            if done.returncode != 0:
                raise AssertionError(f"qemu-img check {image}: status {done.returncode}\n"
                                     f"{done.stdout[-1500:]}{done.stderr[-500:]}")


def read_at(memory, address, size):
    data = bytearray()
    while len(data) < size:
        got = os.pread(memory.fileno(), min(size - len(data), 1 << 26), address + len(data))
        if not got:
            raise RuntimeError(f"/proc/PID/mem ends at {address + len(data):#x}")
        data += got
    return data


ZERO_PAGE = hash(bytes(PAGE))  # as it is in the sums of a piece


class Piece:
    """A fingerprint of a piece of memory: 64 bits a page, which also tell where two differ."""

    def __init__(self, data):
        data = bytes(data)
        self.sums = [hash(data[i:i + PAGE]) for i in range(0, len(data), PAGE)]


class State:
    def __init__(self, registers, pieces):
        self.registers = registers
        self.pieces = pieces

    def differences(self, other):
        """Lines that say what differs; none if the states are equal."""
        out = []
        mine, others = self.registers.splitlines(), other.registers.splitlines()
        out += [f"registers: {a!r} against {b!r}" for a, b in zip(mine, others) if a != b]
        if len(mine) != len(others):
            out.append(f"registers: {len(mine)} lines against {len(others)}")
        if self.pieces.keys() != other.pieces.keys():
            out.append(f"memory: {sorted(self.pieces)} against {sorted(other.pieces)}")
        for name in self.pieces.keys() & other.pieces.keys():
            a, b = self.pieces[name].sums, other.pieces[name].sums
            wrong = [i for i, (x, y) in enumerate(zip(a, b)) if x != y]
            if wrong or len(a) != len(b):
                where = f"{wrong[0] * PAGE:#x}" if wrong else "the end"
                out.append(f"{name}: {len(wrong)} of {len(a)} pages differ, first at {where}")
        return out


def linux_boots_under_kvm(qemu, guest, folder, timeout=20):
    """None if the guest gets ready under KVM in time, otherwise the reason why not."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "no access to /dev/kvm"
    probe = VM(qemu, guest, folder, accel="kvm", disks=[])
    try:
        probe.start(boot_timeout=timeout)
        probe.check()
        return None
    except (GuestError, QmpError, OSError) as error:
        return f"a Linux guest does not start under KVM within {timeout} s ({type(error).__name__})"
    finally:
        probe.kill()
