"""The case "incremental" of bench.py: a save of what changed since another one, against a full save
of the same guest: by the plugin, which reads what the kernel has seen written since, and attached,
where all of RAM is read. The bench itself changes pages of the idle guest's RAM between saves, as many
as one in a hundred, in runs of 64 pages or each by itself."""

import os
import random
import statistics

from bare_vm import LOADED_AT_MIB, PAGE, BareVM

MIB = 1 << 20
DIRTY_PART = 1 / 100
RUN_PAGES = {"runs of 64 pages": 64, "single pages": 1}
TIME_RATIO_MAX = {"runs of 64 pages": 1 / 10, "single pages": 1 / 4}
BYTES_RATIO_MAX = 1.2
BYTES_MORE_MAX = 4 * MIB
GROUP_PAGES = 15
SEED = 7


def ram_address(vm):
    """Where the main block lies in QEMU's process."""
    for line in vm.qmp.hmp("info ramblock").splitlines()[1:]:
        words = line.split()
        if words[0] == "pc.ram":
            return int(words[-2], 16)
    raise RuntimeError("info ramblock shows no pc.ram")


def make_dirty(vm, ram_mib, run_pages, chance):
    """Changes pages of what was loaded into RAM; how many groups of the layout they lie in."""
    first = LOADED_AT_MIB * MIB // PAGE
    pages = ram_mib * MIB // PAGE
    runs = round(pages * DIRTY_PART / run_pages)
    begins = [first + begin * run_pages for begin in chance.sample(range(pages // run_pages), runs)]
    address = ram_address(vm)
    groups = set()
    with open(f"/proc/{vm.process.pid}/mem", "rb+", buffering=0) as memory:
        for begin in begins:
            memory.seek(address + begin * PAGE)
            memory.write(os.urandom(run_pages * PAGE))
            groups.update(page // GROUP_PAGES for page in range(begin, begin + run_pages))
    return len(groups)


def timed_save(bench, vm, how, quiet_machine, *flags):
    where = (["--control", vm.path("control.sock")] if how == "plugin" else
             ["--qmp", vm.path("tool.sock")])
    quiet_machine()
    report, _ = bench.run_qvmstate(["save", *flags, *where])
    metadata = sum(disk["metadata-bytes"] for disk in report["disks"])
    if how == "plugin" and report["untracked"]:
        raise RuntimeError(f"the plugin cannot see what is written to RAM: {report['untracked']}")
    return {"seconds": report["total-seconds"], "pause": report["pause-seconds"],
            "data-seconds": report["data-seconds"],
            "read-part": report["read-groups"] / (report["read-groups"] + report["tracked-groups"]),
            "state-bytes": report["written-bytes"] - metadata, "metadata-bytes": metadata,
            "written-groups": report["written-groups"], "group-bytes": report["group-bytes"]}


def one_round(bench, how, quiet_machine, runs, chance):
    ram_mib = bench.options.ram
    vm = BareVM(bench.qemus["newest"], os.path.join(bench.folder, "vm"), ram_mib + LOADED_AT_MIB,
                bench.random_files(ram_mib), bench.plugin if how == "plugin" else None)
    try:
        vm.start()
        vm.insert_disks()
        for kind, run_pages in RUN_PAGES.items():
            full = timed_save(bench, vm, how, quiet_machine, "full", "--layout", "stream-aligned",
                              "--replace")
            dirty = make_dirty(vm, ram_mib, run_pages, chance)
            saved = timed_save(bench, vm, how, quiet_machine, kind.split()[0], "--base", "full")
            saved["full"], saved["dirty-bytes"] = full, dirty * saved["group-bytes"]
            saved["ratio"] = saved["seconds"] / full["seconds"]
            runs.setdefault((how, kind), []).append(saved)
        vm.remove_disks("full")
    finally:
        vm.quit()
        vm.remove_files()


def measure(bench, rounds, bars, quiet_machine, row, progress):
    runs = {}
    chance = random.Random(SEED)
    for number in range(rounds):
        for how in ("plugin", "attach"):
            progress(f"incremental, round {number + 1} of {rounds}: {how}")
            one_round(bench, how, quiet_machine, runs, chance)
    print(f"\n{bench.options.ram} MiB of RAM, {100 * DIRTY_PART:.0f} % of the pages changed since the "
          f"base (QEMU {bench.release('newest')}):\n")
    print(row("", "changed", "full save", "with --base", "of the time", "paused", "writing", "RAM read",
              "written", "changed clusters", "metadata"))
    print(row("---", "---", *["---:"] * 9))
    for (how, kind), mine in runs.items():
        middle = {field: statistics.median(run[field] for run in mine)
                  for field in ("seconds", "pause", "data-seconds", "read-part", "ratio",
                                "state-bytes", "dirty-bytes", "metadata-bytes")}
        full = statistics.median(run["full"]["seconds"] for run in mine)
        print(row(how, kind, f"{full:.2f} s", f"{middle['seconds']:.3f} s",
                  f"{100 * middle['ratio']:.0f} %", f"{middle['pause']:.3f} s",
                  f"{middle['data-seconds']:.3f} s", f"{100 * middle['read-part']:.0f} %",
                  *(f"{middle[field] / MIB:.1f} MiB"
                    for field in ("state-bytes", "dirty-bytes", "metadata-bytes"))))
        most = TIME_RATIO_MAX[kind]
        bars.add(middle["ratio"] <= most, f"incremental, {how}, {kind}: {100 * middle['ratio']:.0f} % "
                 f"of a full save's time, at most {100 * most:.0f} % wanted")
        bytes_max = BYTES_RATIO_MAX * middle["dirty-bytes"] + BYTES_MORE_MAX
        bars.add(middle["state-bytes"] <= bytes_max,
                 f"incremental, {how}, {kind}: {middle['state-bytes'] / MIB:.1f} MiB written, at most "
                 f"{bytes_max / MIB:.1f} MiB wanted")
    return [{"how": how, "kind": kind, "runs": mine} for (how, kind), mine in runs.items()]
