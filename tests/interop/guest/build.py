"""Makes the test guest: Debian's cloud kernel and an initramfs with busybox, the virtio modules and
the checker, for x86_64 and aarch64.

The packages come from the mirror that apt on this machine is set up for. The packages of the other
architecture come through a private apt configuration, so the machine's own dpkg never hears of it.
Everything is kept in the cache directory, keyed by the text of the checker and init.
"""

import fcntl
import glob
import hashlib
import os
import shutil
import stat
import subprocess
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
DEB_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}
COMPILER = {"x86_64": "gcc", "aarch64": "aarch64-linux-gnu-gcc"}
# In the order of their dependencies; the package ships no modules.dep.
MODULES = ["virtio/virtio_ring", "virtio/virtio", "virtio/virtio_pci_legacy_dev",
           "virtio/virtio_pci_modern_dev", "virtio/virtio_pci", "virtio/virtio_mmio",
           "block/virtio_blk"]


class Unavailable(Exception):
    """The guest cannot be made on this machine; the text says why."""


class Guest(NamedTuple):
    arch: str
    kernel: str
    initrd: str


def run(command, **options):
    """Runs a command and returns its output; raises Unavailable with its last line of complaint."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=600, check=False, **options)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise Unavailable(f"{' '.join(command[:2])}: {lines[-1]}")
    return done.stdout


def apt_options(cache, deb_arch):
    """Options that make apt work for another architecture without the machine's dpkg knowing."""
    root = os.path.join(cache, f"apt-{deb_arch}")
    for folder in ("state/lists/partial", "cache/archives/partial"):
        os.makedirs(os.path.join(root, folder), exist_ok=True)
    status = os.path.join(root, "status")
    with open(status, "a", encoding="utf-8"):
        pass
    return ["-o", f"APT::Architecture={deb_arch}", "-o", f"APT::Architectures::={deb_arch}",
            "-o", "APT::Sandbox::User=root", "-o", f"Dir::State={root}/state",
            "-o", f"Dir::State::status={status}", "-o", f"Dir::Cache={root}/cache"]


def fetch_package(options, package, folder):
    """Downloads one package and unpacks it below folder."""
    run(["apt-get", *options, "download", package], cwd=folder)
    archives = glob.glob(os.path.join(folder, "*.deb"))
    if len(archives) != 1:
        raise Unavailable(f"apt-get download {package}: {len(archives)} files came")
    run(["dpkg-deb", "-x", archives[0], folder])
    os.unlink(archives[0])


def fetch_packages(cache, arch):
    """Returns a folder with the unpacked kernel and busybox packages."""
    deb_arch = DEB_ARCH[arch]
    folder = os.path.join(cache, f"packages-{arch}")
    if os.path.isdir(folder):
        return folder
    options = apt_options(cache, deb_arch)
    run(["apt-get", *options, "update"])
    depends = run(["apt-cache", *options, "depends", "--important", f"linux-image-cloud-{deb_arch}"])
    kernels = [line.split()[-1] for line in depends.splitlines() if "Depends: linux-image-" in line]
    if not kernels:
        raise Unavailable(f"linux-image-cloud-{deb_arch} names no kernel package")
    part = folder + ".part"
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    fetch_package(options, kernels[0], part)
    fetch_package(options, "busybox-static", part)
    os.rename(part, folder)
    return folder


def only(pattern):
    found = glob.glob(pattern)
    if len(found) != 1:
        raise Unavailable(f"{pattern}: {len(found)} files found, 1 expected")
    return found[0]


class Cpio:
    """An archive in the 'newc' format, which the kernel unpacks as its first root."""

    def __init__(self):
        self.data = bytearray()
        self.inode = 0

    def add(self, name, mode, content=b"", device=(0, 0)):
        self.inode += 1
        encoded = name.encode() + b"\0"
        fields = [self.inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0]
        self.data += b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
        self.data += bytes(-len(self.data) % 4)
        self.data += content
        self.data += bytes(-len(self.data) % 4)

    def add_folder(self, name):
        self.add(name, stat.S_IFDIR | 0o755)

    def add_file(self, name, path):
        with open(path, "rb") as file:
            self.add(name, stat.S_IFREG | 0o755, file.read())

    def finish(self):
        self.add("TRAILER!!!", 0)
        return bytes(self.data)


def make_initrd(packages, arch, folder):
    checker = os.path.join(folder, "checker")
    run([COMPILER[arch], "-O2", "-Wall", "-Wextra", "-Wno-format-truncation", "-static", "-pthread",
         os.path.join(HERE, "checker.c"), "-o", checker])
    archive = Cpio()
    for name in ("bin", "dev", "proc", "sys", "modules"):
        archive.add_folder(name)
    archive.add_file("init", os.path.join(HERE, "init"))
    archive.add_file("checker", checker)
    archive.add_file("bin/busybox", only(f"{packages}/bin/busybox"))
    archive.add("bin/sh", stat.S_IFLNK | 0o777, b"busybox")
    for module in MODULES:
        name = os.path.basename(module) + ".ko"
        archive.add_file(f"modules/{name}", only(f"{packages}/lib/modules/*/kernel/drivers/{module}.ko"))
    order = "".join(os.path.basename(module) + ".ko\n" for module in MODULES)
    archive.add("modules/order", stat.S_IFREG | 0o644, order.encode())
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    return archive.finish()


def get_guest(cache, arch):
    """Returns the Guest of this architecture, made now if the cache has none for these sources."""
    with open(os.path.join(cache, "guest.lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be making the same
        return make_guest(cache, arch)


def make_guest(cache, arch):
    key = hashlib.sha256()
    for name in ("checker.c", "init", "build.py"):
        with open(os.path.join(HERE, name), "rb") as file:
            key.update(file.read())
    packages = fetch_packages(cache, arch)
    folder = os.path.join(cache, f"guest-{arch}-{key.hexdigest()[:16]}")
    guest = Guest(arch, os.path.join(folder, "kernel"), os.path.join(folder, "initrd"))
    if os.path.isdir(folder):
        return guest
    for old in glob.glob(os.path.join(cache, f"guest-{arch}-*")):
        shutil.rmtree(old, ignore_errors=True)
    part = folder + ".part"
    os.makedirs(part)
    with open(os.path.join(part, "initrd"), "wb") as file:
        file.write(make_initrd(packages, arch, part))
    shutil.copy(only(f"{packages}/boot/vmlinuz-*"), os.path.join(part, "kernel"))
    os.rename(part, folder)
    return guest
