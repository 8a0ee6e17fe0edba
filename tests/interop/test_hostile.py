"""Small files that lie: no command takes much memory or time for them, none ends by a signal. Made by
hand, and from the fixtures by changing bytes at random."""

import glob
import gzip
import os
import random
import resource
import shutil
import struct

import bed
from bed import BedTest

MEMORY_MAX = 1 << 30  # of address space, of which the program and its buffers take some 300 MiB
SECONDS_MAX = 20  # of CPU
FILE_MAX = 1 << 40  # no command shall end by the signal of this limit either
HUGE = 1 << 55


def limit():
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MAX, MEMORY_MAX))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS_MAX, SECONDS_MAX))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_MAX, FILE_MAX))


def ram_start(total, blocks):
    """A legacy stream up to the end of the list of RAM blocks, (name, bytes) each."""
    out = b"QEVM" + struct.pack(">IBI", 3, 7, 2) + b"pc"
    out += struct.pack(">BIB", 1, 2, 3) + b"ram" + struct.pack(">II", 0, 4)
    out += struct.pack(">Q", total | 4)
    return out + b"".join(bytes([len(name)]) + name + struct.pack(">Q", size) for name, size in blocks)


RAM_END = struct.pack(">QBI", 0x10, 0x7e, 2)


def hostile_streams():
    names = [(b"%05d" % i, 1 << 32) for i in range(60000)]
    return {
        "much RAM": ram_start(HUGE, [(b"pc.ram", HUGE)]) + RAM_END + b"\0",
        "one far page": ram_start(HUGE, [(b"pc.ram", HUGE)])
                        + struct.pack(">QB", (HUGE - 4096) | 2, 6) + b"pc.ram\0" + RAM_END + b"\0",
        "many blocks": ram_start(sum(size for _, size in names), names) + RAM_END + b"\0",
        "description": ram_start(1 << 20, [(b"pc.ram", 1 << 20)]) + RAM_END + b"\0\x06\xff\xff\xff\xff"
                       + b"{" * 100000,
        "deep description": ram_start(1 << 20, [(b"pc.ram", 1 << 20)]) + RAM_END
                            + b"\0\x06" + struct.pack(">I", 900000) + b"[" * 900000,
        "libvirt": b"LibvirtQemudSave" + struct.pack("<IIII", 2, 0xffffffff, 0, 0) + bytes(5000),
    }


def image_of_one_table(l1_entries):
    """1 MiB of clusters of 64 KiB: header, refcount table and block, an L1 table in clusters 3 to 10
    that names the L2 table in cluster 11 everywhere, which names cluster 12 everywhere, where a stream
    begins; and in cluster 13 a snapshot of all that, whose last L1 entry is its VM state's."""
    cluster, copied = 1 << 16, 1 << 63
    image = bytearray(16 * cluster)
    disk_bytes = (l1_entries - 1) * (cluster // 8 * cluster)
    # Magic, version, backing file, its length, cluster bits, disk, encryption, L1 entries and table,
    # refcount table, its clusters, snapshots, their table; features, refcount order, header length.
    struct.pack_into(">IIQIIQIIQQIIQQQQII", image, 0, 0x514649fb, 3, 0, 0, 16, disk_bytes, 0, l1_entries,
                     3 * cluster, cluster, 1, 1, 13 * cluster, 0, 0, 0, 6, 104)
    struct.pack_into(">Q", image, cluster, 2 * cluster)
    struct.pack_into(">16Q", image, 2 * cluster, *[1 << 40] * 16)
    struct.pack_into(f">{l1_entries}Q", image, 3 * cluster, *[copied | 11 * cluster] * l1_entries)
    struct.pack_into(">8192Q", image, 11 * cluster, *[copied | 12 * cluster] * 8192)
    stream = ram_start(1 << 20, [(b"pc.ram", 1 << 20)]) + RAM_END + b"\0"
    image[12 * cluster:12 * cluster + len(stream)] = stream
    # L1 table, its entries, lengths of id and name, date, clock, VM state bytes, extra bytes; in these
    # VM state bytes and disk bytes again; id, name.
    struct.pack_into(">QIHHIIQIIQQ1s3s", image, 13 * cluster, 3 * cluster, l1_entries, 1, 3, 0, 0, 0,
                     1 << 20, 16, 1 << 20, disk_bytes, b"1", b"one")
    return image


class Hostile(BedTest):
    def survives(self, *arguments):
        done = self.run_tool(*arguments, timeout=120, preexec_fn=limit)
        text = (f"qvmstate {' '.join(arguments)}: {done.returncode}\n{done.stdout[-300:]}"
                f"{done.stderr[-500:]}")
        self.assertIn(done.returncode, (0, 1), text)
        self.assertNotIn("not enough memory", done.stderr, text)

    def path(self, name):
        return os.path.join(self.folder, name)

    def every_command(self, path, is_image):
        out = self.path("out")
        names = ["one"] if is_image else []
        commands = [["info", path], *([["list", path], ["check", path]] if is_image else [])]
        for kind in (["raw"], ["block", "pc.ram"], ["devices"], ["stream"],
                     *([["disk"]] if is_image else [])):
            commands.append(["extract", path, *names, "--as", *kind, "-o", out])
        if is_image:
            commands += [["diff", path, "one", "one"], ["export", path, "one", out],
                         ["convert", path, "one", "--layout", "mapped-ram"], ["delete", "one", path]]
        else:
            target = shutil.copy(self.target, self.path("target.qcow2"))
            commands.append(["import", path, target, "new"])
        for command in commands:
            with self.subTest(command=command):
                self.survives(*command)
            if os.path.exists(out):
                os.unlink(out)

    def setUp(self):
        super().setUp()
        self.qemu = bed.find_qemu("host")
        self.target = self.path("empty.qcow2")
        self.qemu.img("create", "-q", "-f", "qcow2", self.target, "1M")

    def image_with(self, stream):
        """An image with a snapshot `one`, whose state is this stream; qemu-io writes it, and its size
        is put into the snapshot table by hand."""
        path = self.path("image.qcow2")
        shutil.copy(self.target, path)
        data = self.path("stream")
        sectors = -(-len(stream) // 512) * 512
        with open(data, "wb") as file:
            file.write(stream.ljust(sectors, b"\0"))
        self.qemu.run("qemu-io", "-f", "qcow2", "-c", f"write -q -b -s {data} 0 {sectors}", path)
        self.qemu.img("snapshot", "-c", "one", path)
        with open(path, "r+b") as file:
            file.seek(64)
            table, = struct.unpack(">Q", file.read(8))
            file.seek(table + 32)
            file.write(struct.pack(">I", len(stream)))
            file.seek(table + 40)
            file.write(struct.pack(">Q", len(stream)))
        return path

    def test_streams(self):
        for name, stream in hostile_streams().items():
            with self.subTest(name):
                path = self.path("stream.mig")
                with open(path, "wb") as file:
                    file.write(stream)
                self.every_command(path, False)
                if stream.startswith(b"QEVM"):
                    self.every_command(self.image_with(stream), True)

    def test_images_that_name_one_cluster(self):
        """32 TiB and 512 MiB of disk, both the same 64 KiB over and over."""
        for l1_entries in (65536, 2):
            with self.subTest(l1_entries=l1_entries):
                path = self.path("image.qcow2")
                with open(path, "wb") as file:
                    file.write(image_of_one_table(l1_entries))
                self.refused(["extract", path, "one", "--as", "stream", "-o", self.path("out")],
                             "again and again")
                self.every_command(path, True)

    def test_fixtures_changed_at_random(self):
        seed = random.randrange(1 << 32)
        chance = random.Random(seed)
        fixtures = sorted(glob.glob(os.path.join(bed.SOURCE, "fixtures", "qemu-*")))
        for i in range(6 if bed.Settings.quick else 100):
            fixture = chance.choice(fixtures)
            is_image = fixture.endswith(".qcow2")
            with (open if is_image else gzip.open)(fixture, "rb") as file:
                data = bytearray(file.read(1 << 20))
            for _ in range(chance.randrange(1, 6)):
                at = chance.randrange(len(data) if chance.random() < 0.5 else 512)
                data[at:at + 4] = chance.choice([b"\xff" * 4, bytes(4), chance.randbytes(4)])
            path = self.path("changed")
            with open(path, "wb") as file:
                file.write(data)
            with self.subTest(seed=seed, round=i, fixture=fixture):
                self.every_command(path, is_image)
