"""Proves the test bed itself, with QEMU's own savevm and loadvm: what it says about a good snapshot
is "equal", and what it says about a wrong byte is not."""

import os
import random

import bed
import vm
from bed import BedTest, cases


class BedItself(BedTest):
    @cases(*[(qemu, machine) for qemu in ("host", "10.0", "newest") for machine in vm.MACHINES],
           quick=[("host", "pc"), ("10.0", "q35"), ("newest", "virt")])
    def test_savevm_loadvm(self, qemu, machine):
        """A snapshot by QEMU itself comes back the same, hot and cold, and a change is seen."""
        guest = self.make_vm(qemu, machine).start()
        guest.check()
        guest.fill(11)
        guest.stop()
        guest.savevm("own")
        saved = guest.state()
        guest.cont()
        guest.fill(22)
        self.assert_seed(guest, 22)
        guest.stop()
        self.assertTrue(any("pages differ" in line for line in saved.differences(guest.state())))
        guest.loadvm("own")
        self.assert_same_state(saved, guest.state())
        guest.cont()
        self.assert_seed(guest, 11)
        self.assert_writes_go_on(guest)
        guest.restart(loadvm="own", paused=True)
        self.assert_same_state(saved, guest.state())
        guest.cont()
        self.assert_seed(guest, 11)
        guest.quit()
        guest.check_image()
        self.assertEqual(guest.snapshot_names(), ["own"])

    @cases("pc", "virt")
    def test_guest_sees_a_wrong_byte(self, machine):
        """The guest's check fails for one wrong byte of memory or of a disk, and only then."""
        guest = self.make_vm("host", machine).start()
        for where in ("memory", "disk0", "disk1"):
            guest.ask(f"corrupt {where}")
            with self.assertRaisesRegex(vm.GuestError, "CHECK BAD 1 wrong"):
                guest.check()
            guest.ask(f"corrupt {where}")
            guest.check()

    def test_state_sees_a_wrong_byte(self):
        """Comparing two states finds one flipped byte in each RAM block, and the page it is in."""
        guest = self.make_vm("newest", "q35").start()
        guest.stop()
        before = guest.state()
        self.assert_same_state(before, guest.state())
        chance = random.Random(1)
        expected = []
        with open(f"/proc/{guest.pid}/mem", "rb+", buffering=0) as memory:
            for name, size, address in guest.ram_blocks():
                page = chance.randrange(size // vm.PAGE)
                place = address + page * vm.PAGE + chance.randrange(vm.PAGE)
                value = os.pread(memory.fileno(), 1, place)
                os.pwrite(memory.fileno(), bytes([value[0] ^ 1]), place)
                expected.append(f"block {name}: 1 of {size // vm.PAGE} pages differ, first at "
                                f"{page * vm.PAGE:#x}")
        self.assertEqual(sorted(before.differences(guest.state())), sorted(expected))

    def test_locks_of_a_running_vm(self):
        """A running VM holds the lock bytes of a writer; one that is gone holds none."""
        guest = self.make_vm("host").start(paused=True)
        self.assert_images_active(guest)
        guest.quit()
        for disk in guest.disks:
            self.assertEqual(bed.held_locks(disk.path), [])
