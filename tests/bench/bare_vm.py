"""A QEMU whose RAM holds random bytes, for measuring: no guest system, the firmware finds nothing
to boot and idles. The bytes are put in by QEMU itself when it starts (-device loader), into RAM of
the kind that QEMU uses by default, the same way in every release. Its disks are block nodes without
a device, so that several saves, each with fresh images, can follow each other in one VM."""

import json
import os
import shutil
import subprocess
import threading
import time

import mapped
from qmp import Qmp

PAGE = 4096
LOADED_AT_MIB = 16  # above what the firmware uses
FIRMWARE_SECONDS = 4
SOCKET_PATH_MAX = 107


def status_kib(pid, field):
    """A field like VmHWM of /proc/PID/status; None if the process is gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith(field + ":"):
                    return int(line.split()[1])
    except (FileNotFoundError, ProcessLookupError):
        pass
    return None


class PeakMemory:
    """The peak resident memory of a process of ours, watched from outside while it runs."""

    def __init__(self, pid):
        self.pid = pid
        self.kib = 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()

    def watch(self):
        while not self.stopped.is_set():
            self.kib = max(self.kib, status_kib(self.pid, "VmHWM") or 0)
            self.stopped.wait(0.002)

    def stop(self):
        self.stopped.set()
        self.thread.join()
        return self.kib


class BareVM:
    """start(), then for each save, or several, insert_disks() and remove_disks()."""

    def __init__(self, qemu, folder, ram_mib, random_files, plugin=None, all_random=True):
        self.qemu = qemu
        self.folder = folder
        self.ram_mib = ram_mib
        self.random_files = random_files
        self.plugin = plugin
        self.all_random = all_random
        self.extra = []  # arguments of QEMU
        self.before_start = None  # what its process does first
        self.images = []
        self.process = None
        self.qmp = None

    def path(self, name):
        path = os.path.join(self.folder, name)
        if name.endswith(".sock") and len(path.encode()) > SOCKET_PATH_MAX:
            raise ValueError(f"{path}: too long for a socket; choose a shorter --dir")
        return path

    @property
    def image(self):
        return self.path("disk.qcow2")

    @property
    def state_file(self):
        """Where a save that does not go into the image goes."""
        return self.path("state.mig")

    def written_files(self):
        return self.images + ([self.state_file] if os.path.exists(self.state_file) else [])

    def insert_disks(self, cache="none", metadata_disk_gib=0):
        """Fresh images: a small one, and one with as much preallocated metadata as wanted."""
        self.insert_disk(self.image, "4G", cache)
        if metadata_disk_gib:
            self.insert_disk(self.path("large.qcow2"), f"{metadata_disk_gib}G", cache,
                             "-o", "preallocation=metadata")

    def insert_disk(self, path, size, cache, *options):
        self.qemu.img("create", "-q", "-f", "qcow2", *options, self.qemu.inner(path), size)
        self.qmp.execute("blockdev-add", driver="qcow2", **{"node-name": f"d{len(self.images)}"},
                         file={"driver": "file", "filename": self.qemu.inner(path),
                               "cache": {"direct": cache == "none"}})
        self.images.append(path)

    def remove_disks(self, snapshot=None):
        """Closes the images, has QEMU check them, and removes them and what was saved beside."""
        for number in range(len(self.images)):
            self.qmp.execute("blockdev-del", **{"node-name": f"d{number}"})
        self.check(snapshot)
        for path in self.written_files():
            os.unlink(path)
        self.images = []

    def start(self):
        self.remove_files()
        arguments = ["-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc",
                     "-accel", "tcg", "-m", f"{self.ram_mib}M"]
        at_mib = LOADED_AT_MIB
        for path, mib in self.random_files:
            arguments += ["-device", f"loader,file={self.qemu.inner(path)},force-raw=on,"
                                     f"addr={at_mib << 20:#x}"]
            at_mib += mib
        for name in ("bench", "tool", "plugin"):
            sock = self.qemu.inner(self.path(name + ".sock"))
            arguments += ["-qmp", f"unix:{sock},server=on,wait=off"]
        if self.plugin:
            arguments += ["-plugin", f"{self.qemu.inner(self.plugin)},"
                                     f"qmp={self.qemu.inner(self.path('plugin.sock'))},"
                                     f"control={self.qemu.inner(self.path('control.sock'))}"]
        arguments += self.extra
        with open(self.path("qemu.log"), "wb") as log:
            self.process = subprocess.Popen(self.qemu.command("qemu-system-x86_64", *arguments),
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            preexec_fn=self.before_start)
        deadline = time.monotonic() + 120
        while self.qmp is None:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.qemu} ended: {self.log()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.qemu}: no QMP within 120 s")
            try:
                self.qmp = Qmp(self.path("bench.sock"), timeout=1)
            except (OSError, ConnectionError):
                pass
        # Until the firmware has given up booting and, with the plugin, its socket is there.
        deadline = time.monotonic() + 30
        time.sleep(FIRMWARE_SECONDS)
        while self.plugin and not os.path.exists(self.path("control.sock")):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.qemu}: the plugin made no control socket: {self.log()}")
            time.sleep(0.05)
        return self

    def log(self):
        with open(self.path("qemu.log"), encoding="utf-8", errors="replace") as file:
            return file.read()[-500:].strip()

    def allocated_bytes(self):
        return sum(os.stat(path).st_blocks * 512 for path in self.written_files())

    def cpu_seconds(self):
        """Of QEMU so far, all its threads together."""
        with open(f"/proc/{self.process.pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def sync_files(self):
        for path in self.written_files():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def pause_seconds(self):
        """Of the last pause, by the times that QEMU gives its events; None without one."""
        self.qmp.execute("query-status")  # collects the events that came so far
        times = {}
        for event in self.qmp.events:
            if event["event"] in ("STOP", "RESUME"):
                stamp = event["timestamp"]
                times[event["event"]] = stamp["seconds"] + stamp["microseconds"] / 1e6
        if times.keys() != {"STOP", "RESUME"}:
            return None
        return times["RESUME"] - times["STOP"]

    def set_migration(self, channels=None, mapped=False):
        """How QEMU writes from now on; channels: those of multifd, with O_DIRECT."""
        states = {"mapped-ram": mapped, "multifd": channels is not None}
        self.qmp.execute("migrate-set-capabilities", capabilities=[
            {"capability": name, "state": state} for name, state in states.items()])
        if channels is not None:
            self.qmp.execute("migrate-set-parameters", multifd_channels=channels, direct_io=True,
                             max_bandwidth=1 << 40)

    def migrate_to_file(self):
        """QEMU's own way to have the state in a file and go on. Returns when the guest runs."""
        self.qmp.execute("migrate", uri=f"file:{self.qemu.inner(self.state_file)}")
        deadline = time.monotonic() + 600
        while True:
            info = self.qmp.execute("query-migrate")
            if info.get("status") == "completed":
                break
            if info.get("status") in ("failed", "cancelled") or time.monotonic() > deadline:
                raise RuntimeError(f"migrate: {info.get('error-desc', info.get('status'))}")
            time.sleep(0.002)
        self.qmp.execute("cont")

    def check_file(self):
        """That each block of RAM is in the file, and how many pages of all are stored."""
        file = mapped.MappedFile(self.state_file)
        pages = sum(sum(file.bits(block)) for block in file.blocks)
        data = sum(mib for _, mib in self.random_files) << 20
        if file.blocks[0].size != self.ram_mib << 20:
            raise RuntimeError(f"{self.state_file}: the first block is {file.blocks[0]}")
        if self.all_random and pages * PAGE < data:
            raise RuntimeError(f"{self.state_file}: {pages} pages are stored, of {data // PAGE}")

    def check(self, snapshot):
        """QEMU's word that the closed images are clean and hold the snapshot, if any."""
        for image in self.images:
            self.qemu.img("check", "-q", self.qemu.inner(image))
        if snapshot is None:
            return
        listed = self.qemu.img("snapshot", "-l", self.qemu.inner(self.image)).stdout
        if snapshot not in listed.split():
            raise RuntimeError(f"qemu-img does not list snapshot {snapshot}: {listed.strip()}")

    def quit(self):
        if self.process is None:
            return
        try:
            if self.process.poll() is None and self.qmp is not None:
                self.qmp.execute("quit")
                self.process.wait(timeout=30)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            pass  # it is killed below
        if self.qmp is not None:
            self.qmp.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process = self.qmp = None
        self.images = []

    def remove_files(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder)
