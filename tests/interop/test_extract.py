"""The commands info and extract on migration files made by hand, and in the ways they can fail.

Run: python3 -m unittest test_extract   (QVMSTATE_BUILD: folder of the program, default build/)
"""

import json
import os
import struct
import subprocess
import tempfile
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROGRAM = os.path.join(os.environ.get("QVMSTATE_BUILD", os.path.join(ROOT, "build")), "qvmstate")
PAGE = 4096
RAM_ID = 2


def run(*arguments, **options):
    return subprocess.run([PROGRAM, *arguments], timeout=60, stdout=options.pop("stdout", -1),
                          stderr=subprocess.PIPE, **options)


def counted(text):
    return struct.pack(">B", len(text)) + text


def head(capabilities=(), machine=b"pc"):
    text = b"QEVM" + struct.pack(">I", 3) + b"\x07" + struct.pack(">I", len(machine)) + machine
    if capabilities:
        text += b"\x05" + counted(b"configuration/capabilities")
        text += struct.pack(">II", 1, len(capabilities)) + b"".join(map(counted, capabilities))
    return text + b"\x01" + struct.pack(">I", RAM_ID) + counted(b"ram") + struct.pack(">II", 0, 4)


END = struct.pack(">Q", 0x10) + b"\x7e" + struct.pack(">I", RAM_ID) + b"\x00"


def mapped_stream(pages, start=0):
    """One block "m"; pages: bytes or None. Under the bits of absent ones lies something stale."""
    size = len(pages) * PAGE
    text = bytes(start) + head([b"mapped-ram"]) + struct.pack(">Q", size | 4) + counted(b"m")
    text += struct.pack(">Q", size)
    bitmap_size = (len(pages) + 63) // 64 * 8
    bitmap_at = len(text) + 28
    pages_at = (bitmap_at + bitmap_size + (1 << 20) - 1) >> 20 << 20
    bits = sum(1 << n for n, page in enumerate(pages) if page is not None)
    text += struct.pack(">IQQQ", 1, PAGE, bitmap_at, pages_at)
    text += bits.to_bytes(bitmap_size, "little")
    text += bytes(pages_at - len(text))
    return text + b"".join(page or b"\xdb" * PAGE for page in pages) + END


def legacy_stream(records, pages, machine=b"pc"):
    """Records: (page number, bytes or None for zero)."""
    text = head(machine=machine) + struct.pack(">Q", pages * PAGE | 4) + counted(b"m")
    text += struct.pack(">Q", pages * PAGE)
    for number, page in records:
        text += struct.pack(">Q", number * PAGE | (8 if page else 2)) + counted(b"m")
        text += page or b"\x00"
    return text + END


def some_pages(count):
    return [bytes([n % 250 + 1]) * PAGE if n % 3 == 0 else None for n in range(count)]


def memory(pages):
    return b"".join(page or bytes(PAGE) for page in pages)


class Extract(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.file = self.path("vm.mig")
        self.out = self.path("ram")

    def path(self, name):
        return os.path.join(self.folder.name, name)

    def write(self, data):
        with open(self.file, "wb") as file:
            file.write(data)

    def extract(self, *options, status=0, block="m", kind=None):
        words = [kind] if kind else ["block", block]
        done = run("extract", self.file, "--as", *words, "-o", self.out, *options)
        self.assertEqual(done.returncode, status, done.stderr)
        # Whatever happened, nothing half done is left.
        self.assertEqual(set(os.listdir(self.folder.name)) - {"vm.mig", "ram"}, set())
        return done

    def result(self):
        with open(self.out, "rb") as file:
            data = file.read()
        os.unlink(self.out)
        return data

    def refused(self, text, *options, status=1, **others):
        done = self.extract(*options, status=status, **others)
        self.assertIn(text, done.stderr.decode())
        self.assertFalse(os.path.exists(self.out))

    def test_mapped(self):
        pages = some_pages(1000)
        for start in (0, 12345):
            self.write(mapped_stream(pages, start))
            where = ["--offset", str(start)] if start else []
            for options in ([], ["--channels", "1"], ["--channels", "64"], ["--direct", "off"],
                            ["--engine", "threads"]):
                self.extract(*where, *options)
                self.assertEqual(self.result(), memory(pages))
            done = run("extract", self.file, *where, "--as", "block", "m", "-o", "-")
            self.assertEqual(done.stdout, memory(pages))

    def test_holes_stay_holes(self):
        pages = [None] * 20000
        pages[7] = pages[19000] = b"x" * PAGE
        self.write(mapped_stream(pages))
        self.extract()
        self.assertLess(os.stat(self.out).st_blocks * 512, 1 << 20)
        self.assertEqual(os.stat(self.out).st_mode & 0o777, 0o600)
        self.assertEqual(self.result(), memory(pages))

    def test_legacy(self):
        pages = some_pages(500)
        records = list(enumerate(pages))
        self.write(legacy_stream(records, 500))
        self.extract()
        self.assertEqual(self.result(), memory(pages))
        done = run("extract", self.file, "--as", "block", "m", "-o", "-")
        self.assertEqual(done.stdout, memory(pages))

    def test_legacy_sent_again(self):
        # The last record of a page counts, also where it is zero or comes at once.
        pages = some_pages(500)
        records = list(enumerate(pages)) + [(3, b"n" * PAGE), (3, b"o" * PAGE), (0, None),
                                            (499, b"p" * PAGE), (3, b"q" * PAGE), (4, b"r" * PAGE)]
        self.write(legacy_stream(records, 500))
        pages[0], pages[3], pages[4], pages[499] = None, b"q" * PAGE, b"r" * PAGE, b"p" * PAGE
        self.extract()
        self.assertEqual(self.result(), memory(pages))
        done = run("extract", self.file, "--as", "block", "m", "-o", "-")
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"-o FILE", done.stderr)

    def test_stream(self):
        pages = some_pages(500)
        for start, data in ((0, legacy_stream(list(enumerate(pages)), 500)),
                            (5000, mapped_stream(pages, 5000))):
            self.write(bytes(start if data[start:start + 1] != b"Q" else 0) + data + b"not of it")
            where = ["--offset", str(start)] if start else []
            self.extract(*where, kind="stream")
            self.assertEqual(self.result(), data[start:])
            done = run("extract", self.file, *where, "--as", "stream", "-o", "-")
            self.assertEqual(done.stdout, data[start:])

    def test_raw(self):
        pages = some_pages(500)
        for machine in (b"pc-i440fx-7.2", b"pc-q35-10.0", b"microvm"):
            self.write(legacy_stream(list(enumerate(pages)), 500, machine))
            self.extract(kind="raw")
            self.assertEqual(self.result(), memory(pages))
            done = run("extract", self.file, "--as", "raw", "-o", "-")
            self.assertEqual(done.stdout, memory(pages))

    def test_ram_map(self):
        pages = some_pages(500)
        for data in (legacy_stream(list(enumerate(pages)), 500), mapped_stream(pages)):
            self.write(data)
            self.refused("machine type 'pc' is not known; say where in guest-physical memory its "
                         "RAM lies with --ram-map", kind="raw")
            self.extract("--ram-map", "m=0x5000,4096,8192", "--ram-map", "m=0x100000000", kind="raw")
            self.assertEqual(os.stat(self.out).st_size, (4 << 30) + 500 * PAGE)
            self.assertLess(os.stat(self.out).st_blocks * 512, 4 << 20)
            with open(self.out, "rb") as file:
                self.assertEqual(file.read(7 * PAGE), bytes(5 * PAGE) + memory(pages[2:3]) +
                                 bytes(PAGE))
                file.seek(4 << 30)
                self.assertEqual(file.read(), memory(pages))
            os.unlink(self.out)
            self.refused("no RAM block 'x'", "--ram-map", "x=0", kind="raw")
            self.refused("whole pages", "--ram-map", "m=1", kind="raw")
            self.refused("whole pages", "--ram-map", "m=0,0x1000,0x200000", kind="raw")
            self.refused("over each other", "--ram-map", "m=0", "--ram-map", "m=4096,4096",
                         kind="raw")
            self.refused("is not BLOCK=", "--ram-map", "m=0,", kind="raw", status=2)

    def test_pages_as_differences(self):
        # XBZRLE: keep 2 bytes, replace 3; then keep none, replace 1.
        delta = [b"\x02\x03abc", b"\x00\x01A"]
        records = b"".join(struct.pack(">QBH", 3 * PAGE | 0x60, 1, len(one)) + one for one in delta)
        text = legacy_stream(list(enumerate(some_pages(9)))[:4], 9)[:-len(END)] + records
        later = struct.pack(">Q", 6 * PAGE | 0x28) + b"l" * PAGE  # a page not sent before
        self.write(text + later + END)
        self.extract()
        page = bytearray(some_pages(9)[3])
        page[:5] = b"A" + page[1:2] + b"abc"
        self.assertEqual(self.result(), memory([*some_pages(9)[:3], bytes(page), None, None,
                                                b"l" * PAGE, None, None]))
        done = run("extract", self.file, "--as", "block", "m", "-o", "-")
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"-o FILE", done.stderr)
        stream = json.loads(run("info", self.file, "--format", "json").stdout)["stream"]
        self.assertEqual(stream["xbzrle-pages"], 2)
        self.assertIn(b"2 as differences", run("info", self.file).stdout)

    def test_memory_that_is_left_out(self):
        text = head([b"x-ignore-shared"]) + struct.pack(">Q", 2 * PAGE | 4)
        for name in (b"m", b"shm"):
            text += counted(name) + struct.pack(">QQ", PAGE, 0)
        text += struct.pack(">Q", 8) + counted(b"m") + b"x" * PAGE + END
        self.write(text)
        self.extract()
        self.assertEqual(self.result(), b"x" * PAGE)
        self.refused("left out (x-ignore-shared)", block="shm")

    # The disk, against qemu-img.

    def img(self, *words):
        return subprocess.run(["qemu-img", *words], check=True, timeout=60, cwd=self.folder.name,
                              capture_output=True)

    def pattern(self, image, *commands):
        words = [word for command in commands for word in ("-c", command)]
        subprocess.run(["qemu-io", "-f", "qcow2", *words, self.path(image)], check=True, timeout=60,
                       capture_output=True, cwd=self.folder.name)

    def assert_disk(self, image, name):
        """As qemu-img and, to standard output, as a file."""
        self.img("convert", "-f", "qcow2", "-O", "raw", "-l", f"snapshot.name={name}", image,
                 "expected")
        with open(self.path("expected"), "rb") as file:
            expected = file.read()
        done = run("extract", self.path(image), name, "--as", "disk", "-o", self.out)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.result() == expected, True)
        done = run("extract", self.path(image), name, "--as", "disk", "-o", "-")
        self.assertEqual(done.stdout == expected, True)
        return expected

    def test_disk(self):
        for options in ("compat=0.10", "cluster_size=512", "cluster_size=2M", "refcount_bits=1",
                        "extended_l2=on,cluster_size=16k"):
            with self.subTest(options=options):
                self.img("create", "-q", "-f", "qcow2", "-o", options, "d.qcow2", "5M")
                self.pattern("d.qcow2", "write -P 1 0 100k", "write -P 2 3M 5k")
                if options == "refcount_bits=1":  # has room for no snapshot of data
                    continue
                self.img("snapshot", "-c", "first", "d.qcow2")
                self.pattern("d.qcow2", "write -P 3 50k 100k", "write -z 3M 64k")
                self.img("snapshot", "-c", "second", "d.qcow2")
                self.pattern("d.qcow2", "write -P 4 0 5M")
                first = self.assert_disk("d.qcow2", "first")
                second = self.assert_disk("d.qcow2", "second")
                self.assertNotEqual(first, second)
                self.assertEqual(first[:100], b"\x01" * 100)

    def test_disk_over_backing_files(self):
        with open(self.path("base.raw"), "wb") as file:
            file.write(bytes(range(1, 251)) * 4096 + b"end")  # ends within a sector
        os.truncate(self.path("base.raw"), 1024512)
        self.img("convert", "-q", "-f", "raw", "-O", "qcow2", "-c", "-o", "cluster_size=4k",
                 "base.raw", "packed.qcow2")
        for backing, form in (("base.raw", "raw"), ("packed.qcow2", "qcow2")):
            with self.subTest(backing=backing):
                self.img("create", "-q", "-f", "qcow2", "-b", backing, "-F", form, "-o",
                         "cluster_size=4k", "mid.qcow2", "700k")  # shorter than what is below
                self.pattern("mid.qcow2", "write -P 7 100k 9k", "write -z 300k 20k")
                self.img("create", "-q", "-f", "qcow2", "-b", self.path("mid.qcow2"), "-F", "qcow2",
                         "top.qcow2", "2M")  # and longer
                self.pattern("top.qcow2", "write -P 8 600k 3k")
                self.img("snapshot", "-c", "s", "top.qcow2")
                self.pattern("top.qcow2", "write -P 9 0 2M")
                expected = self.assert_disk("top.qcow2", "s")
                self.assertEqual(expected[:250], bytes(range(1, 251)))

    def test_disk_of_zstd_clusters(self):
        with open(self.path("b.raw"), "wb") as file:
            file.write(bytes(range(256)) * 4096)
        self.img("convert", "-q", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd",
                 "b.raw", "z.qcow2")
        self.img("snapshot", "-c", "s", "z.qcow2")
        self.pattern("z.qcow2", "write -P 9 0 1M")
        self.assertEqual(self.assert_disk("z.qcow2", "s"), bytes(range(256)) * 4096)

    def test_disk_that_cannot_be_read(self):
        def refused(image, name, *words):
            done = run("extract", self.path(image), name, "--as", "disk", "-o", self.out)
            self.assertEqual(done.returncode, 1)
            for word in words:
                self.assertIn(word, done.stderr.decode())
            self.assertFalse(os.path.exists(self.out))

        self.img("create", "-q", "-f", "qcow2", "d.qcow2", "1M")
        self.img("snapshot", "-c", "s", "d.qcow2")
        refused("d.qcow2", "t", "no snapshot named 't'")
        with open(self.path("b.raw"), "wb") as file:
            file.write(bytes(range(256)) * 4096)
        self.img("create", "-q", "-f", "qcow2", "-b", "b.raw", "-F", "raw", "o.qcow2", "1M")
        self.img("snapshot", "-c", "s", "o.qcow2")
        os.unlink(self.path("b.raw"))
        refused("o.qcow2", "s", "b.raw")
        for name, word in (("nbd:localhost:1", "not a plain file"), ("o.qcow2", "more than")):
            self.img("rebase", "-u", "-f", "qcow2", "-b", name, "-F",
                     "raw" if name.startswith("nbd") else "qcow2", "o.qcow2")
            refused("o.qcow2", "s", word)

    def test_devices(self):
        data = legacy_stream(list(enumerate(some_pages(9))), 9)[:-1]
        for number, body in ((7, b"abc"), (8, b"\0" * (5 << 20))):
            data += b"\x04" + struct.pack(">I", number) + counted(b"dev%d" % number)
            data += struct.pack(">II", 0, 3) + body + b"\x7e" + struct.pack(">I", number)
        about = {"page_size": PAGE, "devices": [
            {"name": "dev7", "instance_id": 0, "vmsd_name": "d", "version": 3,
             "fields": [{"name": "x", "type": "uint8", "size": 1},
                        {"name": "rest", "type": "buffer", "size": 2}]}]}
        text = json.dumps(about).encode()
        self.write(data + b"\x00\x06" + struct.pack(">I", len(text)) + text)
        self.extract(kind="devices")
        found = json.loads(self.result())
        self.assertEqual(found["machine-type"], "pc")
        self.assertEqual(found["devices"], [
            {"name": "dev7", "instance": 0, "version": 3, "size": 3,
             "fields": {"x": 97, "rest": "6263"}},
            {"name": "dev8", "instance": 0, "version": 3, "size": 5 << 20, "raw": "00" * (5 << 20)}])
        done = run("extract", self.file, "--as", "devices", "-o", "-")
        self.assertEqual(json.loads(done.stdout), found)

    def test_json(self):
        self.write(mapped_stream(some_pages(9)))
        event = json.loads(self.extract("--format", "json").stdout)
        self.assertEqual(event["event"], "completed")
        self.assertEqual(event["layout"], "mapped-ram")
        self.assertEqual((event["size"], event["data-bytes"]), (9 * PAGE, 3 * PAGE))
        stream = json.loads(run("info", self.file, "--format", "json").stdout)["stream"]
        self.assertEqual(stream["layout"], "mapped-ram")
        self.assertEqual((stream["data-pages"], stream["zero-pages"]), (3, 6))
        self.assertIn(b"mapped-ram", run("info", self.file).stdout)
        self.write(legacy_stream(list(enumerate(some_pages(9))), 9))
        stream = json.loads(run("info", self.file, "--format", "json").stdout)["stream"]
        self.assertEqual(stream["layout"], "legacy")
        self.assertEqual((stream["data-pages"], stream["zero-pages"]), (3, 6))

    def test_failures(self):
        good = mapped_stream(some_pages(600))
        self.write(good)
        self.refused("no RAM block 'other'; it has: m", block="other")
        self.refused("past the end", "--offset", "99999999")
        self.refused("no QEMU stream header", "--offset", "1")
        self.refused("not one of", "--direct", "maybe", status=2)
        self.refused("channels", "--channels", "65", status=2)
        self.write(good[:-1000])
        self.refused("cut short")
        self.write(b"something else" * 100)
        self.refused("not a qcow2")
        self.write(legacy_stream([(0, b"x" * PAGE)], 2)[:-100])
        self.refused("")
        for words in (["raw", "m"], ["block"], ["nothing"]):
            done = run("extract", self.file, "--as", *words, "-o", self.out)
            self.assertEqual(done.returncode, 2)

    def test_never_replaces(self):
        self.write(mapped_stream(some_pages(3)))
        with open(self.out, "wb") as file:
            file.write(b"mine")
        done = self.extract(status=1)
        self.assertIn(b"exists", done.stderr)
        self.assertEqual(self.result(), b"mine")

    def test_full_output(self):
        self.write(mapped_stream(some_pages(3)))
        with open("/dev/full", "wb") as full:
            done = run("extract", self.file, "--as", "block", "m", "-o", "-", stdout=full)
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"standard output", done.stderr)


if __name__ == "__main__":
    unittest.main()
