"""A QEMU whose RAM holds random bytes, for measuring: no guest system, the firmware finds nothing
to boot and idles. The bytes are put in by QEMU itself when it starts (-device loader), into RAM of
the kind that QEMU uses by default, the same way in every release."""

import json
import os
import shutil
import subprocess
import threading
import time

from qmp import Qmp

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
    """Make it in a fresh folder state: images are made anew by start()."""

    def __init__(self, qemu, folder, ram_mib, random_files, cache="none", plugin=None,
                 metadata_disk_gib=0):
        self.qemu = qemu
        self.folder = folder
        self.ram_mib = ram_mib
        self.random_files = random_files
        self.cache = cache
        self.plugin = plugin
        self.metadata_disk_gib = metadata_disk_gib
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
    def images(self):
        return [self.image] + ([self.path("large.qcow2")] if self.metadata_disk_gib else [])

    def blockdev(self, node, path):
        file = {"driver": "file", "filename": self.qemu.inner(path)}
        if self.cache == "none":
            file["cache"] = {"direct": True}
        return ["-blockdev", json.dumps({"driver": "qcow2", "node-name": node, "file": file}),
                "-device", f"virtio-blk-pci,drive={node}"]

    def start(self):
        self.remove_files()
        self.qemu.img("create", "-q", "-f", "qcow2", self.qemu.inner(self.image), "4G")
        if self.metadata_disk_gib:
            self.qemu.img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata",
                          self.qemu.inner(self.path("large.qcow2")), f"{self.metadata_disk_gib}G")
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
        for node, image in zip(("d0", "d1"), self.images):
            arguments += self.blockdev(node, image)
        if self.plugin:
            arguments += ["-plugin", f"{self.qemu.inner(self.plugin)},"
                                     f"qmp={self.qemu.inner(self.path('plugin.sock'))},"
                                     f"control={self.qemu.inner(self.path('control.sock'))}"]
        with open(self.path("qemu.log"), "wb") as log:
            self.process = subprocess.Popen(self.qemu.command("qemu-system-x86_64", *arguments),
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
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
        return sum(os.stat(image).st_blocks * 512 for image in self.images)

    def sync_images(self):
        for image in self.images:
            descriptor = os.open(image, os.O_RDONLY)
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

    def check(self, snapshot):
        """QEMU's word, after quit(), that the images are clean and hold the snapshot."""
        for image in self.images:
            self.qemu.img("check", "-q", self.qemu.inner(image))
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

    def remove_files(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder)
