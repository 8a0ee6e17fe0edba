"""The offline commands on a state of a guest's size, made here without QEMU and imported: `check`
against fio's read rate of the same image, `convert --compress` against single-threaded zlib."""

import json
import os
import random
import statistics
import struct
import subprocess
import time
import zlib

MIB = 1 << 20
PAGE = 4096
CHECK_OF_READ_MIN = 0.7
COMPRESS_OF_ZLIB_MIN = 2.0
MEMORY_MIB_MAX = 64
RAM_ID = 2
# Of 16 areas of RAM: code and data that deflate gains on, noise that it does not, and zeros.
AREAS = 11 * ["data"] + 3 * ["noise"] + 2 * ["zero"]
AREA_PAGES = 256


def counted(text):
    return struct.pack(">B", len(text)) + text


def some_data(chance, words):
    """A page as of a heap: few words, often repeated."""
    return b"".join(chance.choice(words) for _ in range(PAGE // 8))


def write_stream(path, mib):
    """A legacy stream as QEMU's: one block of RAM, and the section that tells the clock."""
    chance = random.Random(5)
    words = [chance.randbytes(chance.randrange(1, 5)).ljust(8, b"\0") for _ in range(500)]
    pool = [some_data(chance, words) for _ in range(400)]
    pages = mib * MIB // PAGE
    with open(path, "wb") as file:
        file.write(b"QEVM" + struct.pack(">I", 3) + b"\x07" + struct.pack(">I", 2) + b"pc")
        file.write(b"\x01" + struct.pack(">I", RAM_ID) + counted(b"ram") + struct.pack(">II", 0, 4))
        file.write(struct.pack(">Q", pages * PAGE | 4) + counted(b"m"))
        file.write(struct.pack(">Q", pages * PAGE))
        for number in range(pages):
            kind = AREAS[number // AREA_PAGES % 16]
            flags = (2 if kind == "zero" else 8) | (0x20 if number else 0)
            file.write(struct.pack(">Q", number * PAGE | flags) + (b"" if number else counted(b"m")))
            if kind == "zero":
                file.write(b"\0")
            else:
                page = pool[chance.randrange(400)]
                file.write(struct.pack(">Q", number) + page[8:] if kind == "data"
                           else chance.randbytes(PAGE))
        file.write(struct.pack(">Q", 0x10) + b"\x7e" + struct.pack(">I", RAM_ID))
        file.write(b"\x04" + struct.pack(">I", 3) + counted(b"timer") + struct.pack(">II", 0, 2))
        file.write(bytes(24) + b"\x7e" + struct.pack(">I", 3) + b"\0")
        file.write(b"\x06" + struct.pack(">I", 2) + b"{}")


def run(bench, *args):
    """Seconds, the report, and the most memory that the command had, in MiB."""
    begin = time.monotonic()
    process = subprocess.Popen([bench.command, *args, "--format", "json"],
                               stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise RuntimeError(f"qvmstate {args[0]}: {out.decode()[-300:]}")
    return time.monotonic() - begin, json.loads(out), usage.ru_maxrss / 1024


def fio_read_rate(path):
    size = os.path.getsize(path) // MIB
    done = subprocess.run(
        ["fio", "--name=read", f"--filename={path}", "--rw=read", "--bs=1M", "--iodepth=8",
         "--ioengine=io_uring", "--direct=1", f"--size={size}M", "--readonly",
         "--output-format=json"], capture_output=True, text=True, check=True)
    read = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]["read"]
    return read["io_bytes"] / (read["runtime"] / 1000)


def zlib_rate(path):
    """Level 1, one thread, as qcow2 has it: clusters, raw deflate, a window of 4 KiB."""
    done = 0
    begin = time.monotonic()
    with open(path, "rb") as file:
        while done < 256 * MIB:
            piece = file.read(65536)
            if not piece:
                break
            packer = zlib.compressobj(1, zlib.DEFLATED, -12)
            packer.compress(piece)
            packer.flush()
            done += len(piece)
    return done / (time.monotonic() - begin)


def measure(bench, rounds, bars, quiet_machine, row):
    image = os.path.join(bench.folder, "offline.qcow2")
    stream = os.path.join(bench.folder, "offline.mig")
    out = {"read": [], "check": [], "zlib": [], "compress": [], "memory": []}
    try:
        write_stream(stream, bench.options.ram)
        for _ in range(rounds):
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1G"], check=True)
            run(bench, "import", stream, image, "it")
            quiet_machine()
            out["read"].append(fio_read_rate(image))
            quiet_machine()
            seconds, report, memory = run(bench, "check", image)
            size = report["states"][0]["vm-state-size"]
            out["check"].append(size / seconds)
            out["memory"].append(memory)
            quiet_machine()
            out["zlib"].append(zlib_rate(stream))
            seconds, _, _ = run(bench, "convert", image, "it", "--compress")
            out["compress"].append(size / seconds)
            os.unlink(image)
    finally:
        for path in (image, stream):
            if os.path.exists(path):
                os.unlink(path)
    middle = {name: statistics.median(values) for name, values in out.items()}
    of_read = middle["check"] / middle["read"]
    of_zlib = middle["compress"] / middle["zlib"]
    print(f"\nOffline, a state of {bench.options.ram} MiB of RAM:\n")
    print(row("", "MiB/s", "compared with"))
    print(row("---", "---:", "---"))
    print(row("`check`", f"{middle['check'] / MIB:.0f}",
              f"{100 * of_read:.0f} % of fio's read, {middle['read'] / MIB:.0f} MiB/s"))
    print(row("`convert --compress`", f"{middle['compress'] / MIB:.0f}",
              f"{of_zlib:.1f} times zlib level 1 on one thread, {middle['zlib'] / MIB:.0f} MiB/s"))
    bars.add(of_read >= CHECK_OF_READ_MIN, f"check: {100 * of_read:.0f} % of fio's read rate, at "
             f"least {100 * CHECK_OF_READ_MIN:.0f} % wanted")
    bars.add(middle["memory"] <= MEMORY_MIB_MAX, f"check: {middle['memory']:.0f} MiB of memory, at "
             f"most {MEMORY_MIB_MAX} MiB wanted")
    bars.add(of_zlib >= COMPRESS_OF_ZLIB_MIN, f"convert --compress: {of_zlib:.1f} times zlib level 1 "
             f"on one thread, at least {COMPRESS_OF_ZLIB_MIN:.0f} wanted")
    return out
