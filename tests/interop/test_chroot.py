"""QEMU in a chroot in which every path differs from ours, as in a container."""

import os

from bed import BedTest, cases


class Chroot(BedTest):
    @cases(("10.0", "plugin"), ("newest", "plugin"), ("newest", "attach"),
           quick=[("10.0", "plugin"), ("newest", "attach")])
    def test_every_path_differs(self, qemu, how):
        guest = self.make_vm(qemu, "pc", plugin=how == "plugin", elsewhere=True).start()
        names = [node["file"] for node in guest.qmp.execute("query-named-block-nodes")
                 if node["drv"] == "file"]
        self.assertEqual(len(names), 2)
        for name in names:
            self.assertFalse(os.path.exists(name), f"{name} exists outside too")
        guest.fill(11)
        self.save(guest, "run1")
        self.assertEqual(guest.status(), "running")
        self.assert_writes_go_on(guest)
        guest.fill(22)
        guest.loadvm("run1")
        self.assert_seed(guest, 11)
        guest.quit()
        guest.check_image()
        guest.start(loadvm="run1")
        self.assert_seed(guest, 11)
