"""The case "extract" of bench.py: RAM out of a snapshot into a file, against fio that copies as many
bytes with one job reading and one writing at the same time."""

import json
import os
import subprocess

from bare_vm import LOADED_AT_MIB, BareVM

MIB = 1 << 20
COPY_RATIO_MIN = 0.7
MEMORY_MIB_MAX = 64
KINDS = (("raw", "legacy"), ("elf", "legacy"), ("raw", "mapped-ram"), ("elf", "mapped-ram"))


def fio_copy(bench, quiet_machine):
    """Bytes a second of a copy: both jobs move all bytes, and the slower one counts."""
    paths = {way: os.path.join(bench.folder, f"fio-{way}.bin") for way in ("read", "write")}
    common = [f"--ioengine={bench.options.fio_engine}", "--direct=1", "--bs=1M", "--iodepth=8",
              f"--size={bench.options.ram}M", "--output-format=json"]
    subprocess.run(["fio", *common, "--name=make", f"--filename={paths['read']}", "--rw=write",
                    "--end_fsync=1"], capture_output=True, check=True)
    quiet_machine()
    done = subprocess.run(
        ["fio", *common, "--name=read", f"--filename={paths['read']}", "--rw=read",
         "--name=write", f"--filename={paths['write']}", "--rw=write", "--end_fsync=1"],
        capture_output=True, text=True, check=True)
    for path in paths.values():
        os.unlink(path)
    jobs = json.loads(done.stdout[done.stdout.index("{"):])["jobs"]
    seconds = max(job[way]["runtime"] for job in jobs for way in ("read", "write")) / 1000
    return bench.options.ram * MIB / seconds


def measure(bench, rounds, progress, quiet_machine):
    """{(kind, layout): [run]} and the rates of fio."""
    runs = {key: [] for key in KINDS}
    copies = []
    for layout in ("legacy", "mapped-ram"):
        progress(f"extract: saving {layout}")
        vm = BareVM(bench.qemus["newest"], os.path.join(bench.folder, "vm"),
                    bench.options.ram + LOADED_AT_MIB, bench.random_files(bench.options.ram))
        try:
            vm.start()
            vm.insert_disks()
            bench.run_qvmstate(["save", "s", "--qmp", vm.path("tool.sock"), "--layout", layout])
            vm.quit()
            for i in range(rounds):
                copies.append(fio_copy(bench, quiet_machine))
                for key in (key for key in KINDS if key[1] == layout):
                    progress(f"extract, round {i + 1} of {rounds}: {key[0]} of {layout}")
                    out = os.path.join(bench.folder, "extracted")
                    quiet_machine()
                    report, kib = bench.run_qvmstate(["extract", vm.image, "s", "--as", key[0], "-o",
                                                      out])
                    os.unlink(out)
                    runs[key].append({"seconds": report["total-seconds"],
                                      "rate": report["data-bytes"] / report["total-seconds"],
                                      "memory_mib": kib / 1024})
        finally:
            vm.quit()
            vm.remove_files()
    return runs, copies
