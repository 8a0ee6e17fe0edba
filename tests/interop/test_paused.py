"""A guest that was paused, or never ran, stays so, and its images are active again."""

from bed import BedTest, cases


class Paused(BedTest):
    WAYS = [("host", "plugin"), ("10.0", "attach"), ("newest", "plugin"), ("newest", "attach")]

    @cases(*WAYS, quick=[("host", "plugin"), ("newest", "attach")])
    def test_paused(self, qemu, how):
        guest = self.make_vm(qemu, "microvm", plugin=how == "plugin").start()
        guest.fill(11)
        guest.stop()
        guest.qmp.events.clear()
        for name in ("one", "two"):
            report = self.save(guest, name)
            self.assertFalse(report["was-running"])
            self.assertEqual(guest.status(), "paused")
            self.assert_images_active(guest)
        guest.qmp.execute("query-status")
        self.assertNotIn("RESUME", [event["event"] for event in guest.qmp.events])
        self.assertNotEqual(guest.qemu.img("info", guest.qemu.inner(guest.disks[0].path),
                                           check=False).returncode, 0, "the image is not locked")
        # QEMU writes to images that it took back: its own snapshot, then the guest.
        guest.savevm("own")
        guest.cont()
        self.assert_seed(guest, 11)
        self.assert_writes_go_on(guest)
        guest.quit()
        guest.check_image()
        self.assertEqual(guest.snapshot_names(), ["one", "two", "own"])

    @cases(("host", "plugin"), ("newest", "attach"), quick=[("newest", "attach")])
    def test_never_ran(self, qemu, how):
        guest = self.make_vm(qemu, "pc", plugin=how == "plugin").start(paused=True)
        self.assertEqual(guest.status(), "prelaunch")
        self.save(guest, "fresh")
        self.assertIn(guest.status(), ("prelaunch", "paused"))
        self.assert_images_active(guest)
        guest.cont()
        guest.wait_console(rb"@start READY", 90)
        guest.check()
        guest.restart(loadvm="fresh", paused=True)
        guest.cont()
        guest.wait_console(rb"@start READY", 90)
        guest.check()
        guest.quit()
        guest.check_image()
