#!/usr/bin/env python3
"""Runs each libFuzzer target for some seconds:  tests/fuzz/run.py [--build DIR] [--seconds N]

Each starts from what it collected in earlier runs (BUILD/corpus/TARGET), the fixtures, what fuzzers
found once (found/TARGET) and a few small seeds made here. An input that breaks a target is left in
BUILD/crashes/; once the mistake is mended it belongs into found/TARGET, where every test run replays
it."""

import argparse
import os
import struct
import subprocess
import sys
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.path.dirname(os.path.dirname(HERE))
# Bytes of the longest input, in which a target's interesting structures fit.
TARGETS = {"image": 1 << 17, "base_state": 1 << 17, "stream": 1 << 15, "stored_state": 1 << 15,
           "sections": 1 << 14}
PAGE = 4096
RAM_ID = 2


def counted(text):
    return struct.pack(">B", len(text)) + text


def footer(section):
    return b"\x7e" + struct.pack(">I", section)


def full_section(section, name, body):
    return (b"\x04" + struct.pack(">I", section) + counted(name) + struct.pack(">II", 0, 1) + body +
            footer(section))


def device_sections():
    timer = full_section(0, b"timer", struct.pack(">qqq", 1, 2, 3))
    odd = full_section(5, b"odd", b"\x7e\x00\x00\x00\x05 looks like a footer")
    return timer + odd


def mapped_stream(stream, tail):
    """One block of three pages of 1 KiB in the layout mapped-ram; the second is zero."""
    page = 1024
    stream += b"\x05" + counted(b"configuration/target-page-bits") + struct.pack(">II", 1, 10)
    stream += b"\x05" + counted(b"configuration/capabilities") + struct.pack(">II", 1, 1)
    stream += counted(b"mapped-ram")
    stream += b"\x01" + struct.pack(">I", RAM_ID) + counted(b"ram") + struct.pack(">II", 0, 4)
    stream += struct.pack(">Q", 3 * page | 0x04) + counted(b"pc.ram") + struct.pack(">Q", 3 * page)
    bitmap = len(stream) + 28
    pages = (bitmap + 8 + page - 1) // page * page
    stream += struct.pack(">IQQQ", 1, page, bitmap, pages) + b"\x05" + bytes(7)
    stream += bytes(pages - len(stream)) + b"a" * page + b"stale" * 204 + bytes(4) + b"c" * page
    return stream + struct.pack(">Q", 0x10) + footer(RAM_ID) + device_sections() + tail


def seeds():
    """(target, name, bytes) of small valid inputs."""
    magic = b"QEVM" + struct.pack(">I", 3)
    yield "sections", "two", magic + device_sections() + b"\x00"
    configuration = b"\x07" + struct.pack(">I", 2) + b"pc"
    blocks = struct.pack(">Q", 2 * PAGE | 0x04) + counted(b"pc.ram") + struct.pack(">Q", 2 * PAGE)
    start = (b"\x01" + struct.pack(">I", RAM_ID) + counted(b"ram") + struct.pack(">II", 0, 4) +
             blocks + struct.pack(">Q", 0x10) + footer(RAM_ID))
    zero = struct.pack(">Q", 0x02) + counted(b"pc.ram") + b"\x00"
    page = struct.pack(">Q", PAGE | 0x08 | 0x20) + bytes(range(256)) * (PAGE // 256)
    end = (b"\x03" + struct.pack(">I", RAM_ID) + zero + page + struct.pack(">Q", 0x10) +
           footer(RAM_ID))
    json = b'{"page_size": 4096, "devices": []}'
    tail = b"\x00\x06" + struct.pack(">I", len(json)) + json
    difference = struct.pack(">QBHBB", PAGE | 0x40 | 0x20, 1, 4, 3, 2) + b"xy"
    packed = zlib.compress(bytes(range(256)) * (PAGE // 256))
    compressed = struct.pack(">QI", 0x100 | 0x20, len(packed)) + packed
    encoded = (b"\x03" + struct.pack(">I", RAM_ID) + zero + page + difference + compressed +
               difference + struct.pack(">Q", 0x10) + footer(RAM_ID))
    for target in ("stream", "stored_state"):
        yield target, "mapped", mapped_stream(magic + configuration, tail)
        yield target, "small", magic + configuration + start + end + device_sections() + tail
        yield target, "encoded", magic + configuration + start + encoded + device_sections() + tail


def main():
    parser = argparse.ArgumentParser(description="Runs the libFuzzer targets.")
    parser.add_argument("--build", default=os.path.join(SOURCE, "build-fuzz"))
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    options = parser.parse_args()
    build = os.path.abspath(options.build)
    crashes = os.path.join(build, "crashes")
    os.makedirs(crashes, exist_ok=True)
    for target in TARGETS:
        os.makedirs(os.path.join(build, "corpus", target), exist_ok=True)
    for target, name, data in seeds():
        with open(os.path.join(build, "corpus", target, name), "wb") as file:
            file.write(data)
    failed = []
    for target, bytes_max in TARGETS.items():
        folders = [os.path.join(build, "corpus", target), os.path.join(HERE, "found", target)]
        if target in ("image", "base_state"):
            folders.append(os.path.join(SOURCE, "fixtures"))
        program = os.path.join(build, "tests", "fuzz", f"fuzz_{target}")
        print(f"== {target}, {options.seconds} s", flush=True)
        done = subprocess.run([program, f"-max_total_time={options.seconds}", f"-max_len={bytes_max}",
                               "-timeout=20", "-rss_limit_mb=4096", "-print_final_stats=1",
                               "-verbosity=1", f"-artifact_prefix={crashes}/{target}-",
                               *filter(os.path.isdir, folders)], check=False,
                              capture_output=True, text=True, errors="replace")
        interesting = [line for line in done.stderr.splitlines()
                       if "stat::" in line or "DONE" in line]
        print("\n".join(interesting[-8:]))
        if done.returncode != 0:
            print("\n".join(done.stderr.splitlines()[-60:]))
            print(f"FAILED  fuzz {target}: status {done.returncode}, see {crashes}")
            failed.append(target)
    print(f"{len(TARGETS) - len(failed)} passed, {len(failed)} failed, 0 skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
