"""Every kind of guest memory that QEMU can have, in RAM and paged out: each saved by the plugin and
by attaching, and equal after a hot and a cold load. Nothing that the guest never touched is faulted
in by a save."""

import glob
import os

import pageout
import vm
from bed import BedTest, cases

WAYS = [("host", "plugin"), ("newest", "plugin"), ("newest", "attach")]
ROWS = [(kind, *way) for kind in vm.MEMORY_KINDS for way in WAYS]
QUICK = [row for row in ROWS if row[1:] == ("newest", "attach")] + [
    ("memfd-shared", "host", "plugin")]
HUGE = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"


class MemoryKinds(BedTest):
    def make_guest(self, kind, qemu, how):
        if kind == "hugepages":
            self.reserve_huge_pages(160)
        # One block of 256 MiB or two of 128; hugepages need their number free at once.
        return self.make_vm(qemu, "pc", memory=kind, plugin=how == "plugin").start()

    def reserve_huge_pages(self, count):
        """Has the kernel set huge pages aside for this test, or skips it."""
        with open(HUGE, encoding="utf-8") as file:
            before = file.read().strip()
        if int(before) >= count:
            return
        try:
            with open(HUGE, "w", encoding="utf-8") as file:
                file.write(str(count))
            self.addCleanup(self.write_huge_pages, before)
            with open(HUGE, encoding="utf-8") as file:
                got = int(file.read())
        except OSError as error:
            self.skipTest(f"no huge pages: {error}")
        if got < count:
            self.skipTest(f"no huge pages: the kernel found {got} of {count}")

    def write_huge_pages(self, text):
        self.end_vms()
        with open(HUGE, "w", encoding="utf-8") as file:
            file.write(text)

    def round_trip(self, guest):
        """Saves the paused guest, and compares it with what a hot and a cold load bring."""
        self.save(guest, "p1")
        state = guest.state()
        guest.cont()
        guest.fill(22)
        self.assert_seed(guest, 22)
        guest.stop()
        guest.loadvm("p1")
        self.assert_same_state(state, guest.state())
        guest.cont()
        self.assert_seed(guest, 11)
        guest.restart(loadvm="p1", paused=True)
        self.assert_same_state(state, guest.state())
        guest.cont()
        self.assert_seed(guest, 11)
        guest.quit()
        guest.check_image()

    @cases(*ROWS, quick=QUICK)
    def test_in_ram(self, kind, qemu, how):
        guest = self.make_guest(kind, qemu, how)
        guest.fill(11)
        guest.stop()
        before = self.shared_bytes(guest)
        self.save(guest, "first")
        self.assertEqual(self.shared_bytes(guest), before, "the save faulted memory in")
        self.round_trip(guest)

    @cases(*[row for row in ROWS if row[0] != "hugepages"],
           quick=[(kind, "newest", "attach") for kind in ("private", "memfd-shared", "file-shared")])
    def test_paged_out(self, kind, qemu, how):
        with pageout.swap(self.folder) as no_swap:
            if no_swap and kind != "file-shared":
                self.skipTest(f"private and memfd memory cannot be paged out: {no_swap}")
            guest = self.make_guest(kind, qemu, how)
            guest.fill(11)
            guest.stop()
            before = pageout.present_bytes(guest.pid)
            for _ in range(5):  # pages that were just written, the kernel may keep at first
                for path in glob.glob(os.path.join(guest.folder, "ram-*")):
                    with open(path, "rb+") as file:
                        os.fsync(file.fileno())  # dirty pages of a file stay
                pageout.page_out(guest.pid)
            after = pageout.present_bytes(guest.pid)
            if after > before // 2:
                self.skipTest(f"the kernel kept {after >> 20} of {before >> 20} MiB in RAM")
            self.round_trip(guest)
            self.end_vms()  # before the swap goes

    def shared_bytes(self, guest):
        """Bytes that the files behind the guest's memory take, 0 if there are none."""
        total = 0
        for path in glob.glob(os.path.join(guest.folder, "ram-*")):
            total += os.stat(path).st_blocks * 512
        for link in glob.glob(f"/proc/{guest.pid}/fd/*"):
            try:
                if "memfd:memory-backend" in os.readlink(link):
                    total += os.stat(link).st_blocks * 512
            except FileNotFoundError:
                pass
        return total
