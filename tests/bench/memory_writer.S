# The guest of the case "live" of bench.py: writes to memory as fast as it can and counts the writes.
#
# A multiboot kernel (`qemu-system -kernel`), so it begins in 32-bit protected mode, with flat
# segments, at an address above 1 MiB. What the bench reads and sets lies at guest-physical 0x500,
# which the firmware leaves alone (live_case.py has the same numbers):
#
#   0x500  8  writes so far
#   0x508  4  factor  \  offset of the next write = (offset * factor + step) & mask,
#   0x50c  4  step     | from 16 MiB on
#   0x510  4  mask    /

        .set    magic, 0x1badb002       # Multiboot Specification 0.6.96, 3.1.1
        .set    memory, 0x1000000

        .text
        .globl  _start
        .align  4
        .long   magic
        .long   0                       # flags
        .long   -magic                  # the three together are 0
_start:
        cli
        movl    $0, 0x500
        movl    $0, 0x504
        movl    $1, 0x508
        movl    $0, 0x50c
        movl    $0, 0x510
        xorl    %eax, %eax
next:
        imull   0x508, %eax
        addl    0x50c, %eax
        movl    %eax, %ecx
        andl    0x510, %ecx
        incl    memory(%ecx)
        addl    $1, 0x500
        adcl    $0, 0x504
        jmp     next
