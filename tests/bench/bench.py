#!/usr/bin/env python3
"""Measures saves side by side:  ./dev bench [--quick] [--rounds N] [--ram 2G] [--dir FOLDER]

In each round every contestant runs once, in an order that turns from round to round: fio, QEMU's own
savevm, and qvmstate. Each run has a fresh image, starts with synced disks and (as root) an empty page
cache, and ends with an fsync of the image, which is part of its time; those that can share a QEMU
do, a fresh one in each round. Rates are bytes that the image or the file grew by, over the seconds of
the whole command. "of fio" compares with the mean of the fio runs before and after, among which each
round's contestants are spread. What takes longer than a minute and a half altogether, by what its
first run took, runs only once. CPU seconds are those of the process that does the work, a GiB of RAM
that is not zero. Numbers in the tables are medians.

Prints Markdown; build/bench.json gets every single number. Exit status: 0 all bars passed, 1 not."""

import argparse
import collections
import contextlib
import json
import os
import platform
import random
import re
import resource
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

import abi_case  # noqa: E402  (found through the path set above)
import extract_case  # noqa: E402
import incremental_case  # noqa: E402
import live_case  # noqa: E402
import offline  # noqa: E402
import qemus  # noqa: E402
from bare_vm import LOADED_AT_MIB, PAGE, BareVM, PeakMemory, status_kib  # noqa: E402
from qmp import QmpError  # noqa: E402

RANDOM_FILE_MIB = 1024
SERIALIZER_GIB_MIN = 4  # a core, of RAM in this process with so many zero pages:
SERIALIZER_ZERO_PERCENT = 25
MIB = 1 << 20
FIO_RATIO_MIN = 0.85
LARGE_RATIO_MAX = 1.5
MEMORY_MIB_MAX = 32
# What zero pages may cost, of a guest without any: the time of those in one piece, of scattered
# ones, and the space of both.
ZERO_RATIO_MAX = {"contiguous": 1 / 5, "scattered": 1 / 2}
ZERO_SPACE_MAX = 1 / 5
ZERO_PERCENT = 90
SCATTER_SEED = 20
CHANNELS = 4
CHANNELS_SWEPT = (1, 2)
FIO_GROUP = 4  # contestants between two runs of fio
SECONDS_MAX = 90  # of one contestant in all rounds, or it runs once
# kind: savevm and migrate are QEMU's own, plugin and attach ours; to: the image, or a file beside it;
# content: of the RAM, all random or 90 % zero pages.
Contestant = collections.namedtuple("Contestant", "key kind qemu cache layout to channels content",
                                    defaults=("none", "legacy", "image", CHANNELS, "random"))


def mapped_ram(key, kind, **options):
    return Contestant(f"mapped-ram-{key}", kind, "newest", layout="mapped-ram", **options)


OURS_MAPPED = [mapped_ram(f"{kind}-{to}", kind, to=to) for to in ("image", "file")
               for kind in ("plugin", "attach")]
MIGRATE = mapped_ram("migrate", "migrate", to="file")
SAVEVM = mapped_ram("savevm", "savevm")
ZERO = [ours._replace(key=f"{ours.key}-{content}", content=content) for ours in OURS_MAPPED
        for content in ZERO_RATIO_MAX]
SWEEP = [ours._replace(key=f"{ours.key}-channels-{channels}", channels=channels)
         for ours in OURS_MAPPED if ours.kind == "attach" for channels in CHANNELS_SWEPT]
CONTESTANTS = [
    Contestant("savevm-host-none", "savevm", "host"),
    Contestant("savevm-host-writeback", "savevm", "host", "writeback"),
    Contestant("savevm-newest-none", "savevm", "newest"),
    Contestant("savevm-newest-writeback", "savevm", "newest", "writeback"),
    Contestant("plugin-host", "plugin", "host"),
    Contestant("plugin-newest", "plugin", "newest"),
    Contestant("attach-10.0", "attach", "10.0"),
    Contestant("attach-newest", "attach", "newest"),
    *OURS_MAPPED, MIGRATE, SAVEVM, *ZERO, *SWEEP,
]
OURS = ("plugin", "attach")
ALL_CASES = "main,large,metadata,incremental,serializer,abi,extract,offline,live"


def compared_with(contestant):
    """Keys of the contestants without whose numbers this one's bars cannot be told."""
    if contestant.layout != "mapped-ram" or contestant.kind not in OURS:
        return set()
    return {f"{contestant.kind}-newest", f"mapped-ram-{contestant.kind}-{contestant.to}",
            MIGRATE.key, SAVEVM.key}


def choose(text):
    """The contestants whose key has the text, and those they are compared with."""
    chosen = [contestant for contestant in CONTESTANTS if text in contestant.key]
    keys = {contestant.key for contestant in chosen}.union(*map(compared_with, chosen))
    return [contestant for contestant in CONTESTANTS if contestant.key in keys]


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


def one_mib(content, place, chance):
    """A MiB of RAM; place: where it is, from 0 to 1."""
    used = 1 - ZERO_PERCENT / 100
    if content == "random" or (content == "contiguous" and place < used):
        return os.urandom(MIB)
    if content == "contiguous":
        return bytes(MIB)
    return b"".join(os.urandom(PAGE) if chance.random() < used else bytes(PAGE)
                    for _ in range(MIB // PAGE))


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

    def random_files(self, mib, content="random"):
        """Together `mib` MiB; QEMU 7.2 cannot load 2 GiB from one file."""
        paths = []
        chance = random.Random(SCATTER_SEED)
        for index, done in enumerate(range(0, mib, RANDOM_FILE_MIB)):
            size = min(RANDOM_FILE_MIB, mib - done)
            paths.append((os.path.join(self.folder, f"{content}-{index}-{size}.bin"), size))
            if not os.path.exists(paths[-1][0]):
                with open(paths[-1][0], "wb") as file:
                    for at in range(done, done + size):
                        file.write(one_mib(content, at / mib, chance))
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

    def save(self, vm, contestant, name):
        """One measured save of a started VM."""
        kind, mapped = contestant.kind, contestant.layout == "mapped-ram"
        if mapped and kind not in OURS:
            vm.set_migration(contestant.channels if kind == "migrate" else None, mapped=True)
        quiet_machine()
        before = vm.allocated_bytes()
        vm.qmp.execute("query-status")
        vm.qmp.events.clear()
        with open(f"/proc/{vm.process.pid}/clear_refs", "w", encoding="ascii") as file:
            file.write("5\n")  # the peak counts from here
        resident = status_kib(vm.process.pid, "VmRSS")
        report = kib = None
        cpu = vm.cpu_seconds() if kind != "attach" else children_cpu_seconds()
        start = time.monotonic()
        if kind == "savevm":
            vm.qmp.hmp_quiet(f"savevm {name}", timeout=600)
        elif kind == "migrate":
            vm.migrate_to_file()
        else:
            report, kib = self.run_qvmstate(self.save_arguments(vm, contestant, name))
        vm.sync_files()
        seconds = time.monotonic() - start
        cpu = (vm.cpu_seconds() if kind != "attach" else children_cpu_seconds()) - cpu
        if kind == "attach":
            memory_kib = kib - self.idle_kib
        else:
            memory_kib = status_kib(vm.process.pid, "VmHWM") - resident
        written = vm.allocated_bytes() - before
        if mapped and kind not in OURS:
            vm.set_migration()  # as it was, for the next one in this VM
        return {"seconds": seconds, "bytes": written, "rate": written / seconds,
                "pause": vm.pause_seconds(), "memory_mib": memory_kib / 1024, "report": report,
                "cpu_per_gib": cpu * 1024 / sum(mib for _, mib in vm.random_files)}

    def save_arguments(self, vm, contestant, name):
        where = (["--control", vm.path("control.sock")] if contestant.kind == "plugin" else
                 ["--qmp", vm.path("tool.sock")])
        what = [name] if contestant.to == "image" else ["--to", f"file:{vm.state_file}"]
        how = (["--layout", contestant.layout, "--channels", str(contestant.channels)]
               if contestant.layout == "mapped-ram" else [])
        return ["save", *what, *where, *how]

    @contextlib.contextmanager
    def started_vm(self, contestant, ram_mib=None, random_mib=None):
        random_mib = random_mib or self.options.ram
        vm = BareVM(self.qemus[contestant.qemu], os.path.join(self.folder, "vm"),
                    ram_mib or random_mib + LOADED_AT_MIB,
                    self.random_files(random_mib, contestant.content),
                    self.plugin if contestant.kind == "plugin" else None,
                    contestant.content == "random")
        try:
            yield vm.start()
        finally:
            vm.quit()
            vm.remove_files()

    def run(self, vm, contestant, saves=1, metadata_disk_gib=0):
        """Saves into fresh images and has QEMU check the result; one measurement a save."""
        vm.insert_disks(contestant.cache, metadata_disk_gib)
        runs = [self.save(vm, contestant, f"bench{number}") for number in range(saves)]
        if contestant.to == "file":
            vm.check_file()
        vm.remove_disks("bench0" if contestant.to == "image" else None)
        return runs

    def clean_up(self):
        shutil.rmtree(self.folder, ignore_errors=True)


def children_cpu_seconds():
    """Of all processes that ended and were waited for so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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


def vm_of(contestant):
    """Contestants with the same one can share a VM."""
    return contestant.qemu, contestant.kind == "plugin", contestant.content


def order_of(contestants, number):
    """Of one round: those of a VM together, VMs and contestants turned on by one each round."""
    groups = {}
    for contestant in contestants:
        groups.setdefault(vm_of(contestant), []).append(contestant)
    turned = turn(list(groups.values()), number)
    return [contestant for group in turned for contestant in turn(group, number)]


def turn(items, number):
    at = number % len(items)
    return items[at:] + items[:at]


class SharedVM:
    """The VM of the last contestant, for the next one if it can have the same."""

    def __init__(self, bench):
        self.bench = bench
        self.kind = None
        self.vm = None
        self.stack = contextlib.ExitStack()

    def measure(self, contestant):
        try:
            if self.kind != vm_of(contestant):
                self.close()
                self.vm = self.stack.enter_context(self.bench.started_vm(contestant))
                self.kind = vm_of(contestant)
            return self.bench.run(self.vm, contestant)[0]
        except BaseException:
            self.close()  # nobody knows in which state it is
            raise

    def close(self):
        self.kind = None
        self.stack.close()


def collect_main(bench, rounds, wanted):
    """{contestant: [a measurement a round]}, {contestant: why it has none}"""
    runs = {"fio": []}
    problems = {}
    contestants = []
    for contestant in wanted:
        if contestant.qemu in bench.missing:
            problems[contestant.key] = f"skipped: {bench.missing[contestant.qemu]}"
        else:
            contestants.append(contestant)
            runs[contestant.key] = []
    for number in range(rounds):
        order = [contestant for contestant in order_of(contestants, number)
                 if contestant.key not in problems and
                 (number == 0 or runs[contestant.key][0]["seconds"] * rounds < SECONDS_MAX)]
        shared = SharedVM(bench)
        last = bench.run_fio()
        for at in range(0, len(order), FIO_GROUP):
            first = last
            measured = {}
            for contestant in order[at:at + FIO_GROUP]:
                key = contestant.key
                progress(f"round {number + 1} of {rounds}: {key}")
                try:
                    measured[key] = shared.measure(contestant)
                except (RuntimeError, OSError, TimeoutError, ValueError, QmpError) as error:
                    problems[key] = f"failed: {error}"
                    progress(problems[key])
            last = bench.run_fio()
            fio = {field: (first[field] + last[field]) / 2 for field in first}
            runs["fio"].append(fio)
            for key, run in measured.items():
                run["of_fio"] = run["rate"] / fio["rate"]
                run["round"] = number
                runs[key].append(run)
        shared.close()
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


def title_of(bench, contestant):
    release = f"QEMU {bench.release(contestant.qemu)}"
    cache = f", cache={contestant.cache}"
    mapped = ", mapped-ram" if contestant.layout == "mapped-ram" else ""
    if contestant.kind == "migrate":
        return f"`migrate file:`, {release}{mapped}, multifd, direct-io"
    if contestant.kind == "savevm":
        return f"`savevm`, {release}{mapped or cache}"
    to = " to a file" if contestant.to == "file" else ""
    return f"`qvmstate save`{to}, {contestant.kind}, {release}{mapped}"


def report_main(bench, runs, problems, wanted, bars):
    print(row("", "seconds", "MiB/s", "of fio", "guest paused", "memory above idle", "CPU s/GiB"))
    print(row("---", "---:", "---:", "---:", "---:", "---:", "---:"))
    fio_rate = median(runs["fio"], "rate")
    print(row("fio, the disk itself", number(median(runs["fio"], "seconds")),
              number(fio_rate / MIB, "{:.0f}"), "100 %", "", "", ""))
    details = []
    for contestant in wanted:
        key, title = contestant.key, title_of(bench, contestant)
        mine = runs.get(key)
        if problems.get(key, "").startswith("failed"):
            bars.add(False, f"{key}: {problems[key]}")
        if contestant in ZERO + SWEEP:
            continue  # in tables of their own
        if key in problems or not mine:
            print(row(title, problems.get(key, "no run"), "", "", "", "", ""))
            continue
        ratio, memory = median(mine, "of_fio"), max(run["memory_mib"] for run in mine)
        print(row(title, number(median(mine, "seconds")), number(median(mine, "rate") / MIB, "{:.0f}"),
                  f"{100 * ratio:.0f} %", number(median(mine, "pause"), "{:.2f} s"),
                  f"{memory:.1f} MiB", number(median(mine, "cpu_per_gib"))))
        if contestant.kind in OURS:
            why = where_time_went(mine, fio_rate)
            details.append(f"- {title}: {why}")
            bars.add(ratio >= FIO_RATIO_MIN, f"{title}: {100 * ratio:.0f} % of fio, at least "
                     f"{100 * FIO_RATIO_MIN:.0f} % wanted")
            bars.add(memory <= MEMORY_MIB_MAX,
                     f"{title}: {memory:.1f} MiB above idle, at most {MEMORY_MIB_MAX} MiB wanted")
    if details:
        print("\nWhere the time went:\n\n" + "\n".join(details))


def ratio_of(runs, key, other, field):
    """The median over the rounds that have both; None without one."""
    others = {run["round"]: run[field] for run in runs.get(other, [])}
    ratios = [run[field] / others[run["round"]] for run in runs.get(key, [])
              if others.get(run["round"])]
    return statistics.median(ratios) if ratios else None


def percent(ratio):
    return number(ratio and 100 * ratio, "{:.0f} %")


def report_mapped_ram(bench, runs, wanted, bars):
    """What the mapped-ram layout is for, against QEMU's own ways and our legacy one, round by round."""
    ours = [contestant for contestant in wanted if contestant in OURS_MAPPED]
    if not ours:
        return
    print(f"\nThe mapped-ram layout, {CHANNELS} channels, rates and CPU against others:\n")
    print(row("", "of QEMU's `migrate file:`", "of QEMU's `savevm` with it", "CPU of our legacy's"))
    print(row("---", "---:", "---:", "---:"))
    for contestant in ours:
        title, key = title_of(bench, contestant), contestant.key
        migrate, savevm = (ratio_of(runs, key, other.key, "rate") for other in (MIGRATE, SAVEVM))
        cpu = ratio_of(runs, key, f"{contestant.kind}-newest", "cpu_per_gib")
        print(row(title, percent(migrate), percent(savevm), percent(cpu)))
        if migrate is not None:
            bars.add(migrate >= 1, f"{title}: {percent(migrate)} of QEMU's file migration, at least "
                     "100 % wanted")
        if cpu is not None:
            bars.add(cpu < 1, f"{title}: {percent(cpu)} of the CPU seconds of the legacy layout, "
                     "less than 100 % wanted")


def report_zero_pages(bench, runs, wanted, bars):
    chosen = [contestant for contestant in wanted if contestant in ZERO and runs.get(contestant.key)]
    if not chosen:
        return
    print(f"\n{ZERO_PERCENT} % touched zero pages, against the same guest without any:\n")
    print(row("", "zero pages", "seconds", "of the time", "allocated", "of the space"))
    print(row("---", "---", "---:", "---:", "---:", "---:"))
    for contestant in chosen:
        content, title = contestant.content, title_of(bench, contestant)
        full = contestant.key.removesuffix(f"-{content}")
        mine = runs[contestant.key]
        seconds, space = (ratio_of(runs, contestant.key, full, field) for field in
                          ("seconds", "bytes"))
        print(row(title, content, number(median(mine, "seconds")), percent(seconds),
                  number(median(mine, "bytes") / MIB, "{:.0f} MiB"), percent(space)))
        if seconds is None:
            continue
        most = ZERO_RATIO_MAX[content]
        bars.add(seconds <= most, f"{title}, {content} zero pages: {percent(seconds)} of the time of "
                 f"a full guest, at most {percent(most)} wanted")
        bars.add(space <= ZERO_SPACE_MAX, f"{title}, {content} zero pages: {percent(space)} of the "
                 f"space of a full guest, at most {percent(ZERO_SPACE_MAX)} wanted")


def report_channels(bench, runs, wanted):
    bases = [contestant for contestant in wanted if contestant.kind == "attach" and
             contestant in OURS_MAPPED]
    swept = [contestant for contestant in wanted if contestant in SWEEP and runs.get(contestant.key)]
    if not swept:
        return
    print("\nMore or fewer channels:\n")
    print(row("", "channels", "seconds", "MiB/s", "of fio", "CPU s/GiB"))
    print(row("---", "---:", "---:", "---:", "---:", "---:"))
    order = sorted(bases + swept, key=lambda contestant: (contestant.to != "image",
                                                          contestant.channels))
    for contestant in order:
        mine = runs.get(contestant.key)
        if mine:
            print(row(title_of(bench, contestant), contestant.channels,
                      number(median(mine, "seconds")), number(median(mine, "rate") / MIB, "{:.0f}"),
                      percent(median(mine, "of_fio")), number(median(mine, "cpu_per_gib"))))


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
                contestant = Contestant("large", kind, qemu)
                with bench.started_vm(contestant, ram, touched) as vm:
                    runs[name] += bench.run(vm, contestant)
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
    attach = Contestant("metadata", "attach", "newest")
    for i in range(rounds):
        progress(f"metadata disk, round {i + 1} of {rounds}")
        with bench.started_vm(attach, random_mib=random_mib) as vm:
            runs["without"] += bench.run(vm, attach)
            first, second = bench.run(vm, attach, saves=2, metadata_disk_gib=disk_gib)
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


def extract(bench, rounds, bars):
    """RAM out of a snapshot, at the rate of a copy."""
    runs, copies = extract_case.measure(bench, rounds, progress, quiet_machine)
    copy_rate = statistics.median(copies)
    print(f"\nRAM of {bench.options.ram} MiB out of a snapshot into a file:\n")
    print(row("", "seconds", "MiB/s", "of fio's copy", "peak memory"))
    print(row("---", "---:", "---:", "---:", "---:"))
    print(row("fio, copy", "", number(copy_rate / MIB, "{:.0f}"), "100 %", ""))
    for (kind, layout), mine in runs.items():
        rate, memory = median(mine, "rate"), max(run["memory_mib"] for run in mine)
        title = f"`extract --as {kind}`, {layout}"
        print(row(title, number(median(mine, "seconds")), number(rate / MIB, "{:.0f}"),
                  percent(rate / copy_rate), f"{memory:.1f} MiB"))
        bars.add(rate / copy_rate >= extract_case.COPY_RATIO_MIN,
                 f"{title}: {100 * rate / copy_rate:.0f} % of fio's copy, at least "
                 f"{100 * extract_case.COPY_RATIO_MIN:.0f} % wanted")
        bars.add(memory <= extract_case.MEMORY_MIB_MAX, f"{title}: {memory:.1f} MiB, at most "
                 f"{extract_case.MEMORY_MIB_MAX} MiB wanted")
    return {"copies": copies, **{" ".join(key): mine for key, mine in runs.items()}}


def serializer(bench, rounds, bars):
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
        rate = case["gib_per_second"]
        print(row(case["ram"], f"{case['zero_percent']} %", f"{rate:.2f}"))
        if case["ram"] == "in_process" and case["zero_percent"] == SERIALIZER_ZERO_PERCENT:
            bars.add(rate >= SERIALIZER_GIB_MIN, f"serializer, {case['zero_percent']} % zero pages: "
                     f"{rate:.2f} GiB/s per core, at least {SERIALIZER_GIB_MIN} wanted")
    return cases


def main():
    parser = argparse.ArgumentParser(description="Measures saves side by side.")
    parser.add_argument("--build", default=os.path.join(SOURCE, "build"))
    parser.add_argument("--dir", help="where to write; BUILD/bench unless told")
    parser.add_argument("--rounds", type=int, help="5 unless told")
    parser.add_argument("--ram", type=parse_size_mib, help="of the guest: 2G unless told")
    parser.add_argument("--quick", action="store_true", help="2 rounds, 512M, smaller cases")
    parser.add_argument("--only", default="", metavar="TEXT", help="contestants whose name has this, "
                        "and those they are compared with; only the cases main and abi unless told")
    parser.add_argument("--cases", help=f"{ALL_CASES} unless told")
    parser.add_argument("--fio-engine", default="io_uring")
    options = parser.parse_args()
    # An end from outside, too, ends QEMU and removes the files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.ram = options.ram or (512 if options.quick else 2048)
    wanted = choose(options.only)
    abi_rows = abi_case.choose(options.only)
    chosen_cases = ",".join(["main"] * bool(wanted) + ["abi"] * bool(abi_rows))
    cases = (options.cases or (chosen_cases if options.only else ALL_CASES)).split(",")
    if not (wanted or abi_rows) or options.rounds < 1:
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
            report_mapped_ram(bench, results["main"], wanted, bars)
            report_zero_pages(bench, results["main"], wanted, bars)
            report_channels(bench, results["main"], wanted)
        if "large" in cases:
            results["large"] = large_guest(bench, options.rounds, bars)
        if "metadata" in cases and "newest" not in bench.missing:
            results["metadata"] = metadata_disk(bench, options.rounds, bars)
        if "incremental" in cases and "newest" not in bench.missing:
            results["incremental"] = incremental_case.measure(bench, options.rounds, bars,
                                                              quiet_machine, row, progress)
        if "extract" in cases and "newest" not in bench.missing:
            results["extract"] = extract(bench, options.rounds, bars)
        if "serializer" in cases:
            results["serializer"] = serializer(bench, options.rounds, bars)
        if "abi" in cases:
            results["abi"] = abi_case.measure(bench, options.rounds, abi_rows, bars, quiet_machine,
                                              progress)
        if "live" in cases:
            results["live"] = live_case.measure(bench, options.rounds, bars, row, progress)
        if "offline" in cases:
            results["offline"] = offline.measure(bench, options.rounds, bars, quiet_machine, row)
    finally:
        bench.clean_up()
    print("\nBars:\n\n" + "\n".join(bars.lines))
    with open(os.path.join(options.build, "bench.json"), "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
    return 1 if bars.missed else 0


if __name__ == "__main__":
    sys.exit(main())
