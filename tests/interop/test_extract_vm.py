"""What `extract` makes of the state of a real guest, compared with what QEMU itself says of the same
stopped guest: pmemsave, dump-guest-memory, info registers."""

import json
import os
import re
import shutil
import subprocess

import elf_core
import mapped
from bed import SOURCE, BedTest, cases, full_only

# Shadow RAM: what the CPUs see there the chipset decides.
CHIPSET = (0xa0000, 0x100000)
SAMPLE = 16 << 20
NT_PRSTATUS, NT_PRFPREG = 1, 2
FP_VALID = 384  # in the note NT_PRSTATUS of aarch64


class ExtractOfGuests(BedTest):
    def stopped(self, qemu, machine, **options):
        guest = self.make_vm(qemu, machine, second_block=False, **options).start()
        guest.fill(7)
        guest.stop()
        return guest

    def pmemsave(self, guest, address, size):
        path = guest.path("pmem")
        guest.qmp.execute("pmemsave", val=address, size=size, filename=guest.qemu.inner(path))
        with open(path, "rb") as file:
            data = file.read()
        os.unlink(path)
        return data

    def dump(self, guest):
        path = guest.path("dump")
        guest.qmp.execute("dump-guest-memory", paging=False,
                          protocol="file:" + guest.qemu.inner(path))
        return elf_core.Core(path)

    @staticmethod
    def main_memory(guest):
        """(address, bytes) of the RAM that the machine type places, without the chipset's part."""
        block, size, _ = max(guest.ram_blocks(), key=lambda block: block[1])
        if guest.machine.arch == "aarch64":
            return [(1 << 30, size)]
        if size > 2 << 30:
            raise RuntimeError(f"{block}: {size} bytes need a hole")
        return [(0, CHIPSET[0]), (CHIPSET[1], size - CHIPSET[1])]

    def assert_same_bytes(self, expected, found, where):
        if expected != found:
            at = next((i for i, (a, b) in enumerate(zip(expected, found)) if a != b), "the end")
            self.fail(f"{where}: differs first at {at}; {len(expected)} and {len(found)} bytes")

    def assert_notes_of_qemu(self, dump, core):
        """aarch64's floating-point registers are not in ours."""
        self.assertEqual(core.machine, dump.machine)
        expected = [note for note in dump.notes if note[1] != NT_PRFPREG and note[0] != "LINUX"]
        if core.machine == "aarch64":
            expected = [(owner, kind, data[:FP_VALID] + bytes(8)) for owner, kind, data in expected]
        # From 8.0 on there is one of the kernel, if the guest told it.
        expected = [note for note in expected if note[0] in ("CORE", "QEMU")]
        self.assertEqual(core.notes, expected)
        self.assertEqual([kind for _, kind, _ in core.notes].count(NT_PRSTATUS), 2)

    def assert_devices(self, guest, state):
        """Decoded as far as the program counters, which QEMU prints too."""
        with open(self.extract(*state, "--as", "devices"), encoding="utf-8") as file:
            devices = json.load(file)["devices"]
        name = "env.eip" if guest.machine.arch == "x86_64" else "env.pc"
        found = [device["fields"][name] for device in devices if device["name"] == "cpu"]
        said = re.findall(r"\b(?:RIP|PC)=([0-9a-f]+)", guest.registers())
        self.assertEqual(found, [int(digits, 16) for digits in said])

    def states(self, guest, expected_layouts):
        """The arguments that name each of the snapshots made here."""
        path = guest.disks[0].path
        names = []
        if "savevm" in expected_layouts:
            guest.savevm("savevm")
            names.append("savevm")
        for layout in ("legacy", "mapped-ram"):
            if layout in expected_layouts:
                self.save(guest, layout, "--layout", layout)
                names.append(layout)
        return [[path, name, "--force-share"] for name in names]

    @cases(("host", "pc", "savevm"), ("host", "microvm", "savevm legacy"),
           ("host", "virt", "savevm legacy"), ("10.0", "q35", "savevm legacy"),
           ("10.0", "virt", "savevm legacy"), ("newest", "pc", "savevm legacy mapped-ram"),
           ("newest", "microvm", "savevm mapped-ram"), ("newest", "virt", "savevm legacy mapped-ram"),
           quick=[("host", "microvm", "savevm legacy"), ("newest", "microvm", "savevm mapped-ram")])
    def test_memory_and_registers(self, qemu, machine, made_by):
        guest = self.stopped(qemu, machine, plugin=qemu == "host")
        states = self.states(guest, made_by.split())
        dump = self.dump(guest)
        pieces = [(address, self.pmemsave(guest, address, size))
                  for address, size in self.main_memory(guest)]
        for state in states:
            with self.subTest(state=state[1]):
                raw = self.extract(*state, "--as", "raw")
                with open(raw, "rb") as file:
                    for address, expected in pieces:
                        file.seek(address)
                        self.assert_same_bytes(expected, file.read(len(expected)),
                                               f"raw at {address:#x}")
                    self.assertEqual(file.read(), b"")
                core = elf_core.Core(self.extract(*state, "--as", "elf"))
                for address, expected in pieces:
                    self.assert_same_bytes(expected, core.read(address, len(expected)),
                                           f"elf at {address:#x}")
                    self.assert_same_bytes(dump.read(address, len(expected)), expected, "QEMU's own")
                self.assert_notes_of_qemu(dump, core)
                self.assert_devices(guest, state)
        guest.cont()
        self.assert_seed(guest, 7)

    @cases(("host", "pc", 3800, 3 << 30), ("newest", "q35", 3200, 2 << 30),
           ("10.0", "microvm", 3200, 3 << 30), quick=[])
    def test_hole_below_4_gib(self, qemu, machine, mib, low):
        guest = self.make_vm(qemu, machine, plugin=True)
        guest.memory_options = ["-m", f"{mib}M"]
        guest.start()
        guest.stop()
        high = (mib << 20) - low
        self.save(guest, "s")
        windows = [(CHIPSET[1], SAMPLE), (low - SAMPLE, SAMPLE), (4 << 30, SAMPLE),
                   ((4 << 30) + high - SAMPLE, SAMPLE)]
        expected = [(at, self.pmemsave(guest, at, size)) for at, size in windows]
        self.assertGreater(sum(any(data) for _, data in expected), 1)
        state = [guest.disks[0].path, "s", "--force-share"]
        raw = self.extract(*state, "--as", "raw")
        self.assertEqual(os.stat(raw).st_size, (4 << 30) + high)
        with open(raw, "rb") as file:
            for at, data in expected:
                file.seek(at)
                self.assert_same_bytes(data, file.read(len(data)), f"raw at {at:#x}")
        core = elf_core.Core(self.extract(*state, "--as", "elf"))
        self.assertEqual([load[:2] for load in core.loads], [(0, low), (4 << 30, high)])
        for at, data in expected:
            self.assert_same_bytes(data, core.read(at, len(data)), f"elf at {at:#x}")

    @full_only
    def test_stream_loads(self):
        """The bytes of the stream, as QEMU saved them, are a migration stream that QEMU loads."""
        guest = self.stopped("newest", "microvm")
        guest.savevm("s")
        state = guest.state()
        path = guest.disks[0].path
        guest.quit()
        stream = self.extract(path, "s", "--as", "stream")
        inner = guest.path("stream")
        os.rename(stream, inner)
        guest.start(incoming=f"exec:cat {guest.qemu.inner(inner)}", paused=True)
        mapped.wait_migrated(guest)
        self.assert_same_state(state, guest.state())
        piped = subprocess.run([self.built("qvmstate"), "extract", path, "s", "--as", "stream", "-o",
                                "-", "--force-share"], stdout=subprocess.PIPE, check=True, timeout=60)
        with open(inner, "rb") as file:
            self.assertEqual(file.read(), piped.stdout)

    def test_readme_walk(self):
        """The three commands of the README's offline section, as they stand there."""
        for program in ("gdb", "readelf"):
            if shutil.which(program) is None:
                self.skipTest(f"{program} is not installed")
        with open(os.path.join(SOURCE, "README.md"), encoding="utf-8") as file:
            found = re.search(r"<!-- walk:begin -->\n```sh\n(.*?)```\n<!-- walk:end -->", file.read(),
                              re.DOTALL)
        commands = [line.split("  #")[0].strip() for line in found[1].splitlines()]
        self.assertEqual(len(commands), 3)
        guest = self.stopped("host", "pc")  # whose firmware leaves the ports' addresses at 0x400
        guest.savevm("clean")
        registers = guest.qmp.hmp("info registers")
        memory = self.pmemsave(guest, 0, guest.ram_blocks()[0][1])
        guest.quit()
        os.rename(guest.disks[0].path, os.path.join(self.folder, "vm.qcow2"))
        folder = os.path.dirname(self.built("qvmstate"))
        said = [subprocess.run(command, shell=True, cwd=self.folder, text=True, timeout=60,
                               capture_output=True, check=True, stdin=subprocess.DEVNULL,
                               env={**os.environ, "PATH": folder + ":" + os.environ["PATH"]}).stdout
                for command in commands]
        self.assertIn("clean", said[0])
        rip = int(re.search(r"RIP=([0-9a-f]+)", registers)[1], 16)
        self.assertEqual(int(re.search(r"^rip\s+0x([0-9a-f]+)", said[2], re.MULTILINE)[1], 16), rip)
        shown = re.findall(r"\t0x([0-9a-f]{2})\b", said[2])
        self.assertEqual(bytes(int(digits, 16) for digits in shown), memory[0x400:0x410])
        self.assertTrue(any(memory[0x400:0x410]))
        # What the guest wrote, read by gdb as text.
        core = os.path.join(self.folder, "vm.core")
        at = memory.index(b"Linux version ", CHIPSET[1])
        done = subprocess.run(["gdb", "-nx", "-batch", "-ex", f"x/s {at:#x}", "-core", core],
                              text=True, capture_output=True, timeout=60, check=True)
        self.assertIn("Linux version ", done.stdout)
        done = subprocess.run(["readelf", "-lnW", core], text=True, capture_output=True, timeout=60,
                              check=True)
        self.assertEqual(done.stderr, "")
        self.assertIn("LOAD", done.stdout)
        self.assertEqual(done.stdout.count("NT_PRSTATUS"), 2)


if __name__ == "__main__":
    raise SystemExit("run tests/interop/run.py -k ExtractOfGuests")
