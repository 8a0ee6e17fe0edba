"""The C ABI in the benchmark: a host with much RAM (half random, a quarter zero, a quarter like
text) that saves and loads through the plugin, fio on the same disk before and after each, the same
stream written by write(2) in pieces of 32 KiB, and how long the kernel alone needs to provide the
memory that a load into new memory fills."""

import contextlib
import json
import os
import statistics
import subprocess

GIB = 1 << 30
MIB = 1 << 20
RATIO_MIN = 0.85
LAYOUTS = ("legacy", "mapped-ram")
KEYS = [f"abi-{layout}-{what}" for layout in LAYOUTS for what in ("save", "load", "load-new")]
KEYS += ["abi-naive", "abi-touch"]


def choose(text):
    """The rows to measure. What is loaded has to be saved first, and new memory be had."""
    chosen = {key for key in KEYS if text in key}
    chosen |= {"abi-touch" for key in chosen if key.endswith("-new")}
    chosen |= {key.split("-load")[0] + "-save" for key in chosen if "-load" in key}
    return [key for key in KEYS if key in chosen]


class AbiCase:
    def __init__(self, bench, quiet_machine):
        self.folder = bench.folder
        self.plugin = bench.plugin
        self.host = os.path.join(bench.options.build, "tests", "abi_host")
        self.fio_engine = bench.options.fio_engine
        self.gib = 1 if bench.options.quick else 4
        self.quiet_machine = quiet_machine

    def path(self, name):
        return os.path.join(self.folder, name)

    def run_fio(self, kind, mib):
        """Bytes a second. A file to read is written once."""
        path = self.path("abi-fio.bin")
        if kind == "write":
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self.quiet_machine()
        done = subprocess.run(
            ["fio", f"--name={kind}", f"--filename={path}", f"--rw={kind}", "--bs=1M",
             "--iodepth=8", f"--ioengine={self.fio_engine}", "--direct=1", f"--size={mib}M",
             "--end_fsync=1", "--output-format=json"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"fio: {done.stderr.strip()[-300:]}")
        job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0][kind]
        return job["io_bytes"] / (job["runtime"] / 1000)

    def run_host(self, what, path, *more):
        process = subprocess.Popen([self.host, self.plugin, what, path, str(self.gib), *more],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        if process.stdout.readline() == "ready\n":
            self.quiet_machine()
        out, error = process.communicate("go\n", timeout=600)
        if process.returncode != 0:
            raise RuntimeError(f"abi_host {what}: {error.strip()}")
        return json.loads(out)

    def measure(self, key):
        """One row: its seconds, bytes, rate, and how the rate compares with fio's around it."""
        layout = "legacy" if "legacy" in key else "mapped-ram"
        image = self.path(f"abi-{layout}.qcow2")
        kind = "read" if "-load" in key or key == "abi-touch" else "write"
        mib = self.gib * 1024 * 3 // 4
        # In a virtual machine the time to touch memory depends on what ran before.
        before = self.run_fio(kind, mib)
        if key == "abi-touch":
            return self.run_host("touch", "-")
        if key == "abi-naive":
            run = self.run_host("naive", self.path("abi-naive.bin"))
            os.unlink(self.path("abi-naive.bin"))
        elif kind == "write":
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1G"], check=True)
            run = self.run_host("save", image, layout)
            subprocess.run(["qemu-img", "check", "-q", image], check=True)
        else:
            # In memory that was never touched, the kernel clears each page before it is filled.
            run = self.run_host("load", image, *(["new"] if key.endswith("-new") else []))
            run["bytes"] = os.stat(image).st_blocks * 512
        fio = (before + self.run_fio(kind, mib)) / 2
        run["rate"] = run["bytes"] / run["seconds"]
        run["of_fio"] = run["rate"] / fio
        return run


def middle(runs, field):
    return statistics.median(run[field] for run in runs) if runs else None


def measure(bench, rounds, keys, bars, quiet_machine, progress):
    """{key: [a measurement a round]}; prints a table."""
    case = AbiCase(bench, quiet_machine)
    runs = {key: [] for key in keys}
    for number in range(rounds):
        for key in keys:
            progress(f"C ABI, round {number + 1} of {rounds}: {key}")
            runs[key].append(case.measure(key))
    print(f"\nA host of the C ABI with {case.gib} GiB of RAM (half random, a quarter zero, a quarter "
          f"like text), medians of {rounds} rounds:\n")
    print("|  | seconds | MiB/s | of fio | RAM, GiB/s | CPU s/GiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    touch = middle(runs.get("abi-touch"), "seconds")
    for key, mine in runs.items():
        seconds, cpu = middle(mine, "seconds"), middle(mine, "cpu")
        if key == "abi-touch":
            print(f"| touching as much new memory, two threads, no transfer | {seconds:.2f} | | | "
                  f"{case.gib / seconds:.2f} | {cpu / case.gib:.2f} |")
            continue
        rate, of_fio = middle(mine, "rate"), middle(mine, "of_fio")
        title = ("`write(2)` of the legacy stream, 32 KiB each" if key == "abi-naive" else
                 key.removeprefix("abi-").replace("-save", ", save")
                 .replace("-load", ", load").replace("-new", " into untouched memory"))
        print(f"| {title} | {seconds:.2f} | {rate / MIB:.0f} | {100 * of_fio:.0f} % | "
              f"{case.gib / seconds:.2f} | {cpu / case.gib:.2f} |")
        if key != "abi-naive":
            limit = (f"; the kernel alone takes {touch:.2f} s for that memory, this {seconds:.2f} s"
                     if touch and key.endswith("-new") else "")
            bars.add(of_fio >= RATIO_MIN, f"C ABI, {title}: {100 * of_fio:.0f} % of fio, at least "
                     f"{100 * RATIO_MIN:.0f} % wanted{limit}")
    return runs
