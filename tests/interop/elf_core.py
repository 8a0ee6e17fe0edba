"""Reads ELF cores of guest memory: of QEMU's dump-guest-memory and of qvmstate, to compare them."""

import struct

PT_LOAD, PT_NOTE = 1, 4
MACHINES = {62: "x86_64", 183: "aarch64"}
HEADER = "<16sHHIQQQIHHHHHH"
PROGRAM_HEADER = "<IIQQQQQQ"


class Core:
    def __init__(self, path):
        self.path = path
        with open(path, "rb") as file:
            head = struct.unpack(HEADER, file.read(struct.calcsize(HEADER)))
            if head[0][:7] != b"\x7fELF\x02\x01\x01" or head[1] != 4:
                raise ValueError(f"{path}: no little-endian 64-bit core: {head}")
            self.machine = MACHINES[head[2]]
            file.seek(head[5])
            segments = [struct.unpack(PROGRAM_HEADER, file.read(head[9])) for _ in range(head[10])]
            notes, = [segment for segment in segments if segment[0] == PT_NOTE]
            file.seek(notes[2])
            self.notes = list(self.split_notes(file.read(notes[5])))
        # (physical address, bytes, offset in the file)
        self.loads = sorted((segment[4], segment[5], segment[2]) for segment in segments
                            if segment[0] == PT_LOAD)

    @staticmethod
    def split_notes(data):
        """(owner, type, contents) of each note."""
        while data:
            name_size, size, kind = struct.unpack_from("<III", data)
            at = 12 + (name_size + 3) // 4 * 4
            yield data[12:12 + name_size].rstrip(b"\0").decode(), kind, data[at:at + size]
            data = data[at + (size + 3) // 4 * 4:]

    def read(self, address, size):
        """What lies there, over the borders of segments; None for a byte that is not in the core."""
        out = b""
        with open(self.path, "rb") as file:
            while len(out) < size:
                at = address + len(out)
                for start, length, offset in self.loads:
                    if start <= at < start + length:
                        file.seek(offset + at - start)
                        out += file.read(min(size - len(out), start + length - at))
                        break
                else:
                    return None
        return out
