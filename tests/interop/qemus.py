"""Finds the QEMU releases that the tests run: the machine's own, and newer ones in debootstrap
chroots kept in a cache directory.

Run as a program, it makes the chroots that are missing:  python3 qemus.py [--make]

A chroot QEMU runs in a mount namespace of its own, which ends with the process, so no mount is left
behind whatever happens. The tests' folder is seen inside at the same path, or, for the tests where
every path must differ, below /mnt. Needs root; without it these QEMUs are reported as unavailable.
"""

import argparse
import glob
import os
import re
import shutil
import subprocess
import sys
import time

PACKAGES = "qemu-system-x86,qemu-system-arm,qemu-utils"
SUITES = {"10.0": ("qemu-trixie", "trixie"), "newest": ("qemu-sid", "sid")}
NAMES = ["host", "10.0", "newest"]
ENTER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "enter.py")


class Unavailable(Exception):
    """This QEMU cannot be had on this machine; the text says why."""


def cache_folder():
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.environ.get("QVMSTATE_CACHE") or os.path.join(base, "qvmstate")
    os.makedirs(folder, exist_ok=True)
    return folder


class Qemu:
    """One QEMU release. Paths given to it must be those that inner() returns."""

    def __init__(self, name, root=None):
        self.name = name
        self.root = root
        self.outer_folder = None
        self.inner_folder = None
        text = self.run("qemu-system-x86_64", "--version").stdout
        found = re.search(r"version (\d+)\.(\d+)\.(\d+)", text)
        if not found:
            raise Unavailable(f"QEMU {name}: qemu-system-x86_64 --version printed no version")
        self.version = tuple(int(part) for part in found.groups())

    def __repr__(self):
        return f"QEMU {self.name} ({'.'.join(map(str, self.version))})"

    def share(self, folder, elsewhere=False):
        """Makes a folder visible to this QEMU, at the same path or at one that differs."""
        self.outer_folder = folder
        self.inner_folder = "/mnt/other" if elsewhere and self.root else folder

    def inner(self, path):
        """The path by which this QEMU sees a file of the shared folder."""
        if self.outer_folder is None or not path.startswith(self.outer_folder + "/"):
            raise ValueError(f"{path} is not in the shared folder {self.outer_folder}")
        return self.inner_folder + path[len(self.outer_folder):]

    def command(self, program, *args):
        """The command line; it keeps its process id, so the child is QEMU itself."""
        if self.root is None:
            return [program, *args]
        if self.outer_folder is None:
            return ["chroot", self.root, program, *args]
        return [sys.executable, ENTER, self.root, self.outer_folder, self.inner_folder, program,
                *args]

    def run(self, program, *args, check=True, timeout=120):
        try:
            done = subprocess.run(self.command(program, *args), stdin=subprocess.DEVNULL,
                                  capture_output=True, text=True, timeout=timeout, check=False)
        except OSError as error:
            raise Unavailable(f"QEMU {self.name}: {program}: {error}") from error
        if check and done.returncode != 0:
            raise RuntimeError(f"{program} {' '.join(args)}: status {done.returncode}: "
                               f"{done.stderr.strip() or done.stdout.strip()}")
        return done

    def img(self, *args, **options):
        """Runs this release's qemu-img and returns the completed process. On a busy machine it may
        be unable to time a LUKS key, which says nothing about the image: then once more."""
        for _ in range(20):
            try:
                return self.run("qemu-img", *args, **options)
            except RuntimeError as error:
                if "accurate CPU usage" not in str(error):
                    raise
        return self.run("qemu-img", *args, **options)

    def system(self, arch):
        return f"qemu-system-{arch}"


def mirror():
    """The first mirror that apt on this machine is set up for and that has Debian's main archive."""
    done = subprocess.run(["apt-get", "indextargets", "--format", "$(SITE) $(COMPONENT) $(ORIGIN)",
                           "Created-By: Packages"],
                          capture_output=True, text=True, timeout=60, check=False)
    for line in done.stdout.splitlines():
        site, component, origin = (line.split() + ["", "", ""])[:3]
        if component == "main" and origin == "Debian" and "security" not in site:
            return site
    raise Unavailable("apt on this machine has no Debian mirror with main")


def make_chroot(name):
    """Debootstraps the release of this name into the cache; takes a few minutes."""
    directory, suite = SUITES[name]
    target = os.path.join(cache_folder(), directory)
    part = target + ".part"
    if os.path.isdir(target):
        return target
    if os.geteuid() != 0:
        raise Unavailable(f"QEMU {name}: making its chroot needs root")
    if shutil.which("debootstrap") is None:
        raise Unavailable(f"QEMU {name}: debootstrap is not installed")
    if os.path.isdir(part):
        raise Unavailable(f"QEMU {name}: {part} exists; remove it if no debootstrap is running")
    done = subprocess.run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, part,
                           mirror()], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=1800, check=False)
    if done.returncode != 0:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        shutil.rmtree(part, ignore_errors=True)
        raise Unavailable(f"QEMU {name}: debootstrap {suite} failed: {' '.join(last)}")
    for archive in glob.glob(os.path.join(part, "var/cache/apt/archives/*.deb")):
        os.unlink(archive)
    os.rename(part, target)
    return target


def find(name):
    """Returns the Qemu of this name ("host", "10.0", "newest") or raises Unavailable."""
    if name == "host":
        if shutil.which("qemu-system-x86_64") is None:
            raise Unavailable("QEMU host: qemu-system-x86 is not installed")
        return Qemu(name)
    target = os.path.join(cache_folder(), SUITES[name][0])
    if not os.path.isdir(target):
        raise Unavailable(f"QEMU {name}: {target} is missing; make it with "
                          f"tests/interop/qemus.py --make (root, debootstrap, a Debian mirror)")
    if os.geteuid() != 0:
        raise Unavailable(f"QEMU {name}: running it in its chroot needs root")
    return Qemu(name, target)


def main():
    parser = argparse.ArgumentParser(description="Lists, or makes, the QEMUs that the tests use.")
    parser.add_argument("--make", action="store_true", help="make the chroots that are missing")
    options = parser.parse_args()
    missing = 0
    for name in NAMES:
        try:
            if options.make and name in SUITES:
                start = time.monotonic()
                make_chroot(name)
                print(f"{name}: chroot ready after {time.monotonic() - start:.0f} s")
            print(find(name))
        except Unavailable as error:
            missing += 1
            print(error)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
