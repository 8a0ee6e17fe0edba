#!/usr/bin/env python3
"""Measures saves side by side:  ./dev bench [--quick] [--rounds N] [--ram 2G] [--dir FOLDER]

In each round every contestant runs once, in an order that turns from round to round: fio, QEMU's own
savevm, and qvmstate. Each run has a fresh image and a fresh QEMU, starts with synced disks and (as
root) an empty page cache, and ends with an fsync of the image, which is part of its time. Rates are
bytes that the image grew by, over the seconds of the whole command. "of fio" compares with the mean
of the same round's fio runs, at its start and end. Numbers in the tables are medians.

Prints Markdown; build/bench.json gets every single number. Exit status: 0 all bars passed, 1 not."""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [HERE, os.path.join(SOURCE, "tests", "interop")]

import qemus  # noqa: E402  (found through the path set above)
from bare_vm import LOADED_AT_MIB, BareVM, PeakMemory, status_kib  # noqa: E402

RANDOM_FILE_MIB = 1024
MIB = 1 << 20
FIO_RATIO_MIN = 0.85
LARGE_RATIO_MAX = 1.5
MEMORY_MIB_MAX = 32
# (key, kind, QEMU, cache mode of the drive)
CONTESTANTS = [
    ("savevm-host-none", "savevm", "host", "none"),
    ("savevm-host-writeback", "savevm", "host", "writeback"),
    ("savevm-newest-none", "savevm", "newest", "none"),
    ("savevm-newest-writeback", "savevm", "newest", "writeback"),
    ("plugin-host", "plugin", "host", "none"),
    ("plugin-newest", "plugin", "newest", "none"),
    ("attach-10.0", "attach", "10.0", "none"),
    ("attach-newest", "attach", "newest", "none"),
]


def parse_size_mib(text):
    found = re.fullmatch(r"(\d+)([MG])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text}: not like 512M or 2G")
    return int(found.group(1)) * (1024 if found.group(2) == "G" else 1)


def quiet_machine():
    """The same state before each run: nothing left to write, nothing cached."""
    os.sync()
    if os.geteuid() == 0:
        with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
            file.write("3\n")


class Bench:
    def __init__(self, options):
        self.options = options
        self.folder = os.path.abspath(options.dir or os.path.join(options.build, "bench"))
        self.command = os.path.abspath(os.path.join(options.build, "qvmstate"))
        self.plugin = os.path.join(self.folder, "libqvmstate.so")
        self.qemus = {}
        self.missing = {}
        self.idle_kib = None

    def prepare(self):
        os.makedirs(self.folder, exist_ok=True)
        shutil.copy(os.path.join(self.options.build, "libqvmstate.so"), self.plugin)
        for name in qemus.NAMES:
            try:
                self.qemus[name] = qemus.find(name)
                self.qemus[name].share(self.folder)
            except qemus.Unavailable as reason:
                self.missing[name] = str(reason)
        self.idle_kib = self.measure_idle()

    def release(self, name):
        """The number of a release, for titles; its name where it is missing."""
        if name not in self.qemus:
            return name
        return "{}.{}".format(*self.qemus[name].version)

    def random_files(self, mib):
        """Together `mib` MiB; QEMU 7.2 cannot load 2 GiB from one file."""
        paths = []
        for index, done in enumerate(range(0, mib, RANDOM_FILE_MIB)):
            size = min(RANDOM_FILE_MIB, mib - done)
            paths.append((os.path.join(self.folder, f"random-{index}-{size}.bin"), size))
            if not os.path.exists(paths[-1][0]):
                with open(paths[-1][0], "wb") as file:
                    for _ in range(size):
                        file.write(os.urandom(MIB))
        return paths

    def measure_idle(self):
        """Peak memory of the command while it waits for a QEMU that never says a word."""
        path = os.path.join(self.folder, "mute.sock")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as mute:
            mute.bind(path)
            mute.listen()
            process = subprocess.Popen([self.command, "save", "idle", "--qmp", path],
                                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL)
            time.sleep(0.5)
            kib = status_kib(process.pid, "VmHWM")
            process.kill()
            process.wait()
        os.unlink(path)
        if kib is None:
            raise RuntimeError(f"{self.command} ended instead of waiting for QEMU")
        return kib

    def run_fio(self):
        path = os.path.join(self.folder, "fio.bin")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        quiet_machine()
        done = subprocess.run(
            ["fio", "--name=write", f"--filename={path}", "--rw=write", "--bs=1M", "--iodepth=8",
             f"--ioengine={self.options.fio_engine}", "--direct=1", f"--size={self.options.ram}M",
             "--end_fsync=1", "--output-format=json"],
            capture_output=True, text=True, check=False)
        os.unlink(path)
        if done.returncode != 0:
            raise RuntimeError(f"fio: {done.stderr.strip()[-300:]}")
        write = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]["write"]
        seconds = write["runtime"] / 1000
        return {"seconds": seconds, "bytes": write["io_bytes"], "rate": write["io_bytes"] / seconds}

    def run_qvmstate(self, arguments):
        """Runs the command; returns its report and its peak memory."""
        process = subprocess.Popen([self.command, *arguments, "--format", "json", "--quiet"],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        peak = PeakMemory(process.pid)
        try:
            out, error = process.communicate(timeout=600)
        finally:
            kib = peak.stop()
        if process.returncode != 0:
            raise RuntimeError(f"qvmstate {' '.join(arguments)}: {error.strip()[-500:]}")
        return json.loads(out.strip().splitlines()[-1]), kib

    def save(self, vm, kind, name):
        """One measured save of a started VM."""
        quiet_machine()
        before = vm.allocated_bytes()
        vm.qmp.execute("query-status")
        vm.qmp.events.clear()
        with open(f"/proc/{vm.process.pid}/clear_refs", "w", encoding="ascii") as file:
            file.write("5\n")  # the peak counts from here
        resident = status_kib(vm.process.pid, "VmRSS")
        report = kib = None
        start = time.monotonic()
        if kind == "savevm":
            vm.qmp.hmp_quiet(f"savevm {name}", timeout=600)
        elif kind == "plugin":
            report, _ = self.run_qvmstate(["save", name, "--control", vm.path("control.sock")])
        else:
            report, kib = self.run_qvmstate(["save", name, "--qmp", vm.path("tool.sock")])
        vm.sync_images()
        seconds = time.monotonic() - start
        if kib is None:
            memory_kib = status_kib(vm.process.pid, "VmHWM") - resident
        else:
            memory_kib = kib - self.idle_kib
        written = vm.allocated_bytes() - before
        return {"seconds": seconds, "bytes": written, "rate": written / seconds,
                "pause": vm.pause_seconds(), "memory_mib": memory_kib / 1024, "report": report}

    def run_vm(self, kind, qemu_name, cache="none", ram_mib=None, random_mib=None, saves=1,
               metadata_disk_gib=0):
        """Starts a VM, saves it, has QEMU check the result; returns one measurement a save."""
        random_mib = random_mib or self.options.ram
        vm = BareVM(self.qemus[qemu_name], os.path.join(self.folder, "vm"),
                    ram_mib or random_mib + LOADED_AT_MIB, self.random_files(random_mib), cache,
                    self.plugin if kind == "plugin" else None, metadata_disk_gib)
        try:
            vm.start()
            runs = [self.save(vm, kind, f"bench{number}") for number in range(saves)]
            vm.quit()
            vm.check("bench0")
            return runs
        finally:
            vm.quit()
            vm.remove_files()

    def clean_up(self):
        shutil.rmtree(self.folder, ignore_errors=True)


def progress(text):
    print(text, file=sys.stderr, flush=True)


def describe_machine(folder):
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        model = re.search(r"model name\s*: (.*)", file.read())
    with open("/proc/meminfo", encoding="ascii") as file:
        memory_gib = int(file.readline().split()[1]) / MIB
    mount = subprocess.run(["findmnt", "-nro", "SOURCE,FSTYPE", "-T", folder], capture_output=True,
                           text=True, check=False).stdout.split()
    device, file_system = (mount + ["unknown disk", "unknown file system"])[:2]
    disk = subprocess.run(["lsblk", "-ndo", "MODEL,SIZE,TRAN", device], capture_output=True,
                          text=True, check=False).stdout.split()
    return (f"{model.group(1) if model else platform.machine()}, {os.cpu_count()} cores, "
            f"{memory_gib:.0f} GiB; {' '.join([os.path.basename(device), *disk])}, {file_system}; "
            f"Linux {platform.release()}")


def collect_main(bench, rounds, wanted):
    """{contestant: [a measurement a round]}, {contestant: why it has none}"""
    runs = {"fio": []}
    problems = {}
    contestants = []
    for contestant in wanted:
        if contestant[2] in bench.missing:
            problems[contestant[0]] = f"skipped: {bench.missing[contestant[2]]}"
        else:
            contestants.append(contestant)
            runs[contestant[0]] = []
    for number in range(rounds):
        order = contestants[number % len(contestants):] + contestants[:number % len(contestants)]
        first = bench.run_fio()
        measured = {}
        for key, kind, qemu, cache in order:
            if key in problems:
                continue
            progress(f"round {number + 1} of {rounds}: {key}")
            try:
                measured[key] = bench.run_vm(kind, qemu, cache)[0]
            except (RuntimeError, OSError, TimeoutError) as error:
                problems[key] = f"failed: {error}"
                progress(problems[key])
        last = bench.run_fio()
        fio = {field: (first[field] + last[field]) / 2 for field in first}
        runs["fio"].append(fio)
        for key, run in measured.items():
            run["of_fio"] = run["rate"] / fio["rate"]
            runs[key].append(run)
    return runs, problems


def median(runs, field):
    values = [run[field] for run in runs if run.get(field) is not None]
    return statistics.median(values) if values else None


def number(value, pattern="{:.2f}"):
    return "" if value is None else pattern.format(value)


def row(*cells):
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


class Bars:
    """The promises, each printed with what was measured."""

    def __init__(self):
        self.lines = []
        self.missed = 0

    def add(self, holds, text):
        self.missed += 0 if holds else 1
        self.lines.append(f"- {'PASS' if holds else 'MISS'}: {text}")


def where_time_went(runs, fio_rate):
    """What limits a save of ours: the data, the rest of the pause, or the time around it."""
    reports = [run["report"] for run in runs]
    data, pause, total = (statistics.median(report[field] for report in reports)
                          for field in ("data-seconds", "pause-seconds", "total-seconds"))
    rate = median(runs, "bytes") / data if data else 0
    seconds = median(runs, "seconds")
    return (f"data {data:.2f} s ({rate / MIB:.0f} MiB/s, {100 * rate / fio_rate:.0f} % of fio), "
            f"rest of the pause {pause - data:.2f} s, before and after it {total - pause:.2f} s, "
            f"start and end of the process {seconds - total:.2f} s; {reports[0]['io-engine']}")


def report_main(bench, runs, problems, wanted, bars):
    print(row("", "seconds", "MiB/s", "of fio", "guest paused", "memory above idle"))
    print(row("---", "---:", "---:", "---:", "---:", "---:"))
    fio_rate = median(runs["fio"], "rate")
    print(row("fio, the disk itself", number(median(runs["fio"], "seconds")),
              number(fio_rate / MIB, "{:.0f}"), "100 %", "", ""))
    details = []
    for key, kind, qemu, cache in wanted:
        release = bench.release(qemu)
        title = (f"`qvmstate save`, {kind}, QEMU {release}" if kind != "savevm" else
                 f"`savevm`, QEMU {release}, cache={cache}")
        mine = runs.get(key)
        if key in problems or not mine:
            print(row(title, problems.get(key, "no run"), "", "", "", ""))
            if problems.get(key, "").startswith("failed"):
                bars.add(False, f"{title}: {problems[key]}")
            continue
        ratio, memory = median(mine, "of_fio"), max(run["memory_mib"] for run in mine)
        print(row(title, number(median(mine, "seconds")), number(median(mine, "rate") / MIB, "{:.0f}"),
                  f"{100 * ratio:.0f} %", number(median(mine, "pause"), "{:.2f} s"),
                  f"{memory:.1f} MiB"))
        if kind != "savevm":
            why = where_time_went(mine, fio_rate)
            details.append(f"- {title}: {why}")
            bars.add(ratio >= FIO_RATIO_MIN, f"{title}: {100 * ratio:.0f} % of fio, at least "
                     f"{100 * FIO_RATIO_MIN:.0f} % wanted")
            bars.add(memory <= MEMORY_MIB_MAX,
                     f"{title}: {memory:.1f} MiB above idle, at most {MEMORY_MIB_MAX} MiB wanted")
    if details:
        print("\nWhere the time went:\n\n" + "\n".join(details))


def large_guest(bench, rounds, bars):
    """A large guest of which little was touched, against a small one."""
    touched = 256 if bench.options.quick else 1024
    large = 16 * touched
    out = {}
    print(f"\nA {large // 1024} GiB guest of which {touched} MiB were touched, against one of "
          f"{touched} MiB:\n")
    print(row("", "small", "large", "ratio", "memory above idle"))
    print(row("---", "---:", "---:", "---:", "---:"))
    for kind, qemu in (("attach", "newest"), ("plugin", "newest"), ("plugin", "host")):
        if qemu in bench.missing:
            continue
        runs = {"small": [], "large": []}
        for i in range(rounds):
            for name, ram in (("small", touched + LOADED_AT_MIB), ("large", large)):
                progress(f"large guest, round {i + 1} of {rounds}: {kind} {qemu} {name}")
                runs[name] += bench.run_vm(kind, qemu, ram_mib=ram, random_mib=touched)
        small, big = median(runs["small"], "seconds"), median(runs["large"], "seconds")
        memory = max(run["memory_mib"] for run in runs["large"])
        title = f"{kind}, QEMU {bench.release(qemu)}"
        print(row(title, f"{small:.2f} s", f"{big:.2f} s", f"{big / small:.2f}", f"{memory:.1f} MiB"))
        bars.add(big / small <= LARGE_RATIO_MAX, f"large guest, {title}: {big / small:.2f} times the "
                 f"small one, at most {LARGE_RATIO_MAX} wanted")
        bars.add(memory <= MEMORY_MIB_MAX, f"large guest, {title}: {memory:.1f} MiB above idle, at "
                 f"most {MEMORY_MIB_MAX} MiB wanted")
        out[title] = runs
    return out


def metadata_disk(bench, rounds, bars):
    """What a second disk with much metadata adds, on the first save and on the next."""
    disk_gib = 10 if bench.options.quick else 100
    random_mib = 256
    runs = {"without": [], "first": [], "second": []}
    for i in range(rounds):
        progress(f"metadata disk, round {i + 1} of {rounds}")
        runs["without"] += bench.run_vm("attach", "newest", random_mib=random_mib)
        first, second = bench.run_vm("attach", "newest", random_mib=random_mib, saves=2,
                                     metadata_disk_gib=disk_gib)
        runs["first"].append(first)
        runs["second"].append(second)
    print(f"\nA second disk of {disk_gib} GiB, preallocation=metadata (attach, QEMU "
          f"{bench.release('newest')}, {random_mib} MiB of RAM):\n")
    print(row("", "guest paused", "added pause", "metadata written for the second disk",
              "memory above idle"))
    print(row("---", "---:", "---:", "---:", "---:"))
    base = median(runs["without"], "pause")
    for name, title in (("without", "without it"), ("first", "first save"), ("second", "next save")):
        pause = median(runs[name], "pause")
        memory = max(run["memory_mib"] for run in runs[name])
        written = statistics.median(run["report"]["disks"][-1]["metadata-bytes"]
                                    for run in runs[name]) if name != "without" else None
        print(row(title, f"{pause:.2f} s", f"{pause - base:.2f} s" if name != "without" else "",
                  number(written and written / MIB, "{:.1f} MiB"), f"{memory:.1f} MiB"))
        bars.add(memory <= MEMORY_MIB_MAX, f"metadata disk, {title}: {memory:.1f} MiB above idle, "
                 f"at most {MEMORY_MIB_MAX} MiB wanted")
    return runs


def serializer(bench, rounds):
    program = os.path.join(bench.options.build, "tests", "serializer_bench")
    done = subprocess.run([program, "--gib", "1" if bench.options.quick else "2", "--rounds",
                           str(rounds), "--format", "json"], capture_output=True, text=True,
                          check=False)
    if done.returncode != 0:
        raise RuntimeError(f"serializer_bench: {done.stderr.strip()}")
    cases = json.loads(done.stdout)
    print("\nThe serializer alone, into memory:\n")
    print(row("RAM seen", "zero pages", "GiB/s per core"))
    print(row("---", "---:", "---:"))
    for case in cases:
        print(row(case["ram"], f"{case['zero_percent']} %", f"{case['gib_per_second']:.2f}"))
    return cases


def main():
    parser = argparse.ArgumentParser(description="Measures saves side by side.")
    parser.add_argument("--build", default=os.path.join(SOURCE, "build"))
    parser.add_argument("--dir", help="where to write; BUILD/bench unless told")
    parser.add_argument("--rounds", type=int, help="5 unless told")
    parser.add_argument("--ram", type=parse_size_mib, help="of the guest: 2G unless told")
    parser.add_argument("--quick", action="store_true", help="2 rounds, 512M, smaller cases")
    parser.add_argument("--only", default="", metavar="TEXT", help="contestants whose name has this")
    parser.add_argument("--cases", default="main,large,metadata,serializer")
    parser.add_argument("--fio-engine", default="io_uring")
    options = parser.parse_args()
    # An end from outside, too, ends QEMU and removes the files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.ram = options.ram or (512 if options.quick else 2048)
    wanted = [contestant for contestant in CONTESTANTS if options.only in contestant[0]]
    cases = options.cases.split(",")
    if not wanted or options.rounds < 1:
        parser.error("nothing to measure")
    bench = Bench(options)
    bars = Bars()
    results = {"rounds": options.rounds, "ram_mib": options.ram}
    try:
        bench.prepare()
        results["machine"] = describe_machine(bench.folder)
        results["qemus"] = [str(qemu) for qemu in bench.qemus.values()]
        print(f"Machine: {results['machine']}\n")
        print(f"QEMU: {', '.join(results['qemus'])}\n")
        for reason in bench.missing.values():
            print(f"SKIPPED {reason}")
        if os.geteuid() != 0:
            print("Not root: the page cache is not dropped between runs.\n")
        if "main" in cases:
            print(f"{options.ram} MiB of incompressible RAM, medians of {options.rounds} rounds:\n")
            results["main"], results["problems"] = collect_main(bench, options.rounds, wanted)
            report_main(bench, results["main"], results["problems"], wanted, bars)
        if "large" in cases:
            results["large"] = large_guest(bench, options.rounds, bars)
        if "metadata" in cases and "newest" not in bench.missing:
            results["metadata"] = metadata_disk(bench, options.rounds, bars)
        if "serializer" in cases:
            results["serializer"] = serializer(bench, options.rounds)
    finally:
        bench.clean_up()
    print("\nBars:\n\n" + "\n".join(bars.lines))
    with open(os.path.join(options.build, "bench.json"), "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
    return 1 if bars.missed else 0


if __name__ == "__main__":
    sys.exit(main())
