"""Reads ELF cores of guest memory: of QEMU's dump-guest-memory and of qvmstate, to compare them."""

import struct

PT_LOAD, PT_NOTE = 1, 4
MACHINES = {3: "i386", 62: "x86_64", 183: "aarch64"}
# Of each class: the header, a program header, and of this where offset, address and bytes are.
CLASSES = {1: ("<16sHHIIIIIHHHHHH", "<IIIIIIII", (1, 3, 4)),
           2: ("<16sHHIQQQIHHHHHH", "<IIQQQQQQ", (2, 4, 5))}


class Core:
    def __init__(self, path):
        self.path = path
        with open(path, "rb") as file:
            ident = file.read(16)
            if ident[:4] != b"\x7fELF" or ident[4] not in CLASSES or ident[5:7] != b"\x01\x01":
                raise ValueError(f"{path}: no little-endian ELF file: {ident}")
            header, program_header, (offset, address, size) = CLASSES[ident[4]]
            file.seek(0)
            head = struct.unpack(header, file.read(struct.calcsize(header)))
            if head[1] != 4:
                raise ValueError(f"{path}: no core: {head}")
            self.bits = 32 * ident[4]
            self.machine = MACHINES[head[2]]
            file.seek(head[5])
            segments = [struct.unpack(program_header, file.read(head[9])) for _ in range(head[10])]
            notes, = [segment for segment in segments if segment[0] == PT_NOTE]
            file.seek(notes[offset])
            self.notes = list(self.split_notes(file.read(notes[size])))
        # (physical address, bytes, offset in the file)
        self.loads = sorted((segment[address], segment[size], segment[offset])
                            for segment in segments if segment[0] == PT_LOAD)

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
