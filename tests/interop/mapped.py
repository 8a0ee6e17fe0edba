"""QEMU's own side of migration to and from a file, and an independent look into such a file: the
judge of what qvmstate writes with --to, and of what it reads from files of QEMU."""

import collections
import contextlib
import os
import struct
import time

import vm
from qmp import QmpError

BITS_UNIT = 8  # the bitmap of a block is whole words of 64 bits
PAGES_ALIGN = 1 << 20
RAM_SECTION = b"\x03ram" + struct.pack(">II", 0, 4)  # name, instance, version
MAPPED_HEADER = ">IQQQ"  # version, page size, offset of the bitmap, offset of the pages
RAM_FLAG_MEM_SIZE, RAM_FLAG_EOS = 0x04, 0x10
ODD_MAIN_KIB = 102500
EXTRA_KIB_OF_VIRT = 90 << 10
ODD_DIMM_BYTES = (128 << 20) + 21 * vm.PAGE
Block = collections.namedtuple("Block", "name size page_size bitmap pages")

# A way of QEMU to read or write a file: channels 0 is without multifd.
Way = collections.namedtuple("Way", "mapped channels direct", defaults=(True, 0, False))
WAYS = {"legacy": Way(mapped=False), "plain": Way(), "multifd": Way(channels=2),
        "direct": Way(channels=2, direct=True), "direct4": Way(channels=4, direct=True)}


def capabilities(guest):
    return {entry["capability"]: entry["state"]
            for entry in guest.qmp.execute("query-migrate-capabilities")}


def set_capabilities(guest, **states):
    guest.qmp.execute("migrate-set-capabilities", capabilities=[
        {"capability": name.replace("_", "-"), "state": state} for name, state in states.items()])


def set_way(guest, way):
    """Has this QEMU write or read in this way from now on."""
    set_capabilities(guest, mapped_ram=way.mapped, multifd=way.channels > 0)
    parameters = {"max_bandwidth": 1 << 40}
    if way.channels:
        parameters["multifd_channels"] = way.channels
    guest.qmp.execute("migrate-set-parameters", direct_io=way.direct, **parameters)


def wait_migrated(guest, timeout=60):
    """Until a migration, in or out, has come to its end; raises if that is a failure."""
    deadline = time.monotonic() + timeout
    while True:
        info = guest.qmp.execute("query-migrate")
        if info.get("status") == "completed":
            return
        if info.get("status") in ("failed", "cancelled"):
            raise QmpError(f"migration {info['status']}: {info.get('error-desc')}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"migration still {info}")
        time.sleep(0.02)


def file_uri(guest, path, offset=0):
    return f"file:{guest.qemu.inner(path)}" + (f",offset={offset}" if offset else "")


def migrate(guest, path, way, offset=0):
    """QEMU writes the file; the VM is in postmigrate then."""
    set_way(guest, way)
    guest.qmp.execute("migrate", uri=file_uri(guest, path, offset))
    wait_migrated(guest)
    set_way(guest, Way(mapped=False))


def receive(guest, path, way, offset=0):
    """Starts QEMU, paused, on the state in the file. QEMU before 8.2 has it through a pipe."""
    if guest.qemu.version < (8, 2):
        guest.start(incoming=f"exec:cat {guest.qemu.inner(path)}", paused=True)
        return wait_migrated(guest)
    guest.start(incoming="defer", paused=True)
    set_way(guest, way)
    guest.qmp.execute("migrate-incoming", uri=file_uri(guest, path, offset))
    wait_migrated(guest)
    return set_way(guest, Way(mapped=False))


@contextlib.contextmanager
def cold_capability(guest):
    """QEMUs started inside are told on their command line that snapshots are mapped-ram."""
    guest.extra += ["-global", "migration.mapped-ram=on"]
    try:
        yield
    finally:
        del guest.extra[-2:]


def overwrite_zero_pages(guest, state, name):
    """Puts a byte into each page of a block that was zero in a state of the stopped VM, where a load
    that skips zero pages leaves it; returns the number of these pages."""
    address = next(address for block, _, address in guest.ram_blocks() if block == name)
    count = 0
    with open(f"/proc/{guest.pid}/mem", "rb+", buffering=0) as memory:
        for page, found in enumerate(state.pieces[f"block {name}"].sums):
            if found == vm.ZERO_PAGE:
                os.pwrite(memory.fileno(), b"\xa5stale page", address + page * vm.PAGE)
                count += 1
    return count


def set_odd_memory(guest, size):
    """RAM that ends within a MiB, a cluster and a word of the bitmap. QEMU wants main memory in
    multiples of 8 KiB, a DIMM in those of the pages of its file. size: "main", "dimm", or "round"
    for a plain number of MiB."""
    kib = ODD_MAIN_KIB + (EXTRA_KIB_OF_VIRT if guest.machine.arch == "aarch64" else 0)
    main = "100M" if size == "round" else f"{kib}K"
    guest.memory_options = ["-m", main]
    if size == "dimm":
        guest.memory_options = ["-m", f"{main},slots=2,maxmem=1G", "-object",
                                f"memory-backend-memfd,id=dimm0,size={ODD_DIMM_BYTES}",
                                "-device", "pc-dimm,id=dimm0-device,memdev=dimm0"]
    guest.kernel_options = "qvm.mem=24"


def used_bytes(state, unit_bytes):
    """Of RAM in units of so many bytes, those that hold a page that is not zero."""
    pages = max(1, unit_bytes // vm.PAGE)
    total = 0
    for piece in state.pieces.values():
        total += sum(any(page != vm.ZERO_PAGE for page in piece.sums[at:at + pages])
                     for at in range(0, len(piece.sums), pages))
    return total * pages * vm.PAGE


class MappedFile:
    """The RAM of a file that has the mapped-ram layout, found by its own headers."""

    def __init__(self, path, offset=0):
        self.path = path
        with open(path, "rb") as file:
            file.seek(offset)
            head = file.read(1 << 16)
            if not head.startswith(b"QEVM\0\0\0\3"):
                raise ValueError(f"{path}: no migration stream at {offset:#x}")
            at = offset + head.index(RAM_SECTION) + len(RAM_SECTION)
            file.seek(at)
            total, = struct.unpack(">Q", file.read(8))
            if total & 0xfff != RAM_FLAG_MEM_SIZE:
                raise ValueError(f"{path}: no sizes at {at:#x}")
            total &= ~0xfff
            self.blocks = []
            while total > 0:
                name = file.read(file.read(1)[0]).decode()
                size, = struct.unpack(">Q", file.read(8))
                version, *places = struct.unpack(MAPPED_HEADER, file.read(28))
                if version != 1:
                    raise ValueError(f"{path}: {name}: header of version {version}")
                self.blocks.append(Block(name, size, *places))
                if self.blocks[-1].bitmap != file.tell() or places[2] % PAGES_ALIGN:
                    raise ValueError(f"{path}: {self.blocks[-1]} at {file.tell():#x}")
                file.seek(places[2] + size)
                total -= size
            eos, = struct.unpack(">Q", file.read(8))
            if eos != RAM_FLAG_EOS:
                raise ValueError(f"{path}: {eos:#x} after the last block")

    def bits(self, block):
        """Of the pages of a block: whether each is stored."""
        pages = block.size // block.page_size
        with open(self.path, "rb") as file:
            file.seek(block.bitmap)
            bitmap = file.read((pages + 63) // 64 * BITS_UNIT)
        return [bool(bitmap[page // 8] >> page % 8 & 1) for page in range(pages)]

    def piece(self, block):
        """The content of a block as a fresh QEMU reads it."""
        data = bytearray(block.size)
        with open(self.path, "rb") as file:
            for page, stored in enumerate(self.bits(block)):
                if stored:
                    file.seek(block.pages + page * block.page_size)
                    start = page * block.page_size
                    data[start:start + block.page_size] = file.read(block.page_size)
        return vm.Piece(data)

    def pieces(self):
        return {f"block {block.name}": self.piece(block) for block in self.blocks}
