"""The command on images that no VM is using, with qemu-img as the judge.

Images are made by qemu-img, snapshots get sizes, clocks and icounts written into the table by hand
(a qemu-img snapshot has none). What `qvmstate` prints is compared with what qemu-img prints, and
what it deletes with what qemu-img sees afterwards.

Run: python3 -m unittest test_cli_offline   (QVMSTATE_BUILD: folder of the program, default build/)
"""

import errno
import fcntl
import json
import os
import pwd
import re
import shutil
import struct
import subprocess
import tempfile
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROGRAM = os.path.join(os.environ.get("QVMSTATE_BUILD", os.path.join(ROOT, "build")), "qvmstate")
ICOUNT_NONE = 2**64 - 1


def run(*arguments, **options):
    """Runs the program; a hang is a failure."""
    options.setdefault("timeout", 60)
    options.setdefault("stdout", subprocess.PIPE)
    options.setdefault("stderr", subprocess.PIPE)
    environment = dict(os.environ, TZ="UTC")
    return subprocess.run([PROGRAM, *arguments], env=environment, **options)


def qemu_img(*arguments, check=True):
    return subprocess.run(["qemu-img", *arguments], env=dict(os.environ, TZ="UTC"), check=check,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def set_snapshot(path, index, size=None, seconds=None, clock=None, icount=None, name=None):
    """Writes fields of one snapshot table entry in place; a new name has the length of the old."""
    with open(path, "r+b") as image:
        image.seek(60)
        count, offset = struct.unpack(">IQ", image.read(12))
        assert index < count
        for number in range(index + 1):
            image.seek(offset)
            entry = bytearray(image.read(40))
            id_length, name_length = struct.unpack(">HH", entry[12:16])
            extra_length, = struct.unpack(">I", entry[36:40])
            extra = bytearray(image.read(extra_length))
            start = offset
            offset += (40 + extra_length + id_length + name_length + 7) // 8 * 8
        if size is not None:
            entry[32:36] = struct.pack(">I", 0)
            extra[0:8] = struct.pack(">Q", size)
        if seconds is not None:
            entry[16:20] = struct.pack(">I", seconds)
        if clock is not None:
            entry[24:32] = struct.pack(">Q", clock)
        if icount is not None:
            extra[16:24] = struct.pack(">Q", icount)
        image.seek(start)
        image.write(entry + extra)
        if name is not None:
            assert len(name) == name_length
            image.seek(start + 40 + extra_length + id_length)
            image.write(name)


def content(path):
    with open(path, "rb") as file:
        return file.read()


def columns(table):
    """Rows of `snapshot -l`: (id, tag, size, date, clock in ms, icount). Releases differ in widths
    and in the digits of the hours, and 7.2 prints nothing where there is no icount."""
    rows = []
    for line in table.decode().splitlines()[2:]:
        match = re.fullmatch(
            r"(\S+)\s+(.*?)\s+(\S+ [KMGTPE]?i?B) (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\s*"
            r"(\d+):(\d\d):(\d\d)\.(\d{3})\s*(\S*)\s*", line)
        assert match, f"not a row: {line!r}"
        tag = match.groups()
        clock = ((int(tag[4]) * 60 + int(tag[5])) * 60 + int(tag[6])) * 1000 + int(tag[7])
        rows.append((*tag[:4], clock, tag[8] or "--"))
    return rows


class OfflineTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        if not shutil.which("qemu-img"):
            raise unittest.SkipTest("no qemu-img on this machine (package qemu-utils)")

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def path(self, name):
        return os.path.join(self.folder, name)

    def image(self, name="disk.qcow2", options="", size="64M", data=True, snapshots=()):
        """A qcow2 with data that changes from snapshot to snapshot."""
        path = self.path(name)
        arguments = ["create", "-q", "-f", "qcow2"]
        if options:
            arguments += ["-o", options]
        qemu_img(*arguments, path, size)
        self.write(path, 0, data)
        for number, snapshot in enumerate(snapshots):
            qemu_img("snapshot", "-c", snapshot, path)
            self.write(path, number + 1, data)
        return path

    def write(self, path, number, data):
        if not data:
            return
        # Overwrites half of what the last one wrote.
        subprocess.run(["qemu-io", "-f", "qcow2", "-c",
                        f"write -P {number + 1} {number * 512}k 1M", path],
                       check=True, stdout=subprocess.DEVNULL)

    def active_disk(self, path):
        raw = self.path("active.raw")
        qemu_img("convert", "-O", "raw", path, raw)
        return content(raw)

    def snapshot_disk(self, path, snapshot):
        raw = self.path("snapshot.raw")
        qemu_img("convert", "-O", "raw", "-l", f"snapshot.name={snapshot}", path, raw)
        return content(raw)

    def names(self, path):
        info = json.loads(qemu_img("info", "--output=json", path).stdout)
        return [snapshot["name"] for snapshot in info.get("snapshots", [])]

    def assert_clean(self, path):
        check = qemu_img("check", path, check=False)
        self.assertEqual(check.returncode, 0, check.stdout + check.stderr)

    def assert_fails(self, done, status, operation, *words):
        """Exit status, and one line on stderr that says what and why."""
        message = done.stderr.decode()
        self.assertEqual(done.returncode, status, message)
        self.assertTrue(message.startswith(f"qvmstate: {operation}: "), message)
        if status == 1:
            self.assertEqual(message.count("\n"), 1, message)
        for word in words:
            self.assertIn(word, message)


class ListTest(OfflineTest):
    def varied(self):
        names = [f"s{number}" for number in range(9)] + ["a name, and a long one at that"]
        path = self.image(data=False, snapshots=names)
        hour = 3600 * 10**9
        set_snapshot(path, 0, size=1, clock=0)
        set_snapshot(path, 1, size=999, clock=999_999, icount=12345678901)
        set_snapshot(path, 2, size=1000, clock=123 * hour + 5_000_000, icount=ICOUNT_NONE)
        set_snapshot(path, 3, size=1024, clock=9999 * hour)
        set_snapshot(path, 4, size=1024 * 999 + 600)
        set_snapshot(path, 5, size=1024 * 1024 - 1, seconds=2**32 - 1)
        set_snapshot(path, 6, size=268447801, seconds=0)
        set_snapshot(path, 7, size=2**40, clock=99 * hour + 59 * 60 * 10**9 + 59_999_999_999)
        set_snapshot(path, 8, size=2**62 + 2**61, icount=2**62)
        set_snapshot(path, 9, size=5 * 2**30 + 2**28)
        return path

    def test_same_columns_as_qemu_img(self):
        path = self.varied()
        ours = run("list", path)
        self.assertEqual(ours.returncode, 0, ours.stderr)
        theirs = qemu_img("snapshot", "-l", path)
        self.assertEqual(columns(ours.stdout), columns(theirs.stdout))
        self.assertEqual(len(columns(ours.stdout)), 10)
        self.assertEqual(ours.stdout.splitlines()[1].split(),
                         [b"ID", b"TAG", b"VM_SIZE", b"DATE", b"VM_CLOCK", b"ICOUNT"])

    def test_icount_none_is_shown_as_dashes(self):
        self.assertEqual(columns(run("list", self.varied()).stdout)[2][5], "--")

    def test_json_says_what_qemu_img_info_says(self):
        path = self.varied()
        ours = json.loads(run("list", "--format", "json", path).stdout)
        theirs = json.loads(qemu_img("info", "--output=json", path).stdout)["snapshots"]
        for snapshot in ours:
            self.assertEqual(snapshot.pop("disk-size"), 64 << 20)
        self.assertEqual(ours, theirs)

    def test_no_snapshots(self):
        path = self.image()
        self.assertEqual(run("list", path).stdout, b"")
        self.assertEqual(json.loads(run("list", "--format", "json", path).stdout), [])

    def test_hostile_names_stay_text(self):
        path = self.image(snapshots=["AAAAAAAA"])
        set_snapshot(path, 0, name=b"\x1b[2J\n\xff\"\\")
        human = run("list", path)
        self.assertEqual(human.returncode, 0)
        self.assertNotIn(b"\x1b", human.stdout)
        self.assertEqual(human.stdout.count(b"\n"), 3)
        json.loads(run("list", "--format", "json", path).stdout.decode("utf-8"))

    def test_image_is_not_changed(self):
        path = self.varied()
        before = content(path)
        run("list", path)
        run("info", path)
        run("info", path, "s0")
        self.assertEqual(content(path), before)

    def test_unwritable_image_can_be_listed(self):
        path = self.image(snapshots=["one"])
        os.chmod(path, 0o444)
        self.assertEqual(run("list", path).returncode, 0)


class InfoTest(OfflineTest):
    def test_image(self):
        base = self.image("base.qcow2")
        path = self.path("top.qcow2")
        qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", "-o",
                 "cluster_size=4096,refcount_bits=64,lazy_refcounts=on", path)
        qemu_img("snapshot", "-c", "one", path)
        human = run("info", path).stdout.decode()
        for line in ["format: qcow2 version 3", "virtual size: 64 MiB (67108864 bytes)",
                     "cluster size: 4 KiB (4096 bytes)", "refcount bits: 64",
                     "features: lazy refcounts", f"backing file: {base}", "snapshots: 1",
                     "can take a VM state: yes"]:
            self.assertIn(line + "\n", human)
        said = json.loads(run("info", "--format", "json", path).stdout)
        theirs = json.loads(qemu_img("info", "--output=json", path).stdout)
        for key in ["format", "virtual-size", "cluster-size", "backing-filename", "filename"]:
            self.assertEqual(said[key], theirs[key], key)
        self.assertEqual(said["version"], 3)
        self.assertEqual(said["refcount-bits"], 64)
        self.assertEqual(said["snapshots"], 1)
        self.assertIs(said["can-take-vmstate"], True)

    def test_reason_why_not(self):
        for options, word in [("compat=0.10", None), ("refcount_bits=1", "refcounts of one bit"),
                              ("extended_l2=on", None),
                              ("compression_type=zstd", None), ("cluster_size=512", None)]:
            with self.subTest(options):
                path = self.image(options=options)
                human = run("info", path)
                self.assertEqual(human.returncode, 0, human.stderr)
                said = json.loads(run("info", "--format", "json", path).stdout)
                self.assertIs(said["can-take-vmstate"], word is None)
                if word:
                    self.assertIn(word, said["reason"])
                    self.assertIn("can take a VM state: no: ", human.stdout.decode())
                os.unlink(path)

    def test_bitmap(self):
        path = self.image()
        qemu_img("bitmap", "--add", path, "dirty0")
        said = json.loads(run("info", "--format", "json", path).stdout)
        self.assertEqual(said["persistent-bitmaps"], 1)
        self.assertIs(said["can-take-vmstate"], False)
        self.assertIn("bitmap", said["reason"])

    def test_luks_takes_its_disk_only(self):
        path = self.path("luks.qcow2")
        made = qemu_img("create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=abc", "-o",
                        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", path,
                        "16M", check=False)
        if made.returncode != 0:
            self.skipTest(f"this qemu-img makes no LUKS images: {made.stderr.decode().strip()}")
        said = json.loads(run("info", "--format", "json", path).stdout)
        self.assertIs(said["can-take-vmstate"], False)
        self.assertIs(said["can-take-disk-snapshot"], True)
        self.assertIn("no, but the snapshot of its disk: ", run("info", path).stdout.decode())

    def test_disk_only_snapshot(self):
        path = self.image(snapshots=["one"])
        human = run("info", path, "one")
        self.assertEqual(human.returncode, 0, human.stderr)
        self.assertIn(b"no VM state: disk only\n", human.stdout)
        said = json.loads(run("info", "--format", "json", path, "one").stdout)
        self.assertEqual(said["name"], "one")
        self.assertEqual(said["vm-state-size"], 0)
        self.assertNotIn("stream", said)

    def test_vm_state_that_is_none(self):
        path = self.image(snapshots=["one"])
        set_snapshot(path, 0, size=4096)
        self.assert_fails(run("info", path, "one"), 1, "info", path, "'one'")

    def test_missing_snapshot(self):
        path = self.image(snapshots=["one"])
        done = run("info", "--format", "json", path, "two")
        self.assert_fails(done, 1, "info", path, "two")
        event = json.loads(done.stdout)
        self.assertEqual((event["event"], event["operation"], event["code"]),
                         ("failed", "info", "not-found"))


class VmStateTest(OfflineTest):
    """A VM state that QEMU itself wrote."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if not shutil.which("qemu-system-x86_64"):
            raise unittest.SkipTest("no qemu-system-x86_64 on this machine")

    def savevm(self, path, name):
        """16 MiB of RAM of a machine that never ran: nearly all of it is zero."""
        subprocess.run(["qemu-system-x86_64", "-S", "-nodefaults", "-machine", "pc,accel=tcg",
                        "-m", "16", "-drive", f"file={path},if=virtio", "-display", "none",
                        "-monitor", "stdio"], input=f"savevm {name}\nquit\n".encode(), check=True,
                       stdout=subprocess.DEVNULL, timeout=120)
        self.assertEqual(self.names(path)[-1], name)

    def test_stream_of_savevm(self):
        path = self.image(snapshots=["disk-only"])
        self.savevm(path, "whole")
        done = run("info", "--format", "json", path, "whole")
        self.assertEqual(done.returncode, 0, done.stderr)
        said = json.loads(done.stdout)
        stream = said["stream"]
        self.assertEqual(stream["layout"], "legacy")
        self.assertRegex(stream["machine-type"], r"^pc-i440fx-\d+\.\d+$")
        blocks = {block["name"]: block["size"] for block in stream["ram-blocks"]}
        self.assertEqual(blocks["pc.ram"], 16 << 20)
        # Every page is sent at least once.
        self.assertGreaterEqual(stream["data-pages"] + stream["zero-pages"],
                                sum(blocks.values()) // 4096)
        # The BIOS is there, in ROM and in RAM, and hardly anything else.
        self.assertGreater(stream["data-pages"], 16)
        self.assertLess(stream["data-pages"], 1024)
        devices = {(device["name"], device["instance"]) for device in stream["devices"]}
        for device in [("timer", 0), ("cpu", 0), ("PCIHost", 0), ("i8259", 0), ("i8259", 1)]:
            self.assertIn(device, devices)
        self.assertLessEqual(stream["size"], said["vm-state-size"])
        self.assertGreaterEqual(said["vm-state-size-on-disk"], stream["data-pages"] * 4096)
        self.assertLess(said["vm-state-size-on-disk"], os.stat(path).st_size)
        human = run("info", path, "whole").stdout.decode()
        self.assertIn(f"machine type: {stream['machine-type']}\n", human)
        self.assertRegex(human, r"(?m)^  pc\.ram +16 MiB$")
        self.assertEqual(columns(run("list", path).stdout),
                         columns(qemu_img("snapshot", "-l", path).stdout))

    def test_devices_of_savevm(self):
        """Decoded by QEMU's own description, every one, to its last byte."""
        path = self.image()
        self.savevm(path, "s")
        done = run("extract", path, "s", "--as", "devices", "-o", "-")
        self.assertEqual(done.returncode, 0, done.stderr)
        devices = json.loads(done.stdout)["devices"]
        self.assertGreater(len(devices), 20)
        raw = [device["name"] for device in devices if "fields" not in device]
        self.assertEqual(raw, [])
        cpu, = [device["fields"] for device in devices if device["name"] == "cpu"]
        self.assertEqual((cpu["env.eip"], cpu["env.cr[0]"]), (0xfff0, 0x60000010))  # out of reset
        self.assertEqual(cpu["env.segs"][1]["base"], 0xffff0000)

    def test_delete_among_others(self):
        path = self.image()
        for name in ("one", "two", "three"):
            self.savevm(path, name)
        two = run("info", "--format", "json", path, "two").stdout
        active = self.active_disk(path)
        for name in ("one", "three"):
            done = run("delete", name, path)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assert_clean(path)
        self.assertEqual(self.names(path), ["two"])
        self.assertEqual(run("info", "--format", "json", path, "two").stdout, two)
        self.assertEqual(self.active_disk(path), active)
        # QEMU loads it.
        loaded = subprocess.run(["qemu-system-x86_64", "-S", "-nodefaults", "-machine",
                                 "pc,accel=tcg", "-m", "16", "-drive", f"file={path},if=virtio",
                                 "-display", "none", "-monitor", "stdio", "-loadvm", "two"],
                                input=b"quit\n", stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE, timeout=120)
        self.assertEqual((loaded.returncode, loaded.stderr), (0, b""))
        self.assert_clean(path)


class DeleteTest(OfflineTest):
    def test_every_kind_of_image(self):
        for options in ["compat=0.10", "compat=1.1", "cluster_size=512", "cluster_size=2M",
                        "refcount_bits=2", "refcount_bits=64", "lazy_refcounts=on"]:
            with self.subTest(options):
                names = ["one", "two", "three"]
                if options == "refcount_bits=2":
                    names = ["one", "two"]  # counts go to 3: active disk and two snapshots
                path = self.image(options=options, size="8M", snapshots=names)
                self.assert_clean(path)
                while names:
                    name = names.pop(len(names) // 2)
                    active = self.active_disk(path)
                    kept = {other: self.snapshot_disk(path, other) for other in names}
                    done = run("delete", name, path)
                    self.assertEqual(done.returncode, 0, done.stderr)
                    self.assertEqual(done.stdout.decode(), f"deleted '{name}' from {path}\n")
                    self.assert_clean(path)
                    self.assertEqual(self.names(path), names)
                    self.assertEqual(self.active_disk(path), active)
                    for other, disk in kept.items():
                        self.assertEqual(self.snapshot_disk(path, other), disk, other)
                # QEMU goes on with the image.
                qemu_img("snapshot", "-c", "again", path)
                self.write(path, 7, True)
                qemu_img("snapshot", "-a", "again", path)
                self.assert_clean(path)
                os.unlink(path)

    def test_gives_the_space_back(self):
        path = self.path("disk.qcow2")
        qemu_img("create", "-q", "-f", "qcow2", path, "64M")
        for pattern in (1, 2):
            subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} 0 32M", path],
                           check=True, stdout=subprocess.DEVNULL)
            if pattern == 1:
                qemu_img("snapshot", "-c", "one", path)
        before = os.stat(path).st_blocks * 512
        self.assertEqual(run("delete", "one", path).returncode, 0)
        self.assert_clean(path)
        self.assertLess(os.stat(path).st_blocks * 512, before - (30 << 20))

    def test_several_images(self):
        first = self.image("first.qcow2", snapshots=["keep", "gone"])
        second = self.image("second.qcow2", snapshots=["gone"])
        third = self.image("third.qcow2", snapshots=["keep"])
        set_snapshot(first, 1, size=4096)
        done = run("delete", "--format", "json", "gone", first, second, third)
        self.assertEqual(done.returncode, 0, done.stderr)
        event = json.loads(done.stdout)
        self.assertEqual((event["event"], event["operation"], event["name"]),
                         ("completed", "delete", "gone"))
        for path, names in [(first, ["keep"]), (second, []), (third, ["keep"])]:
            self.assertEqual(self.names(path), names)
            self.assert_clean(path)

    def test_names_like_an_interrupted_save_stay(self):
        """People may use such names; only a mark in the extra data makes one an interrupted save."""
        paths = [self.image(name, snapshots=["nightly.new-3", "other"]) for name in ("a", "b")]
        done = run("delete", "other", *paths)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stderr, b"")
        for path in paths:
            self.assertEqual(self.names(path), ["nightly.new-3"])

    def test_missing_name_changes_nothing(self):
        path = self.image(snapshots=["one"])
        before = content(path)
        # "1" is the id of the snapshot: names alone count.
        for name in ["two", "1", "on", "one ", ""]:
            self.assert_fails(run("delete", name, path), 1, "delete")
        self.assertEqual(content(path), before)

    def test_one_bad_image_of_several_changes_nothing(self):
        good = self.image("good.qcow2", snapshots=["one"])
        bad = self.path("bad.qcow2")
        with open(bad, "wb") as file:
            file.write(b"not a qcow2 image" * 1000)
        before = content(good)
        self.assert_fails(run("delete", "one", good, bad), 1, "delete", bad)
        self.assertEqual(content(good), before)

    def test_same_image_twice(self):
        path = self.image(snapshots=["one"])
        os.link(path, self.path("other-name.qcow2"))
        self.assert_fails(run("delete", "one", path, self.path("other-name.qcow2")), 1, "delete",
                          "given twice")
        self.assertEqual(self.names(path), ["one"])

    def test_name_of_a_subcommand_or_an_option(self):
        path = self.image(snapshots=["list", "--help"])
        self.assertEqual(run("delete", "list", path).returncode, 0)
        done = run("delete", "--", "--help", path)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.names(path), [])

    def test_unwritable_image(self):
        path = self.image(snapshots=["one"])
        os.chmod(path, 0o444)
        self.assert_fails(run_as_nobody(self, "delete", "one", path), 1, "delete", path,
                          "Permission denied")
        self.assertEqual(self.names(path), ["one"])


def run_as_nobody(test, *arguments):
    """For permissions, which root does not feel."""
    if os.geteuid() != 0:
        return run(*arguments)
    nobody = pwd.getpwnam("nobody")
    copy = os.path.join(test.folder, "qvmstate-copy")
    if not os.path.exists(copy):
        shutil.copy(PROGRAM, copy)
    os.chmod(copy, 0o755)
    os.chmod(test.folder, 0o755)
    return subprocess.run([copy, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=60, user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[])


class LockTest(OfflineTest):
    F_OFD_SETLK = 37

    def lock(self, path, byte):
        """What QEMU holds: a read lock on one byte by an open file description of its own."""
        descriptor = os.open(path, os.O_RDWR)
        self.addCleanup(os.close, descriptor)
        # struct flock: type, whence, start, length, pid
        fcntl.fcntl(descriptor, self.F_OFD_SETLK,
                    struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))

    def test_a_writer_keeps_out_all_but_force_share(self):
        path = self.image(snapshots=["one"])
        for byte in (100, 101, 103, 201, 203):
            self.lock(path, byte)
        before = content(path)
        self.assert_fails(run("list", path), 1, "list", path, "--force-share")
        self.assert_fails(run("info", path), 1, "info", path, "--force-share")
        self.assert_fails(run("delete", "one", path), 1, "delete", path, "--qmp")
        for option in ("-U", "--force-share"):
            self.assertEqual(len(columns(run("list", option, path).stdout)), 1)
        self.assertEqual(run("info", "-U", path).returncode, 0)
        self.assertEqual(content(path), before)

    def test_a_reader_keeps_out_delete_only(self):
        path = self.image(snapshots=["one"])
        for byte in (100, 201, 203):
            self.lock(path, byte)
        self.assertEqual(run("list", path).returncode, 0)
        self.assert_fails(run("delete", "one", path), 1, "delete", path)
        self.assertEqual(self.names(path), ["one"])


class RefusalTest(OfflineTest):
    def everything(self, path, *words):
        """All three commands refuse the file with status 1, and with JSON say so there too."""
        for command in (["list", path], ["info", path], ["info", path, "x"], ["delete", "x", path]):
            done = run(*command, "--format", "json")
            self.assert_fails(done, 1, command[0], *words)
            event = json.loads(done.stdout)
            self.assertEqual(event["event"], "failed")
            self.assertEqual(event["operation"], command[0])
            self.assertIn(event["message"], done.stderr.decode())

    def test_not_a_qcow2(self):
        path = self.path("disk.raw")
        for start in (b"", b"QFI", b"QFI\xfb", b"\0" * 65536, os.urandom(65536)):
            with open(path, "wb") as file:
                file.write(start)
            self.everything(path, path)

    def test_directory(self):
        self.everything(self.folder, self.folder)

    def test_missing(self):
        self.everything(self.path("none.qcow2"), "none.qcow2", os.strerror(errno.ENOENT))

    def test_fifo_and_devices_do_not_hang(self):
        path = self.path("fifo")
        os.mkfifo(path)
        self.everything(path, path)
        self.everything("/dev/null", "/dev/null")

    def test_no_permission(self):
        path = self.image(snapshots=["one"])
        os.chmod(path, 0)
        for command in (["list", path], ["info", path], ["delete", "one", path]):
            self.assert_fails(run_as_nobody(self, *command), 1, command[0], path,
                              "Permission denied")

    def test_damaged_images_are_refused_not_crashed_on(self):
        path = self.image(snapshots=["one", "two"])
        clean = content(path)
        table, = struct.unpack(">Q", clean[64:72])
        damages = {
            "version": (4, b"\0\0\0\x09"),
            "cluster bits": (20, b"\0\0\0\x40"),
            "l1 entries": (36, b"\xff\xff\xff\xff"),
            "l1 offset": (40, b"\x7f" * 8),
            "refcount table offset": (48, b"\xff" * 8),
            "refcount table clusters": (56, b"\xff" * 4),
            "snapshot count": (60, b"\xff" * 4),
            "snapshot table offset": (64, b"\xff" * 8),
            "unknown incompatible bit": (72, b"\x80"),
            "snapshot name length": (table + 14, b"\xff\xff"),
            "snapshot extra length": (table + 36, b"\xff" * 4),
        }
        for name, (offset, damage) in damages.items():
            with self.subTest(name):
                with open(path, "wb") as file:
                    file.write(clean[:offset] + damage + clean[offset + len(damage):])
                self.everything(path, path)

    def test_cut_anywhere_never_crashes(self):
        path = self.image(snapshots=["one", "two"])
        clean = content(path)
        for length in [*range(0, 120, 7), 512, 65536, 65537, 131072, 196608, len(clean) - 1]:
            with open(path, "wb") as file:
                file.write(clean[:length])
            for command in (["list", path], ["info", path], ["delete", "one", path]):
                self.assertIn(run(*command).returncode, (0, 1), f"{command} at {length}")

    def test_corrupt_bit(self):
        path = self.image(snapshots=["one"])
        with open(path, "r+b") as file:
            file.seek(79)
            file.write(b"\x02")
        said = json.loads(run("info", "--format", "json", path).stdout)
        self.assertEqual(said["features"], ["corrupt"])
        self.assert_fails(run("delete", "one", path), 1, "delete", "qemu-img check")


class WordsTest(unittest.TestCase):
    """Usage, help and where the output goes: needs no qemu-img."""

    def test_wrong_usage_is_status_2(self):
        for arguments in ([], ["frobnicate"], ["list"], ["list", "--frobnicate", "x"],
                          ["list", "a", "b"], ["list", "x", "--format", "xml"], ["info"],
                          ["save"], ["save", "x"], ["save", "--qmp", "a"],
                          ["save", "x", "--qmp", "a", "--control", "b"],
                          ["save", "x", "--qmp", "a", "--limit-rate", "fast"],
                          ["save", "x", "--qmp", "a", "--limit-rate", "0"],
                          ["save", "x", "--qmp", "a", "--buffers", "1"],
                          ["save", "x", "--qmp", "a", "--buffers", "many"],
                          ["save", "x", "--qmp", "a", "--direct", "maybe"],
                          ["save", "x", "--qmp", "a", "--engine", "steam"],
                          ["load", "x"], ["load", "--qmp", "a"], ["resume"], ["delete", "x"],
                          ["delete"], ["delete", "x", "image", "--qmp", "a"],
                          ["list", "x", "--force-share=perhaps"], ["-q", "list", "x"]):
            with self.subTest(arguments):
                done = run(*arguments)
                self.assertEqual(done.returncode, 2, done.stderr)
                self.assertTrue(done.stderr.startswith(b"qvmstate: "), done.stderr)
                self.assertEqual(done.stdout, b"")

    def test_message_says_what_is_wrong(self):
        for arguments, word in (
                (["frobnicate"], b"'frobnicate'"),
                (["list", "x", "--format", "xml"], b"'xml' is not one of human|json"),
                (["save", "x", "--qmp", "a", "--limit-rate", "fast"], b"'fast'"),
                (["save", "x"], b"--control")):
            self.assertIn(word, run(*arguments).stderr)

    def test_help_and_version(self):
        done = run("--version")
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertRegex(done.stdout, rb"^qvmstate \d+\.\d+\.\d+\n$")
        done = run("--help")
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        for command in ("save", "load", "resume", "list", "info", "delete"):
            self.assertIn(command.encode(), done.stdout)
            one = run(command, "--help")
            self.assertEqual((one.returncode, one.stderr), (0, b""))
            self.assertIn(b"Usage: qvmstate " + command.encode(), one.stdout)
            self.assertIn(b"--format", one.stdout)
        self.assertIn(b"Examples:", done.stdout)
        self.assertIn(b"Examples:", run("save", "--help").stdout)

    def test_no_such_socket(self):
        for command in (["save", "x", "--qmp", "/nonexistent/qmp"],
                        ["save", "x", "--control", "/nonexistent/control"],
                        ["load", "x", "--qmp", "/nonexistent/qmp"],
                        ["resume", "--qmp", "/nonexistent/qmp"],
                        ["delete", "x", "--qmp", "/nonexistent/qmp"]):
            with self.subTest(command):
                done = run(*command, "--format", "json")
                self.assertEqual(done.returncode, 1)
                self.assertTrue(done.stderr.startswith(f"qvmstate: {command[0]}: ".encode()))
                self.assertIn(b"/nonexistent/", done.stderr)
                event = json.loads(done.stdout.splitlines()[-1])
                self.assertEqual((event["event"], event["operation"]), ("failed", command[0]))

    def test_full_and_closed_output_is_reported(self):
        with open("/dev/full", "wb") as full:
            done = run("--version", stdout=full)
        self.assertEqual(done.returncode, 1)
        self.assertIn(os.strerror(errno.ENOSPC).encode(), done.stderr)
        reader, writer = os.pipe()
        os.close(reader)
        done = run("--version", stdout=writer)
        os.close(writer)
        self.assertEqual(done.returncode, 1)
        self.assertIn(os.strerror(errno.EPIPE).encode(), done.stderr)

    def test_closed_descriptors(self):
        done = subprocess.run(["sh", "-c", f"exec {PROGRAM} --version >&-"],
                              stderr=subprocess.PIPE, timeout=60)
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"standard output", done.stderr)
        done = subprocess.run(["sh", "-c", f"exec {PROGRAM} list /nonexistent <&- >&- 2>&-"],
                              timeout=60)
        self.assertEqual(done.returncode, 1)


class ClosedOutputTest(OfflineTest):
    def test_nothing_is_written_into_the_image(self):
        """With stdout closed, the image must not become descriptor 1."""
        path = self.image(snapshots=["one", "two"])
        done = subprocess.run(["sh", "-c", f"exec {PROGRAM} delete one {path} <&- >&- 2>&-"],
                              timeout=60)
        self.assertEqual(done.returncode, 1)
        self.assert_clean(path)
        self.assertEqual(self.names(path), ["two"])


if __name__ == "__main__":
    unittest.main()
