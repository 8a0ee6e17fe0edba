"""`check` on images that QEMU and qvmstate wrote in turns: it agrees with qemu-img, the checksum of a
state outlives what QEMU does to the other snapshots, and no changed byte goes unnoticed."""

import json
import os
import shutil

from bed import BedTest, cases

MIB = 1 << 20


class Check(BedTest):
    def check(self, path, *options, status=0):
        done = self.run_tool("check", path, "--format", "json", *options)
        self.assertEqual(done.returncode, status, done.stderr + done.stdout)
        return json.loads(done.stdout)

    def assert_agrees(self, guest, path, report):
        """With qemu-img about the metadata."""
        done = guest.qemu.img("check", "--output=json", guest.qemu.inner(path), check=False)
        theirs = json.loads(done.stdout)
        self.assertEqual(report["leaks"], theirs.get("leaks", 0))
        self.assertEqual(report["total-clusters"], theirs["total-clusters"])
        self.assertEqual(report["allocated-clusters"], theirs["allocated-clusters"])
        self.assertEqual(report["image-end-offset"], theirs["image-end-offset"])

    def states(self, report):
        return {state["name"]: state["checksum"] for state in report["states"]}

    @cases(("host", "pc", "plugin"), ("10.0", "microvm", "attach"), ("newest", "microvm", "plugin"),
           ("newest", "virt", "attach"), quick=[("newest", "microvm", "plugin")])
    def test_check(self, qemu, machine, how):
        guest = self.make_vm(qemu, machine, plugin=how == "plugin").start()
        guest.fill(11)
        self.save(guest, "legacy")
        self.save(guest, "mapped", "--layout", "mapped-ram")
        guest.quit()
        image = guest.disks[0].path
        report = self.check(image, "--independent")
        self.assertEqual(report["result"], "clean")
        self.assert_agrees(guest, image, report)
        self.assertEqual(self.states(report), {"legacy": "right", "mapped": "right"})
        for state in report["states"]:
            self.assertGreater(state["compared-bytes"], 80 * MIB)
            self.assertGreater(state["data-pages"], 20 * MIB // 4096)
        self.flip_bytes(guest, image)

        # QEMU keeps the checksums through snapshots of its own.
        guest.start(loadvm="legacy")
        guest.savevm("own")
        guest.savevm("gone")
        guest.delvm("gone")
        guest.quit()
        report = self.check(image)
        self.assertEqual(self.states(report),
                         {"legacy": "right", "mapped": "right", "own": "none"})
        self.assertEqual(report["result"], "clean")
        self.assert_agrees(guest, image, report)
        own = next(state for state in report["states"] if state["name"] == "own")
        self.assertEqual(own["layout"], "legacy")
        guest.qemu.img("snapshot", "-d", "mapped", guest.qemu.inner(image))
        report = self.check(image)
        self.assertEqual(self.states(report), {"legacy": "right", "own": "none"})
        self.assertEqual(self.check(image, "legacy")["states"][0]["checksum"], "right")

    def flip_bytes(self, guest, image):
        copy = os.path.join(self.folder, "copy.qcow2")
        for name, pieces in (("legacy", (0.1, 0.5)), ("mapped", (0.3,))):
            for piece in pieces:
                shutil.copy(image, copy)
                self.flip_in_state(guest, copy, name, piece)
                report = self.check(copy, name, status=1)
                self.assertEqual(report["result"], "damaged")
                self.assertEqual(self.states(report), {name: "wrong"})
                self.refused_and_kept(guest, copy, name)
        os.unlink(copy)

    def refused_and_kept(self, guest, path, name):
        """A damaged state is not made anew, and no cluster of the image is another one after that."""
        def metadata():
            return guest.qemu.img("check", "--output=json", guest.qemu.inner(path)).stdout

        before, size = metadata(), os.path.getsize(path)
        for options in (["--compress"], ["--layout", "legacy"]):
            done = self.run_tool("convert", path, name, *options)
            self.assertEqual(done.returncode, 1)
            self.assertIn("does not have the checksum", done.stderr)
            self.assertEqual((metadata(), os.path.getsize(path)), (before, size))
            self.assertEqual(self.states(self.check(path, status=1))[name], "wrong")

    def flip_in_state(self, guest, path, name, where):
        """Changes one bit in a cluster of the state, found through its tables."""
        with open(path, "r+b") as file:
            header = file.read(72)
            bits = int.from_bytes(header[20:24], "big")
            disk = int.from_bytes(header[24:32], "big")
            count = int.from_bytes(header[60:64], "big")
            file.seek(int.from_bytes(header[64:72], "big"))
            for _ in range(count):
                start = file.tell()
                entry = file.read(40)
                extra = int.from_bytes(entry[36:40], "big")
                sizes = int.from_bytes(entry[12:14], "big"), int.from_bytes(entry[14:16], "big")
                file.seek(extra, os.SEEK_CUR)
                file.read(sizes[0])
                if file.read(sizes[1]).decode() == name:
                    break
                file.seek(start + (40 + extra + sum(sizes) + 7) // 8 * 8)
            l1_offset = int.from_bytes(entry[0:8], "big")
            l1_entries = int.from_bytes(entry[8:12], "big")
            span = 1 << (2 * bits - 3)
            clusters = []
            for index in range((disk + span - 1) // span, l1_entries):
                file.seek(l1_offset + 8 * index)
                table = int.from_bytes(file.read(8), "big") & 0x00fffffffffffe00
                file.seek(table)
                entries = file.read(1 << bits)
                for at in range(0, len(entries), 8):
                    offset = int.from_bytes(entries[at:at + 8], "big") & 0x00fffffffffffe00
                    if offset:
                        clusters.append(offset)
            offset = clusters[int(len(clusters) * where)] + 1234
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 4]))
