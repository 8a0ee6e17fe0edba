#!/usr/bin/env python3
"""Shows the whole way on this machine:  ./dev demo [--qemu host|10.0|newest] [--live]

A Linux guest that keeps writing to its memory and two disks is saved by qvmstate, then by QEMU's own
savevm. QEMU loads what qvmstate saved, first into the running guest, whose memory was overwritten
since, then into a new process. Each time the guest verifies all its memory and disks. With --live the
guest is saved in all the ways of the plugin, and a table compares how long it stands still. The last
line says what passed; exit status 0 only then."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(SOURCE, "tests", "interop"))

import qemus  # noqa: E402  (found through the path set above)
import vm  # noqa: E402
from guest import build as guest_build  # noqa: E402

RAM_MIB = 1024
FILLED_MIB = 800
BOOT_SECONDS_MAX = 600
HVA_SINCE = (8, 0, 0)  # the first QEMU that tells where its RAM is; before, only the plugin can


class DemoVM(vm.VM):
    def memory_arguments(self):
        return ["-m", f"{RAM_MIB}M"]


class DemoError(Exception):
    pass


def say(text):
    print(text, flush=True)


def require(holds, text):
    if not holds:
        raise DemoError(text)


def sync_images(machine):
    for disk in machine.disks:
        descriptor = os.open(disk.path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def timed_save(machine, name, save):
    """Seconds of a save, to the disk, and what it returned."""
    sync_images(machine)
    start = time.monotonic()
    result = save(name)
    sync_images(machine)
    return time.monotonic() - start, result


def qvmstate_save(options, machine, *more):
    where = (["--control", machine.control_socket] if machine.plugin else
             ["--qmp", machine.tool_socket])
    command = os.path.join(os.path.abspath(options.build), "qvmstate")

    def save(name):
        done = subprocess.run([command, "save", name, *where, *more, "--format", "json",
                               "--quiet"], capture_output=True, text=True, timeout=600,
                              check=False)
        require(done.returncode == 0, f"qvmstate save: {done.stderr.strip()}")
        return json.loads(done.stdout.strip().splitlines()[-1])
    return save


def demo(options, folder):
    qemu = qemus.find(options.qemu)
    qemu.share(folder)
    by_plugin = options.live or qemu.version < HVA_SINCE
    say("fetching the guest's kernel and making its first root (kept for the next time) ...")
    guest = guest_build.get_guest(qemus.cache_folder(), "x86_64")
    reason = vm.linux_boots_under_kvm(qemu, guest, os.path.join(folder, "probe"))
    os.makedirs(os.path.join(folder, "vm"))
    plugin = None
    if by_plugin:
        plugin = shutil.copy(os.path.join(options.build, "libqvmstate.so"), folder)
    # No iothread: with one, QEMU 7.2 now and then deadlocks when it quits.
    machine = DemoVM(qemu, guest, os.path.join(folder, "vm"), plugin=plugin, second_block=False,
                     accel="tcg" if reason else "kvm", iothread=False,
                     kernel_options=f"qvm.mem={FILLED_MIB}")
    say(f"starting {qemu}, {machine.accel.upper()}, {RAM_MIB} MiB of RAM, of which the guest fills "
        f"{FILLED_MIB} MiB ...")
    try:
        machine.start(boot_timeout=BOOT_SECONDS_MAX)
        return (run_live_steps(options, machine) if options.live else
                run_steps(options, machine, by_plugin))
    finally:
        machine.kill()


def end_and_check(machine):
    """Debian 12's QEMU now and then hangs in `quit`, without qvmstate as well; what is shown here does
    not depend on its end, but a QEMU that was killed leaves images that are not worth checking."""
    try:
        machine.quit()
    except (TimeoutError, subprocess.TimeoutExpired, unittest.SkipTest):
        say("  (QEMU did not answer to `quit` and was killed: its images are not checked here)")
        return
    machine.check_image()


def run_steps(options, machine, by_plugin):
    before = machine.ask("check", timeout=BOOT_SECONDS_MAX)
    require(before.startswith("CHECK OK"), f"the guest before the save: {before}")
    how = "by its plugin in QEMU" if by_plugin else "attached to QEMU from outside"
    say(f"qvmstate save, {how} ...")
    our_seconds, report = timed_save(machine, "demo", qvmstate_save(options, machine))
    require(machine.status() == "running", "the guest does not run after the save")
    say(f"  {our_seconds:.2f} s, of which the guest stood still for {report['pause-seconds']:.2f} s")
    say("QEMU's own savevm of the same guest ...")
    savevm_seconds, _ = timed_save(machine, "by-qemu",
                                   lambda name: machine.qmp.hmp_quiet(f"savevm {name}", 600))
    say(f"  {savevm_seconds:.2f} s")
    say("the guest overwrites all its memory; then QEMU's loadvm of what qvmstate saved ...")
    machine.ask("fill 77", timeout=BOOT_SECONDS_MAX)
    changed = machine.ask("check", timeout=BOOT_SECONDS_MAX)
    require("seed=77" in changed, f"the guest after overwriting its memory: {changed}")
    machine.qmp.hmp_quiet("loadvm demo", 600)
    hot = machine.ask("check", timeout=BOOT_SECONDS_MAX)
    require(hot.startswith("CHECK OK") and "seed=1 " in hot + " ", f"the guest after loadvm: {hot}")
    say(f"  {hot}")
    say("a new QEMU, started with -loadvm ...")
    end_and_check(machine)
    machine.start(loadvm="demo")
    cold = machine.ask("check", timeout=BOOT_SECONDS_MAX)
    require(cold.startswith("CHECK OK") and "seed=1 " in cold + " ", f"the guest: {cold}")
    say(f"  {cold}")
    end_and_check(machine)
    mib = report["vmstate-bytes"] / (1 << 20)
    say(f"\n{'':24}{'seconds':>9}{'MiB/s':>8}")
    say(f"{'QEMU savevm':24}{savevm_seconds:9.2f}{mib / savevm_seconds:8.0f}")
    say(f"{'qvmstate save':24}{our_seconds:9.2f}{mib / our_seconds:8.0f}\n")
    return (f"{machine.qemu} loaded the {mib:.0f} MiB that qvmstate saved in {our_seconds:.2f} s "
            f"(savevm: {savevm_seconds:.2f} s), hot and cold; the guest found its memory and disks "
            f"right")


def observed_save(machine, name, save):
    """Seconds of it, seconds that the guest stood still, by QEMU's own clock, and bytes written."""
    def written():
        with open(f"/proc/{machine.process.pid}/io", encoding="ascii") as counters:
            return int(re.search(r"^write_bytes: (\d+)", counters.read(), re.MULTILINE).group(1))
    machine.qmp.execute("query-status")  # collects the events that came so far
    machine.qmp.events.clear()
    before = written()
    all_seconds, report = timed_save(machine, name, save)
    require(machine.status() == "running", f"the guest does not run after saving '{name}'")
    stood_seconds = 0
    for event in machine.qmp.events:
        at = event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
        stood_seconds += {"STOP": -at, "RESUME": at}.get(event["event"], 0)
    return all_seconds, stood_seconds, report["written-bytes"] if report else written() - before


def run_live_steps(options, machine):
    ways = {"savevm": ("QEMU savevm", None), "stopped": ("save", []),
            "live": ("save --live", ["--live"]),
            "base": ("save --layout stream-aligned", ["--layout", "stream-aligned"]),
            "changed": ("save --base, a second later", ["--base", "base"])}
    rows = []
    for name, (title, more) in ways.items():
        say(f"{title} ...")
        save = (qvmstate_save(options, machine, *more) if more is not None else
                lambda name: machine.qmp.hmp_quiet(f"savevm {name}", 600))
        rows.append((title, *observed_save(machine, name, save)))
        if name == "base":
            time.sleep(1)
    say("the guest overwrites all its memory; then QEMU's loadvm of each of them ...")
    machine.ask("fill 77", timeout=BOOT_SECONDS_MAX)
    for name in ways:
        machine.qmp.hmp_quiet(f"loadvm {name}", 600)
        answer = machine.ask("check", timeout=BOOT_SECONDS_MAX)
        require(answer.startswith("CHECK OK") and "seed=1 " in answer + " ",
                f"the guest after loadvm {name}: {answer}")
    end_and_check(machine)
    say(f"\n{'':30}{'guest stood, s':>16}{'all, s':>9}{'written, MiB':>14}")
    for title, seconds, stood_seconds, written in rows:
        say(f"{title:30}{stood_seconds:16.3f}{seconds:9.2f}{written / (1 << 20):14.0f}")
    say("")
    return (f"{machine.qemu} loaded all {len(ways)} snapshots; the guest found its memory and disks "
            "right each time")


def main():
    parser = argparse.ArgumentParser(description="Saves a Linux guest and has QEMU load it.")
    parser.add_argument("--build", default=os.path.join(SOURCE, "build"))
    parser.add_argument("--qemu", choices=qemus.NAMES, default="host")
    parser.add_argument("--live", action="store_true",
                        help="compare the ways to save with the plugin")
    options = parser.parse_args()
    # An end from outside, too, ends QEMU and removes the files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # Short, because a socket's path may have 107 bytes; not in /tmp, which may be memory.
    folder = tempfile.mkdtemp(prefix="qvm-demo-", dir="/var/tmp")
    try:
        if options.qemu in qemus.SUITES:
            qemus.make_chroot(options.qemu)
        say("demo passed: " + demo(options, folder))
        return 0
    except (DemoError, vm.GuestError, vm.QmpError, qemus.Unavailable, guest_build.Unavailable,
            AssertionError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        say(f"demo FAILED: {error}")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
