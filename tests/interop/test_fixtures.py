"""The states in fixtures/: what the command makes of them is what QEMU said it held when they were
made (fixtures/oracles.json); and whatever happens to their bytes, it ends in an error or in something
true, in bounded memory."""

import gzip
import hashlib
import json
import os
import random
import resource
import struct
import subprocess
import sys
import unittest

import elf_core
from bed import SOURCE, BedTest, cases, find_qemu

FIXTURES = os.path.join(SOURCE, "fixtures")
sys.path.insert(0, FIXTURES)

import make_snapshots  # noqa: E402
import make_streams  # noqa: E402

# Of each fixture in a run of all; every byte of 1000 with QVMSTATE_DAMAGES=1000.
DAMAGES = int(os.environ.get("QVMSTATE_DAMAGES", "8"))
ADDRESS_SPACE = 512 << 20  # of the command while it reads damaged files
MICROVM_RAM = "microvm.ram=0"

with open(os.path.join(FIXTURES, make_streams.ORACLES), encoding="ascii") as oracles_file:
    ORACLES = json.load(oracles_file)
STREAMS = sorted(name for name in ORACLES if name.endswith(".mig"))
PAIRS = sorted(name for name in ORACLES if name.startswith("disks-"))


class Fixtures(BedTest):
    def unpacked(self, name):
        path = os.path.join(self.folder, name)
        if not os.path.exists(path):
            with gzip.open(os.path.join(FIXTURES, name + ".gz"), "rb") as packed:
                data = packed.read()
            with open(path, "wb") as file:
                file.write(data)
        return path

    def pair(self, name):
        return [self.unpacked(f"{name}-{disk}.qcow2") for disk in make_snapshots.DISKS]

    def json(self, *words):
        return json.loads(self.tool(*words, "--format", "json"))

    def ram_map(self, *state):
        """Where RAM lies, where the stream does not tell its machine."""
        known = self.json("info", *state)["stream"]["machine-type"]
        return [] if known else ["--ram-map", MICROVM_RAM]

    def assert_memory(self, oracle, *state):
        raw = self.extract(*state, "--as", "raw", *self.ram_map(*state))
        with open(raw, "rb") as file:
            for address, size, digest in oracle["memory"]:
                file.seek(address)
                self.assertEqual(hashlib.sha256(file.read(size)).hexdigest(), digest,
                                 f"{state}: memory at {address:#x}")

    def assert_registers(self, oracle, *state):
        if "notes" in oracle:
            core = elf_core.Core(self.extract(*state, "--as", "elf", *self.ram_map(*state)))
            self.assertEqual(core.machine, oracle["machine"])
            self.assertEqual(core.bits, 32)  # memory ends below 4 GiB
            self.assertEqual([[owner, kind, hashlib.sha256(data).hexdigest()]
                              for owner, kind, data in core.notes], oracle["notes"])

    def empty_image(self):
        path = os.path.join(self.folder, "image.qcow2")
        if os.path.exists(path):
            os.unlink(path)
        find_qemu("host").img("create", "-q", "-f", "qcow2", path, "1M")
        return path

    @cases(*STREAMS)
    def test_stream(self, name):
        path, oracle = self.unpacked(name), ORACLES[name]
        self.assert_memory(oracle, path)
        self.assert_registers(oracle, path)
        if "no-footers" in name:
            self.refused(["import", path, self.empty_image(), "s"], "has no footer")
            return
        stream = self.json("info", path)["stream"]
        for layout in ("legacy", "mapped-ram"):
            image = self.empty_image()
            if "no-configuration" in name and layout == "mapped-ram":
                self.refused(["import", path, image, "s", "--layout", layout], "no configuration")
                break
            self.tool("import", path, image, "s", "--layout", layout)
            self.assertEqual(self.json("check", image, "--independent")["result"], "clean")
            made = self.json("info", image, "s")["stream"]
            self.assertEqual(made["layout"], layout)
            self.assertEqual((made.get("xbzrle-pages", 0), made.get("compressed-pages", 0)), (0, 0))
            self.assertEqual([device["size"] for device in made["devices"]],
                             [device["size"] for device in stream["devices"]])
            self.assert_memory(oracle, image, "s")
            self.assert_registers(oracle, image, "s")

    @cases(*PAIRS)
    def test_snapshots_of_two_disks(self, name):
        images = self.pair(name)
        report = self.json("check", images[0], "--independent")
        self.assertEqual(report["result"], "clean")
        self.assertEqual({state["name"]: state["checksum"] for state in report["states"]},
                         {way: "none" if way.startswith("savevm") else "right"
                          for way in ORACLES[name]})
        second = self.json("check", images[1], "--independent")
        self.assertEqual(second["result"], "clean")
        for state in report["states"] + second["states"]:
            self.assertGreaterEqual(state["compared-bytes"], 60 << 10)
        for way, oracle in ORACLES[name].items():
            self.assert_memory(oracle, images[0], way)
            self.assert_registers(oracle, images[0], way)
            for image, digest in zip(images, oracle["disks"]):
                with open(self.extract(image, way, "--as", "disk"), "rb") as file:
                    self.assertEqual(hashlib.sha256(file.read()).hexdigest(), digest, image + way)
            self.assertEqual(self.differing_pages(images[0], way, way), 0)

    def differing_pages(self, image, a, b):
        return sum(block["pages-differ"] for block in self.json("diff", image, a, b)["ram-blocks"])

    def stored(self, stream):
        """An image with a snapshot "coded" that holds this very stream, which qemu-io writes."""
        image = self.empty_image()
        size = os.path.getsize(stream)
        padded = (size + 511) // 512 * 512
        os.truncate(stream, padded)
        find_qemu("host").run("qemu-io", "-f", "qcow2", "-c",
                              f"write -q -b -s {stream} 0 {padded}", image)
        find_qemu("host").img("snapshot", "-c", "coded", image)
        # As if savevm had made it: a size of the VM state, in the entry's extra data.
        with open(image, "r+b") as file:
            file.seek(64)
            table, = struct.unpack(">Q", file.read(8))
            file.seek(table + 40)
            file.write(struct.pack(">Q", padded))
        return image

    def assert_converts(self, oracle, image, name, qemu):
        """Its pages become plain ones, in each layout; QEMU loads them as they were."""
        copy = os.path.join(self.folder, "copy.qcow2")
        for layout, options in (("mapped-ram", []), ("legacy", []), ("legacy", ["--compress"])):
            with open(image, "rb") as source, open(copy, "wb") as target:
                target.write(source.read())
            before = self.json("info", copy, name)["stream"]
            self.assertGreater(before["xbzrle-pages"] + before["compressed-pages"], 0)
            exported = os.path.join(self.folder, "exported")
            self.tool("export", copy, name, exported, "--layout", layout)
            self.assert_memory(oracle, exported)
            os.unlink(exported)
            self.tool("convert", copy, name, "--layout", layout, *options)
            made = self.json("info", copy, name)["stream"]
            self.assertEqual(made["layout"], layout)
            self.assertEqual((made["xbzrle-pages"], made["compressed-pages"]), (0, 0))
            self.assert_memory(oracle, copy, name)
            self.assertEqual(self.json("check", copy, "--independent")["result"], "clean")
            if layout == "legacy":
                self.assert_loads(oracle, copy, name, qemu)

    def assert_loads(self, oracle, image, name, qemu):
        drives = []
        for disk, path in zip(make_snapshots.DISKS, [image, *self.other_disks]):
            inner = find_qemu(qemu).inner(path)
            drives += ["-drive", f"if=none,id={disk},format=qcow2,file={inner}",
                       "-device", f"virtio-blk-device,drive={disk}"]
        more = drives if self.other_disks else drives[:2]
        with make_streams.Guest(qemu, "x86_64", make_streams.MICROVM, self.folder,
                                [*more, "-S", "-loadvm", name]) as guest:
            self.assertEqual(guest.memory(), oracle["memory"])

    other_disks = ()

    @cases(("qemu-72-microvm-xbzrle.mig", "host"), ("qemu-72-microvm-compress.mig", "host"),
           ("qemu-100-microvm-xbzrle.mig", "10.0"), ("qemu-newest-microvm-xbzrle.mig", "newest"),
           quick=[("qemu-newest-microvm-xbzrle.mig", "newest")])
    def test_encoded_pages_in_a_snapshot(self, name, qemu):
        find_qemu(qemu)
        image = self.stored(self.unpacked(name))
        self.assert_memory(ORACLES[name], image, "coded")
        self.assertEqual(self.differing_pages(image, "coded", "coded"), 0)
        self.assert_converts(ORACLES[name], image, "coded", qemu)

    def test_compressed_pages_of_savevm(self):
        images = self.pair("disks-72")
        way = make_snapshots.COMPRESS
        self.other_disks = images[1:]
        self.assertGreater(self.differing_pages(images[0], "savevm", way), 0)
        self.assert_converts(ORACLES["disks-72"][way], images[0], way, "host")

    # Damage.

    def limited(self, *words):
        """Runs the command with little memory; a status of 0 or 1, and one line when it fails."""
        def limit():
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        done = subprocess.run([self.built("qvmstate"), *words], stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=120, check=False, preexec_fn=limit)
        self.assertIn(done.returncode, (0, 1), (words, done.stderr))
        if done.returncode == 1 and words[0] != "check":
            self.assertEqual(done.stderr.count(b"\n"), 1, (words, done.stderr))
            self.assertNotIn(b"not enough memory", done.stderr)

    def assert_survives_damage(self, path, commands):
        with open(path, "rb") as file:
            whole = file.read()
        rng = random.Random(os.path.basename(path))
        places = [at for at, byte in enumerate(whole) if byte]
        for number in range(DAMAGES):
            at = rng.choice(places)
            with open(path, "r+b") as file:
                file.seek(at)
                file.write(bytes([whole[at] ^ rng.randrange(1, 256)]))
            with self.subTest(at=at):
                self.limited(*commands[number % len(commands)])
            with open(path, "r+b") as file:
                file.seek(at)
                file.write(whole[at:at + 1])

    @cases(*STREAMS)
    def test_damaged_stream(self, name):
        path = self.unpacked(name)
        self.assert_survives_damage(path, [
            ["extract", path, "--as", "raw", "-o", "/dev/full"],
            ["extract", path, "--as", "devices", "-o", "-"], ["info", path],
            ["import", path, self.empty_image(), "s", "--replace"]])

    @cases(*PAIRS)
    def test_damaged_image(self, name):
        way = list(ORACLES[name])[-1]
        image = self.pair(name)[0]
        self.assert_survives_damage(image, [
            ["check", image, "--independent"], ["extract", image, way, "--as", "block",
                                                "microvm.ram", "-o", "-"],
            ["extract", image, way, "--as", "disk", "-o", "-"], ["diff", image, way, "savevm"],
            ["list", image]])


if __name__ == "__main__":
    unittest.main()
