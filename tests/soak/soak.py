#!/usr/bin/env python3
"""Wears one live VM out:  ./dev soak [ROUNDS] [--qemu host|10.0|newest] [--how plugin|attach|both]

A Linux guest that keeps writing to its memory and two disks is saved, loaded from an older state and
relieved of a snapshot, round after round, without a restart of QEMU. After each load the guest
verifies all of its memory and disks, and tells by a seed which state it is. The images may not grow
over a bound, nor QEMU (with the plugin in it) or the saving process in memory or descriptors. At the
end qemu-img checks the images and a new QEMU loads what is left. The last line says what passed; exit
status 0 only then."""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [os.path.join(SOURCE, "tests", "interop"), os.path.join(SOURCE, "tests", "bench")]

import bare_vm  # noqa: E402  (found through the path set above)
import qemus  # noqa: E402
import vm  # noqa: E402
from guest import build as guest_build  # noqa: E402

MIB = 1 << 20
KEPT = 3  # snapshots in the images, the one to be deleted included
CHECK_EVERY = 50  # rounds; qemu-img check of the stopped VM's images
HVA_SINCE = (8, 0, 0)  # the first QEMU that can be attached to
BOOT_SECONDS_MAX = 600
# What may come on top of the highest figure of the first part of the run, in which caches, thread
# stacks and the allocator's arenas are still being filled. 1000 rounds that lose 16 KiB each are over.
DESCRIPTORS_GROWTH_MAX = 4  # connections that are just being closed
QEMU_GROWTH_MAX = 16 * MIB
PROCESS_GROWTH_MAX = 4 * MIB
RAM_MIB = 96
DISK_DATA_MIB = 2 * 256 // 16  # two disks, on which the guest uses 256 clusters of 64 KiB each
# What the images hold at most: the states, their disks and the active ones. A part more, because
# clusters that others lie around stay free for a while.
IMAGES_MAX = (KEPT * RAM_MIB + (KEPT + 1) * DISK_DATA_MIB) * 9 // 8 * MIB


class SoakError(Exception):
    pass


class SoakVM(vm.VM):
    """All of its memory is there from the start, and the translated code bounded, so that what QEMU
    takes is its own. It is small: a guest that is emulated fills and verifies 10 MiB a second."""

    guest_mib = 16

    def memory_arguments(self):
        return ["-m", f"{RAM_MIB}M",
                "-object", f"memory-backend-ram,id=mem0,size={RAM_MIB}M,prealloc=on",
                "-machine", "memory-backend=mem0"]


def say(text):
    print(text, flush=True)


def require(holds, text):
    if not holds:
        raise SoakError(text)


class Figures:
    """What is measured after each round. The first third of the run says what is normal for the
    processes; the images have a bound by what is in them."""

    LIMITS = {"descriptors": DESCRIPTORS_GROWTH_MAX, "QEMU": QEMU_GROWTH_MAX,
              "process": PROCESS_GROWTH_MAX}

    def __init__(self, rounds):
        self.settling = max(2 * KEPT, rounds // 3)
        self.first = {}
        self.last = {}

    def add(self, number, values):
        for key in ("images", "file length"):
            require(values[key] <= IMAGES_MAX,
                    f"{key}: {values[key]} bytes, at most {IMAGES_MAX} wanted")
        if number <= self.settling:
            self.first = {key: max(value, self.first.get(key, 0)) for key, value in values.items()}
            return
        self.last = {key: max(value, self.last.get(key, 0)) for key, value in values.items()}
        for key, limit in self.LIMITS.items():
            require(values[key] <= self.first[key] + limit,
                    f"{key} grew from {self.first[key]} to {values[key]}")

    def summary(self):
        def pair(key, unit):
            return f"{self.first[key] / unit:.0f} then {self.last.get(key, 0) / unit:.0f}"
        return (f"most in the first {self.settling} rounds and then: QEMU {pair('QEMU', MIB)} MiB, "
                f"{pair('descriptors', 1)} descriptors; saving process {pair('process', MIB)} MiB; "
                f"images {pair('images', MIB)} MiB")


class Soak:
    def __init__(self, machine, command, ways):
        self.machine = machine
        self.command = command
        self.ways = ways
        self.seeds = {}  # name: seed, the oldest first
        self.seed = 1  # the guest's own at its start
        self.counts = {"saves": 0, "loads": 0, "deletes": 0}
        self.process_peak = 0

    def run(self, *arguments):
        """Runs the command, which must succeed, and remembers the most memory that it took."""
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen([self.command, *arguments], stdin=subprocess.DEVNULL,
                                       stdout=output, stderr=subprocess.STDOUT)
            # Not its rusage, in which the memory of this program counts from before the exec.
            peak = bare_vm.PeakMemory(process.pid)
            process.wait()
            self.process_peak = max(self.process_peak, peak.stop() * 1024)
            output.seek(0)
            text = output.read().decode(errors="replace").strip()
        require(process.returncode == 0, f"qvmstate {' '.join(arguments)}: {text}")

    def where(self, number):
        way = self.ways[number % len(self.ways)]
        return (["--control", self.machine.control_socket] if way == "plugin" else
                ["--qmp", self.machine.tool_socket])

    def one_round(self, number):
        machine = self.machine
        self.seed = 1000 + number
        machine.ask(f"fill {self.seed}", timeout=BOOT_SECONDS_MAX)
        name = f"s{number}"
        self.run("save", name, *self.where(number), "--quiet")
        self.seeds[name] = self.seed
        self.counts["saves"] += 1
        require(machine.status() == "running", "the guest does not run after the save")

        oldest = next(iter(self.seeds))
        self.run("load", oldest, "--qmp", machine.tool_socket)
        self.seed = self.seeds[oldest]
        self.counts["loads"] += 1
        found = machine.ask("check", timeout=BOOT_SECONDS_MAX)
        require(found.startswith("CHECK OK"), f"round {number}, the guest after loading: {found}")
        require(re.search(rf"\bseed={self.seed}\b", found), f"round {number}: {found}, and not "
                f"seed {self.seed}")

        if len(self.seeds) == KEPT:
            self.run("delete", oldest, "--qmp", machine.tool_socket)
            del self.seeds[oldest]
            self.counts["deletes"] += 1
        if number % CHECK_EVERY == 0:
            machine.stop()  # QEMU writes out what it holds back
            machine.check_image(share=True)
            machine.cont()

    def measure(self):
        machine = self.machine
        with open(f"/proc/{machine.pid}/status", encoding="utf-8") as status:
            rss = int(re.search(r"VmRSS:\s+(\d+) kB", status.read()).group(1)) * 1024
        files = [os.stat(disk.path) for disk in machine.disks]
        values = {"descriptors": len(os.listdir(f"/proc/{machine.pid}/fd")), "QEMU": rss,
                  "process": self.process_peak, "images": sum(file.st_blocks * 512 for file in files),
                  "file length": sum(file.st_size for file in files)}
        self.process_peak = 0
        return values

    def end(self):
        """In new processes: the images are sound, and what is left in them loads."""
        machine = self.machine
        machine.quit()
        machine.check_image()
        for name, seed in self.seeds.items():
            machine.start(loadvm=name)
            require(machine.check()["seed"] == seed, f"snapshot {name} is another state")
            machine.quit()
        machine.check_image()


def soak(options, folder):
    qemu = qemus.find(options.qemu)
    qemu.share(folder)
    guest = guest_build.get_guest(qemus.cache_folder(), "x86_64")
    ways = ["plugin", "attach"] if options.how == "both" else [options.how]
    require(ways == ["plugin"] or qemu.version >= HVA_SINCE,
            f"{qemu} can only be saved by --how plugin")
    os.makedirs(os.path.join(folder, "vm"))
    plugin = shutil.copy(os.path.join(options.build, "libqvmstate.so"), os.path.join(folder, "vm"))
    machine = SoakVM(qemu, guest, os.path.join(folder, "vm"), machine="microvm", plugin=plugin,
                     accel="tcg,tb-size=32", iothread=False)
    say(f"starting {qemu}; {options.rounds} rounds of save ({' and '.join(ways)} in turn), load, "
        "delete")
    begin = time.monotonic()
    try:
        machine.start(boot_timeout=BOOT_SECONDS_MAX)
        run = Soak(machine, os.path.join(options.build, "qvmstate"), ways)
        figures = Figures(options.rounds)
        for number in range(1, options.rounds + 1):
            run.one_round(number)
            values = run.measure()
            if number % max(1, options.rounds // 50) == 0:
                say(f"  {number}: {time.monotonic() - begin:.0f} s; QEMU {values['QEMU'] // MIB} MiB, "
                    f"{values['descriptors']} descriptors; saving process "
                    f"{values['process'] // MIB} MiB; images {values['images'] // MIB} MiB")
            figures.add(number, values)
        run.end()
    finally:
        machine.kill()
    counts = ", ".join(f"{count} {what}" for what, count in run.counts.items())
    say(f"  {figures.summary()}")
    return f"{counts} in {time.monotonic() - begin:.0f} s on {qemu}; nothing lost, nothing grew"


def main():
    parser = argparse.ArgumentParser(description="Saves, loads and deletes on one live VM.")
    parser.add_argument("rounds", type=int, nargs="?", default=1000)
    parser.add_argument("--build", default=os.path.join(SOURCE, "build"))
    parser.add_argument("--qemu", choices=qemus.NAMES, default="newest")
    parser.add_argument("--how", choices=["plugin", "attach", "both"], default="both")
    options = parser.parse_args()
    # An end from outside, too, ends QEMU and removes the files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # Short, because a socket's path may have 107 bytes; not in /tmp, which may be memory.
    folder = tempfile.mkdtemp(prefix="qvm-soak-", dir="/var/tmp")
    try:
        say("soak passed: " + soak(options, folder))
        return 0
    except (SoakError, vm.GuestError, vm.QmpError, qemus.Unavailable, guest_build.Unavailable,
            AssertionError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        say(f"soak FAILED: {error}")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
