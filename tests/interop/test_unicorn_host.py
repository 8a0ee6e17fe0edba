"""The C ABI with a host that is not QEMU: an emulator on Unicorn (tests/abi) that executes real
programs. What must come out of a run that was saved and loaded is what comes out of a run that was
not: registers, RAM, device and console.

The host does the same in each run, and each command below is a process of its own."""

import json
import os
import re
import signal
import subprocess
import time
import unittest

import bed

ROUNDS = 30000
SAVE_AT = 612345  # instructions; a run has about 1.4 million
BLOCKS = ["low", "main", "video", "nvram"]
PAGE_BYTES = {"x86_64": 4096, "aarch64": 16384}
NOT_FOUND, MISMATCH = 10, 14
CASES = [(arch, layout, way) for arch in PAGE_BYTES for layout in ("legacy", "mapped-ram")
         for way in ("stands", "live")]


class UnicornHost(bed.BedTest):
    finals = {}

    def setUp(self):
        super().setUp()
        self.image = os.path.join(self.folder, "vm.qcow2")
        self.check_call("qemu-img", "create", "-q", "-f", "qcow2", self.image, "64M")
        self.check_call("qemu-io", "-f", "qcow2", "-c", "write -q -P 90 1M 4M", self.image)

    def check_call(self, *args):
        done = subprocess.run(args, capture_output=True, text=True, timeout=60, check=False)
        self.assertEqual(done.returncode, 0, f"{args}: {done.stdout}{done.stderr}")
        return done.stdout

    def host(self, arch, *words, status=0):
        host = self.need("unicorn_host", "UNICORN_LIBRARY", "libunicorn-dev")
        program = self.need(f"guest_{arch}.bin", f"AS_{arch}", f"binutils-{arch}-linux-gnu")
        words = list(words)
        if "boot" in words:
            at = words.index("boot") + 1
            words[at:at] = [program, str(ROUNDS)]
        done = subprocess.run([host, self.built("libqvmstate.so"), arch, *map(str, words)],
                              capture_output=True, text=True, timeout=120, check=False)
        self.assertEqual(done.returncode, status, f"{words}: {done.stdout}{done.stderr}")
        return done

    def need(self, name, variable, package):
        """A file of the build that CMake leaves out where a package is missing."""
        with open(self.built("CMakeCache.txt"), encoding="utf-8") as cache:
            if re.search(rf"^{variable}:.*-NOTFOUND$", cache.read(), re.MULTILINE):
                raise unittest.SkipTest(f"{package} was not there when this was built")
        return self.built(os.path.join("tests", name))

    def final(self, arch):
        """The oracle: the state at the end of a run that nobody saves."""
        if arch not in self.finals:
            self.finals[arch] = self.host(arch, "boot", "finish", "state").stdout
            self.assertRegex(self.finals[arch], r"\nconsole [0-9a-f]{25,}\n")
        return self.finals[arch]

    def save(self, arch, *words, at=SAVE_AT, name="one"):
        return self.host(arch, "boot", "run", at, *words, "save", self.image, name).stdout

    def assert_runs_on(self, arch, *before, name="one"):
        ran = self.host(arch, *before, "load", self.image, name, "finish", "state")
        self.assertEqual(ran.stdout, self.final(arch))

    def snapshots(self):
        said = json.loads(self.check_call("qemu-img", "info", "--output=json", self.image))
        return said.get("snapshots", [])

    def wait_until_unlocked(self):
        """The kernel ends the transfers of a killed process, and with them its locks, when that is
        over already."""
        deadline = time.monotonic() + 20
        while bed.held_locks(self.image):
            self.assertLess(time.monotonic(), deadline, "the locks of a killed host stay")
            time.sleep(0.01)

    def assert_image_is_sound(self, *names):
        self.check_call("qemu-img", "check", "-q", self.image)
        self.check_call("qemu-io", "-f", "qcow2", "-c", "read -q -P 90 1M 4M", self.image)
        self.assertEqual([one["name"] for one in self.snapshots()], list(names))

    @bed.cases(*CASES)
    def test_runs_on_elsewhere(self, arch, layout, way):
        """Saved in one process, loaded in the next; the first one runs on too."""
        ram = os.path.join(self.folder, "ram")
        os.mkdir(ram)
        words = ["live", 4, 30000] if way == "live" else []
        saved = self.host(arch, "boot", "run", SAVE_AT, layout, *words, "save", self.image, "one",
                          "dump", ram, "finish", "state").stdout
        self.assertEqual(saved.partition("\n")[2], self.final(arch))
        self.assert_image_is_sound("one")
        self.assert_runs_on(arch)
        self.assert_read_by_the_command(arch, layout, ram)
        # In mapped-ram, pages that were sent again lie over others that were hashed already.
        expected = "none" if way == "live" and layout == "mapped-ram" else "right"
        checked = json.loads(self.tool("check", self.image, "one", "--format", "json"))
        self.assertEqual(checked["states"][0]["checksum"], expected, checked)

    def assert_read_by_the_command(self, arch, layout, ram):
        stream = json.loads(self.tool("info", self.image, "one", "--format", "json"))["stream"]
        self.assertEqual(stream["layout"], layout)
        self.assertEqual(stream["machine-type"], f"unicorn-{arch}")
        self.assertEqual(stream["page-size"], PAGE_BYTES[arch])
        self.assertEqual([(one["name"], one["size"]) for one in stream["ram-blocks"]],
                         [(name, os.path.getsize(os.path.join(ram, name))) for name in BLOCKS])
        self.assertEqual([(one["name"], one["version"]) for one in stream["devices"]],
                         [("cpu", 1), ("timer", 3), ("console", 1)])
        found = os.path.join(self.folder, "found")
        for block in BLOCKS:
            self.tool("extract", self.image, "one", "--as", "block", block, "-o", found)
            self.check_call("cmp", found, os.path.join(ram, block))
            os.unlink(found)

    @bed.cases(("x86_64", "mapped-ram"), ("aarch64", "legacy"), quick=[("x86_64", "mapped-ram")])
    def test_goes_back(self, arch, layout):
        """Into a machine that ran on: what it wrote where the snapshot has zeros must go."""
        self.save(arch, layout)
        self.assert_runs_on(arch, "boot", "run", 2 * SAVE_AT)

    @bed.cases("x86_64", "aarch64", quick=["aarch64"])
    def test_what_is_wrong_is_seen(self, arch):
        """That these tests can fail: a byte, a register, a round that is missing."""
        self.save(arch)
        for wrong in (["flip", "video", 5], ["flip", "main", (68 << 20) + 100], ["flip-alarm"]):
            ran = self.host(arch, "load", self.image, "one", *wrong, "finish", "state").stdout
            self.assertFalse(ran == self.final(arch), wrong)
        self.save(arch, "live", 3, 30000, "forget-last-round", name="two")
        ran = self.host(arch, "load", self.image, "two", "finish", "state").stdout
        self.assertFalse(ran == self.final(arch))

    @bed.cases("legacy", "mapped-ram", quick=["legacy"])
    def test_refused_loads_leave_ram(self, layout):
        self.save("x86_64", layout)
        for arch, first, name, code, words in (
                ("aarch64", [], "one", MISMATCH, ["machine 'unicorn-x86_64'", "unicorn-aarch64"]),
                ("x86_64", ["extra-pages", 1], "one", MISMATCH, ["RAM block 'main'"]),
                ("x86_64", [], "two", NOT_FOUND, ["'two'"])):
            said = self.host(arch, *first, "boot", "run", 1000, "state", "try-load", self.image,
                             name, "state").stdout
            before, _, rest = said.partition("failed ")
            line, _, after = rest.partition("\n")
            self.assertEqual(after, before, line)
            self.assertEqual(line.split()[0], str(code))
            for word in words:
                self.assertIn(word, line)

    def test_unknown_section(self):
        """A host without the console is told so, or goes on without it if it likes to."""
        self.save("x86_64")
        said = self.host("x86_64", "without-console", "try-load", self.image, "one").stdout
        self.assertRegex(said, rf"^failed {MISMATCH} .*'console' .*version 1")
        ran = self.host("x86_64", "without-console", "skip-unknown", "load", self.image, "one",
                        "finish", "state")
        self.assertIn("'console'", ran.stderr)
        console = self.final("x86_64").splitlines()[-2].split()[1]
        rest = ran.stdout.splitlines()[-2].split()[1]
        self.assertTrue(console.endswith(rest) and 10 < len(rest) < len(console), (console, rest))

    @bed.cases("legacy", "mapped-ram", quick=["mapped-ram"])
    def test_replace(self, layout):
        self.save("x86_64", layout)
        first = self.snapshots()
        again = self.host("x86_64", "boot", "run", 5, layout, "save", self.image, "one", status=1)
        self.assertIn("'one'", again.stderr)
        self.assertEqual(self.snapshots(), first)
        self.save("x86_64", layout, "replace", at=2 * SAVE_AT)
        self.assert_image_is_sound("one")
        loaded = self.host("x86_64", "load", self.image, "one", "state").stdout
        self.assertTrue(loaded.startswith(f"executed {2 * SAVE_AT}\n"), loaded[:40])
        self.assert_runs_on("x86_64")

    @bed.cases(("x86_64", "legacy", "die-in-ram"), ("aarch64", "mapped-ram", "die-in-ram"),
               ("aarch64", "legacy", "die-between-rounds"),
               ("x86_64", "mapped-ram", "die-in-sections"),
               quick=[("aarch64", "mapped-ram", "die-in-ram"), ("x86_64", "legacy", "die-in-ram"),
                      ("aarch64", "legacy", "die-between-rounds")])
    def test_killed(self, arch, layout, death):
        """SIGKILL in a save, of a new snapshot and of one that replaces another."""
        self.save(arch, layout)
        snapshots, blocks = self.snapshots(), os.stat(self.image).st_blocks
        live = ["live", 3, 30000] if death == "die-between-rounds" else []
        for words, name in (([], "two"), (["replace"], "one")):
            self.host(arch, "boot", "run", 99999, layout, *live, *words, death, "save", self.image,
                      name, status=-signal.SIGKILL)
            self.wait_until_unlocked()
            self.assertGreater(os.stat(self.image).st_blocks, blocks + 4096, "killed too early")
            self.assert_image_is_sound("one")
            self.assertEqual(self.snapshots(), snapshots)
            self.assert_runs_on(arch)
        self.save(arch, layout, *live, "replace")
        self.assert_image_is_sound("one")
        self.assert_runs_on(arch)

    @bed.cases(("x86_64", "mapped-ram"), ("aarch64", "legacy"), quick=[("aarch64", "legacy")])
    def test_ram_is_freed(self, arch, layout):
        """MAY_FREE, and an image that the host opened itself."""
        said = self.save(arch, layout, "may-free", "by-fds")
        _, _, _, ram, _, freed = said.split()
        self.assertGreater(int(freed), int(ram) // 2)
        self.assertLessEqual(int(freed), int(ram))
        self.assert_image_is_sound("one")
        self.assert_runs_on(arch, "by-fds")

    def test_list_and_delete(self):
        self.save("aarch64", "mapped-ram", name="one")
        self.save("x86_64", "legacy", name="two")
        expected = [f"snapshot {one['id']} {one['name']} {one['vm-state-size']} "
                    f"{one['vm-clock-sec'] * 10**9 + one['vm-clock-nsec']}"
                    for one in self.snapshots()]
        self.assertEqual(self.host("x86_64", "list", self.image).stdout.splitlines(), expected)
        self.assertTrue(expected[0].startswith("snapshot 1 one "), expected)
        self.assertTrue(expected[1].endswith(f" {SAVE_AT}"), expected)
        self.host("x86_64", "delete", self.image, "one")
        self.assert_image_is_sound("two")
        self.assert_runs_on("x86_64", name="two")
