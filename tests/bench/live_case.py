"""The case "live" of bench.py: both pauses of a save while the guest runs, the fifth of five in a row,
beside a stopped save of the same guest; and at what rate a guest that does nothing but write to its
memory goes on while it is copied."""

import ctypes
import os
import statistics
import subprocess
import threading
import time

from bare_vm import LOADED_AT_MIB, BareVM
from incremental_case import ram_address

# Milliseconds of each pause, by GiB of RAM: with huge pages and without.
PAUSE_MS_MAX = {(2, True): 30, (8, True): 50, (2, False): 60, (8, False): 150}
SAVES = 5
RATE_RATIO_MIN = 0.7
RATE_GIB = 2
UNDISTURBED_SECONDS = 2
SAMPLE_SECONDS = 0.005

WRITER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "memory_writer.S")
WRITES_AT, PATTERN_AT = 0x500, 0x508  # of memory_writer.S
# Factor, step and mask of its writes, and whether the bar holds for them. What writes everywhere at
# once waits for most of the copy, whatever copies.
AT_RANDOM = (1664525, 1013904223)
PATTERNS = {
    "256 MiB of it, at random": ((*AT_RANDOM, (256 << 20) - 4), True),
    "all of it, in order": ((1, 64, (RATE_GIB << 30) - 4), True),
    "all of it, at random": ((*AT_RANDOM, (RATE_GIB << 30) - 4), False),
}


def without_huge_pages():
    """For the process that is about to be started, whatever madvise says."""
    pr_set_thp_disable = 41
    ctypes.CDLL(None).prctl(pr_set_thp_disable, 1, 0, 0, 0)


class BusyVM(BareVM):
    """A guest that runs memory_writer.S."""

    def build(self):
        """The guest's program, beside the files of its RAM."""
        built = os.path.join(os.path.dirname(self.folder), "memory_writer")
        subprocess.run(["as", "--32", "-o", built + ".o", WRITER], check=True)
        subprocess.run(["ld", "-m", "elf_i386", "-Ttext=0x100000", "--build-id=none", "-o", built,
                        built + ".o"], check=True)
        return built

    def start(self):
        self.extra = ["-kernel", self.qemu.inner(self.build())]
        super().start()
        self.memory = open(f"/proc/{self.process.pid}/mem", "rb+", buffering=0)
        self.ram = ram_address(self)
        return self

    def writes(self):
        self.memory.seek(self.ram + WRITES_AT)
        return int.from_bytes(self.memory.read(8), "little")

    def write_so(self, pattern):
        self.memory.seek(self.ram + PATTERN_AT)
        self.memory.write(b"".join(number.to_bytes(4, "little") for number in pattern))

    def quit(self):
        self.memory.close()
        super().quit()


class Counter(threading.Thread):
    """Looks at the guest's count all the time."""

    def __init__(self, vm):
        super().__init__()
        self.vm = vm
        self.samples = []
        self.ended = threading.Event()
        self.start()

    def run(self):
        while not self.ended.wait(SAMPLE_SECONDS):
            self.samples.append((time.time(), self.vm.writes()))

    def stop(self):
        self.ended.set()
        self.join()

    def at(self, moment):
        """Writes up to then, from the samples on both sides."""
        later = next(i for i, sample in enumerate(self.samples) if sample[0] >= moment)
        (t0, n0), (t1, n1) = self.samples[later - 1], self.samples[later]
        return n0 + (n1 - n0) * (moment - t0) / (t1 - t0)

    def rate(self, begin, end):
        return (self.at(end) - self.at(begin)) / (end - begin)


def save_arguments(vm):
    return ["save", "s", "--replace", "--control", vm.path("control.sock")]


def events(vm, name):
    """When they came, by QEMU's clock."""
    vm.qmp.execute("query-status")  # collects the events that came so far
    return [event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
            for event in vm.qmp.events if event["event"] == name]


def pauses_of_one_guest(bench, name, gib, huge):
    mib = gib * 1024
    vm = BareVM(bench.qemus[name], os.path.join(bench.folder, "vm"), mib + LOADED_AT_MIB,
                bench.random_files(mib), bench.plugin)
    vm.before_start = None if huge else without_huge_pages
    try:
        vm.start()
        vm.insert_disks()
        live = [bench.run_qvmstate([*save_arguments(vm), "--live"])[0] for _ in range(SAVES)]
        stopped = bench.run_qvmstate(save_arguments(vm))[0]
        vm.remove_disks("s")
        return {"qemu": name, "gib": gib, "huge": huge, "reports": live,
                "first": live[-1]["pauses-seconds"][0], "second": live[-1]["pauses-seconds"][1],
                "total": live[-1]["total-seconds"], "stopped": stopped["pause-seconds"]}
    finally:
        vm.quit()
        vm.remove_files()


def pauses(bench, rounds, bars, row, progress):
    print(f"\nSaves while the guest runs, the fifth of {SAVES} in a row, beside a stopped save:\n")
    print(row("", "RAM", "huge pages", "first pause", "second pause", "all", "stopped save: pause"))
    print(row("---", "---:", "---", "---:", "---:", "---:", "---:"))
    results = []
    for name in ("host", "newest"):
        if name in bench.missing:
            continue
        for (gib, huge), most in PAUSE_MS_MAX.items():
            if bench.options.quick and gib > 2:
                continue
            mine = []
            # What is large once: its five saves are alike.
            wanted = rounds if gib <= 2 else 1
            for i in range(wanted):
                progress(f"live, round {i + 1} of {wanted}: {name}, {gib} GiB, huge pages {huge}")
                mine.append(pauses_of_one_guest(bench, name, gib, huge))
            results += mine
            first, second, total, stopped = (statistics.median(run[key] for run in mine)
                                             for key in ("first", "second", "total", "stopped"))
            print(row(f"QEMU {bench.release(name)}", f"{gib} GiB", "yes" if huge else "no",
                      f"{first * 1e3:.1f} ms", f"{second * 1e3:.1f} ms", f"{total:.2f} s",
                      f"{stopped * 1e3:.0f} ms"))
            longest = max(first, second) * 1e3
            bars.add(longest <= most, f"live save, QEMU {bench.release(name)}, {gib} GiB, "
                     f"{'with' if huge else 'without'} huge pages: pause {longest:.1f} ms, at most "
                     f"{most} wanted")
    return results


def rate_of_one_guest(bench, pattern):
    mib = RATE_GIB * 1024
    vm = BusyVM(bench.qemus["newest"], os.path.join(bench.folder, "vm"), mib + LOADED_AT_MIB,
                bench.random_files(mib), bench.plugin)
    try:
        vm.start()
        vm.insert_disks()
        vm.write_so(pattern)
        time.sleep(1)
        vm.qmp.events.clear()
        counter = Counter(vm)
        begin = time.time()
        time.sleep(UNDISTURBED_SECONDS)
        end = time.time()
        report = bench.run_qvmstate([*save_arguments(vm), "--live"])[0]
        time.sleep(10 * SAMPLE_SECONDS)
        counter.stop()
        resumed, stopped = events(vm, "RESUME")[0], events(vm, "STOP")[1]
        vm.remove_disks("s")
        return {"undisturbed": counter.rate(begin + 0.1, end), "copying": counter.rate(resumed, stopped),
                "copying-seconds": stopped - resumed, "pauses": report["pauses-seconds"],
                "writes-served": report["writes-served"]}
    finally:
        vm.quit()
        vm.remove_files()


def rates(bench, rounds, bars, row, progress):
    print(f"\nWrites a second of a guest of {RATE_GIB} GiB that writes to its memory all the time, "
          f"on one CPU of {os.cpu_count()} (QEMU {bench.release('newest')}):\n")
    print(row("written to", "undisturbed", "while it is copied", "of it", "copied in",
              "longest pause"))
    print(row("---", "---:", "---:", "---:", "---:", "---:"))
    results = {}
    for name, (pattern, has_bar) in PATTERNS.items():
        mine = []
        for i in range(rounds):
            progress(f"live, rate, round {i + 1} of {rounds}: {name}")
            mine.append(rate_of_one_guest(bench, pattern))
        results[name] = mine
        before, during, seconds = (statistics.median(run[key] for run in mine) for key in
                                   ("undisturbed", "copying", "copying-seconds"))
        ratio = statistics.median(run["copying"] / run["undisturbed"] for run in mine)
        longest = statistics.median(max(run["pauses"]) for run in mine) * 1e3
        print(row(name, f"{before / 1e6:.1f} million", f"{during / 1e6:.1f} million",
                  f"{100 * ratio:.0f} %", f"{seconds:.2f} s", f"{longest:.1f} ms"))
        if has_bar:
            bars.add(ratio >= RATE_RATIO_MIN, f"live save, guest that writes to {name}: "
                     f"{100 * ratio:.0f} % of its rate, at least {100 * RATE_RATIO_MIN:.0f} % wanted")
    return results


def measure(bench, rounds, bars, row, progress):
    results = {"pauses": pauses(bench, rounds, bars, row, progress)}
    if "newest" not in bench.missing:
        results["rates"] = rates(bench, rounds, bars, row, progress)
    return results
