"""States that `convert`, `export` and `import` made of others: QEMU loads each of them, and registers
and RAM are those of the moment of the save. And what `diff` tells of two."""

import contextlib
import gzip
import json
import os
import struct
import subprocess

import mapped
from bed import BedTest, Settings, cases, find_qemu

PAGE = 4096


class OfflineState(BedTest):
    def saved(self, qemu, machine, how):
        """A VM that was saved twice and ended; its state at the first save is that of `it`."""
        guest = self.make_vm(qemu, machine, plugin=how == "plugin").start()
        guest.fill(11)
        guest.stop()
        self.save(guest, "it")
        self.state = guest.state()
        guest.cont()
        guest.fill(22)
        self.save(guest, "other")
        guest.quit()
        self.image = guest.disks[0].path
        return guest

    def json(self, *args):
        return json.loads(self.tool(*args, "--format", "json"))

    def assert_loads(self, guest, name="it"):
        layout = self.info_layout(self.image, name)
        capability = (mapped.cold_capability(guest) if layout == "mapped-ram"
                      else contextlib.nullcontext())
        with capability:
            guest.start(loadvm=name, paused=True)
        self.assert_same_state(self.state, guest.state())
        guest.cont()
        self.assert_seed(guest, 11)
        guest.quit()

    def assert_whole(self, guest, names):
        guest.check_image()
        report = self.json("check", self.image, "--independent")
        self.assertEqual(report["result"], "clean")
        self.assertEqual([(state["name"], state["checksum"]) for state in report["states"]],
                         [(name, "right") for name in names])

    @cases(("host", "pc", "plugin"), ("10.0", "q35", "attach"), ("newest", "microvm", "plugin"),
           ("newest", "virt", "attach"), quick=[("newest", "microvm", "plugin")])
    def test_convert(self, qemu, machine, how):
        guest = self.saved(qemu, machine, how)
        legacy = self.json("info", self.image, "it")["stream"]
        steps = [["--compress"], ["--layout", "mapped-ram"], ["--layout", "mapped-ram", "--compress"],
                 ["--layout", "legacy", "--compress"], []]
        for step in steps[:3] if Settings.quick else steps:
            with self.subTest(step=step):
                before = os.stat(self.image).st_blocks
                said = self.json("convert", self.image, "it", *step)
                self.assert_whole(guest, ["it", "other"])
                stream = self.json("info", self.image, "it")["stream"]
                self.assertEqual(stream["ram-blocks"], legacy["ram-blocks"])
                self.assertEqual(stream["devices"], legacy["devices"])
                if "--compress" in step:
                    self.assertLess(said["stored-bytes"], said["size"])
                if step == ["--compress"]:
                    self.assertEqual(stream["size"], legacy["size"])
                    self.assertLess(os.stat(self.image).st_blocks, before)
                if stream["layout"] == "legacy" or guest.qemu.version >= (10, 2):
                    self.assert_loads(guest)
        # The other one was not touched, and qemu-img can do what it could.
        guest.qemu.img("snapshot", "-d", "other", guest.qemu.inner(self.image))
        guest.check_image()

    @cases(("host", "pc", "plugin"), ("10.0", "microvm", "attach"), ("newest", "microvm", "plugin"),
           ("newest", "virt", "attach"), quick=[("newest", "microvm", "plugin")])
    def test_export_and_import(self, qemu, machine, how):
        guest = self.saved(qemu, machine, how)
        files = {}
        for layout, way in (("legacy", "legacy"), ("mapped-ram", "plain")):
            files[layout] = guest.path(layout)
            self.tool("export", self.image, "it", files[layout], "--layout", layout)
            self.assertEqual(self.info_layout(files[layout]), layout)
            if layout == "legacy" or guest.qemu.version >= (9, 0):
                mapped.receive(guest, files[layout], mapped.WAYS[way])
                self.assert_same_state(self.state, guest.state())
                guest.kill()
        self.refused(["export", self.image, "it", files["legacy"]], "exists")

        disks = [option for disk in guest.disks[1:] for option in ("--disk", disk.path)]
        # The disks of a saved domain are as it left them.
        for disk in guest.disks:
            guest.qemu.img("snapshot", "-a", "it", guest.qemu.inner(disk.path))
        self.tool("import", files["legacy"], self.image, "plain", *disks)
        self.tool("import", files["mapped-ram"], self.image, "mapped", *disks)
        self.tool("import", files["mapped-ram"], self.image, "turned", "--layout", "legacy", *disks)
        names = ["plain", "mapped", "turned", *self.import_from_libvirt(guest, disks)]
        self.refused(["import", files["legacy"], self.image, "plain"], "--replace")
        self.assert_whole(guest, ["it", "other", *names])
        for name in names[-1:] if Settings.quick else names:
            if self.info_layout(self.image, name) == "legacy" or guest.qemu.version >= (10, 2):
                with self.subTest(name=name):
                    self.assert_loads(guest, name)

    def import_from_libvirt(self, guest, disks):
        """Through files as `virsh save` writes them: by us, and compressed by others."""
        xml = "<domain type='kvm'>\n  <name>it</name>\n</domain>\n"
        with open(guest.path("it.xml"), "w", encoding="ascii") as file:
            file.write(xml)
        saved, compressed = guest.path("it.save"), guest.path("it.save.gz")
        names = []
        for layout in ("legacy", "mapped-ram"):
            self.tool("export", self.image, "it", saved, "--as", "libvirt-save", "--xml",
                      guest.path("it.xml"), "--layout", layout)
            with open(saved, "rb") as file:
                header = file.read(92)
                # magic, version, data length, was running, format (0 raw, 6 sparse), no cookie
                magic, version, length, running, kind, cookie = struct.unpack("=16s5I", header[:36])
                self.assertEqual((magic, version, running, kind, cookie),
                                 (b"LibvirtQemudSave", 2, 1, 0 if layout == "legacy" else 6, 0))
                self.assertEqual(file.read(length).split(b"\0")[0].decode(), xml)
                stream = file.read()
            self.assertTrue(stream.startswith(b"QEVM"))
            self.tool("import", saved, self.image, f"virsh-{layout}", *disks, "--save-xml",
                      guest.path(f"{layout}.xml"))
            with open(guest.path(f"{layout}.xml"), encoding="ascii") as file:
                self.assertEqual(file.read(), xml)
            names.append(f"virsh-{layout}")
            if layout == "legacy":
                with open(compressed, "wb") as file:
                    file.write(struct.pack("=16s5I56x", magic, 2, length, 1, 1, 0))
                    file.write(xml.encode().ljust(length, b"\0"))
                    file.write(gzip.compress(stream, 1))
            os.unlink(saved)
        self.tool("import", compressed, self.image, "virsh-gzip", *disks)
        with open(compressed, "r+b") as file:
            file.truncate(os.path.getsize(compressed) - 100)
        self.refused(["import", compressed, self.image, "cut"], "cut short")
        subprocess.run(["zstd", "-q", "-1", guest.path("legacy"), "-o", guest.path("it.zst")],
                       check=True)
        self.tool("import", guest.path("it.zst"), self.image, "zstd", *disks)
        return [*names, "virsh-gzip", "zstd"]

    def test_usage(self):
        for words in ("check", "convert i", "convert i n --layout best", "convert i n --threads 0",
                      "export i n", "export i n f --as libvirt-save", "export i n f --xml x",
                      "export i n f --as elf", "import f i", "import f i n --offset x", "diff i a"):
            done = self.run_tool(*words.split())
            self.assertEqual((done.returncode, done.stdout), (2, ""), words + done.stderr)
            self.assertIn(f"qvmstate: {words.split()[0]}: ", done.stderr)

    def test_files_that_are_none(self):
        image, path = (os.path.join(self.folder, name) for name in ("image", "file"))
        find_qemu("host").img("create", "-q", "-f", "qcow2", image, "1M")
        with open(image, "rb") as file:
            before = file.read()

        def header(magic=b"LibvirtQemudSave", version=2, length=5, running=1, kind=0, cookie=0):
            return struct.pack("=16s5I56x", magic, version, length, running, kind, cookie)

        for content, word in (
                (b"", "stream"), (b"QEVM", "cut short"), (b"LibvirtQemudSave", "xml"),
                (header(), "xml"), (header() + b"<a/>\0", "no stream of qemu"),
                (header(length=2**31) + b"<a/>\0", "xml"), (header(length=0) + b"<a/>\0", "xml"),
                (header(cookie=6) + b"<a/>\0", "xml"), (header(version=3 << 16) + b"<a/>\0", "version"),
                (header(kind=7) + b"<a/>\0", "format 7"), (header(kind=3) + b"<a/>\0", "xz"),
                (header(magic=b"LibvirtQemudPart") + b"<a/>\0", "never finished"),
                (header(kind=1) + b"<a/>\0" + b"\x1f\x8bgarbage", "damaged"),
                (b"\x28\xb5\x2f\xfdgarbage", "damaged"), (gzip.compress(b"QEVM"), "cut short")):
            with self.subTest(content=content[:40]):
                with open(path, "wb") as file:
                    file.write(content)
                self.refused(["import", path, image, "it"], word)
        with open(image, "rb") as file:
            self.assertEqual(file.read(), before)

    @cases(("newest", "microvm", "plugin"), quick=[])
    def test_diff(self, qemu, machine, how):
        guest = self.saved(qemu, machine, how)
        self.tool("convert", self.image, "other", "--layout", "mapped-ram")
        same = self.json("diff", self.image, "it", "it")
        self.assertEqual([block["pages-differ"] for block in same["ram-blocks"]],
                         [0] * len(same["ram-blocks"]))
        self.assertEqual(same["sections"], [])
        found = self.json("diff", self.image, "it", "other")
        self.assertIn("pages differ", self.tool("diff", self.image, "it", "other"))
        # The oracle: each block of both, byte for byte.
        for block in found["ram-blocks"]:
            texts = []
            for name in ("it", "other"):
                out = guest.path(name + ".block")
                self.tool("extract", self.image, name, "--as", "block", block["name"], "-o", out)
                with open(out, "rb") as file:
                    texts.append(file.read())
                os.unlink(out)
            differ = [at for at in range(0, len(texts[0]), PAGE)
                      if texts[0][at:at + PAGE] != texts[1][at:at + PAGE]]
            self.assertEqual(block["pages-differ"], len(differ))
            told = [at for offset, size in block["ranges"]
                    for at in range(offset, offset + size, PAGE)]
            self.assertEqual(told, differ)
        self.assertGreater(max(block["pages-differ"] for block in found["ram-blocks"]), 1000)
        self.assertIn("cpu", [section["name"] for section in found["sections"]])
