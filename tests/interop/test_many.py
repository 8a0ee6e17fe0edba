"""Many saves and deletes in one image, ours and QEMU's in any order, with a check after each."""

import random

from bed import BedTest, cases


class Many(BedTest):
    ROUNDS = 50
    KEPT_MAX = 5

    @cases(("newest", "attach"), ("host", "plugin"), quick=[("newest", "attach")])
    def test_saves_and_deletes(self, qemu, how):
        guest = self.make_vm(qemu, "microvm", plugin=how == "plugin").start()
        self.random_seed = random.randrange(1 << 32)
        chance = random.Random(self.random_seed)
        seeds = {}  # name: what the guest's memory held
        for i in range(1, self.ROUNDS + 1):
            with self.subTest(random_seed=self.random_seed, round=i):
                if len(seeds) < 2 or (len(seeds) < self.KEPT_MAX and chance.random() < 0.6):
                    self.add(guest, chance, seeds, i)
                else:
                    self.drop(guest, chance, seeds)
                guest.stop()  # flushes QEMU's caches, so that what is read is not torn
                guest.check_image(share=True)
                guest.cont()
                for disk in guest.disks:
                    self.assertEqual(sorted(guest.snapshot_names(disk.path)), sorted(seeds))
        for name, seed in seeds.items():
            guest.loadvm(name)
            self.assert_seed(guest, seed)
        guest.quit()
        guest.check_image()
        for name, seed in seeds.items():
            guest.start(loadvm=name)
            self.assert_seed(guest, seed)
            guest.quit()
        guest.check_image()

    def add(self, guest, chance, seeds, number):
        guest.fill(1000 + number)
        way = chance.choice(["ours", "ours", "own", "replace"])
        name = f"s{number}"
        if way == "replace" and seeds:
            name = chance.choice(sorted(seeds))
            self.save(guest, name, "--replace")
        elif way == "own":
            guest.savevm(name)
        else:
            self.save(guest, name)
        seeds[name] = 1000 + number

    def drop(self, guest, chance, seeds):
        name = chance.choice(sorted(seeds))
        if chance.random() < 0.5:
            guest.delvm(name)
        else:
            self.tool("delete", name, "--qmp", guest.tool_socket)
        del seeds[name]
