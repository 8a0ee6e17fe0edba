// The guest of the emulator host (tests/abi), for AArch64. It is loaded at 0x1000 and runs without
// an MMU. guest_x86_64.s says what it does; x19 and v0 hold the checksums here.
.text
start:
  mov x0, #0xf000
  mov sp, x0
  mov x1, #0x8000
  ldp x2, x0, [x1]              // device, random number
  ldp x3, x4, [x1, #16]         // rounds left, ticks of the alarm
  ldr x5, [x1, #32]             // ranges
  mov x19, #0
  movi v0.2d, #0
  str w4, [x2, #8]

round:
  bl random
  lsr x6, x0, #40               // a range ...
  mul x6, x6, x5
  lsr x6, x6, #24
  add x6, x1, x6, lsl #4
  ldp x7, x8, [x6, #40]
  mov w9, w0                    // ... and a word of it
  mul x9, x9, x8
  lsr x9, x9, #32
  add x10, x7, x9, lsl #3
  ldr x11, [x10]
  eor x11, x11, x0
  str x11, [x10]
  ror x19, x19, #57
  add x19, x19, x11
  movi v1.2d, #0
  mov v1.d[0], x11
  add v0.2d, v0.2d, v1.2d
  ext v0.16b, v0.16b, v0.16b, #12
  tst w3, #63
  b.ne no_fill
  bl fill
no_fill:
  tst w3, #255
  b.ne no_time
  ldr w12, [x2]
  ldr w13, [x2, #4]
  orr x12, x12, x13, lsl #32
  eor x19, x19, x12
no_time:
  ldr w12, [x2, #8]
  cbz w12, no_alarm
  mov w12, w19                  // the checksum's last digit to the console
  bl tell
  str w4, [x2, #8]
no_alarm:
  subs x3, x3, #1
  b.ne round

  mov w12, #10                  // the end of the line
  str w12, [x2, #12]
  str w12, [x2, #16]
stop:
  b stop

random:                         // x0: the next one
  stp x6, x30, [sp, #-16]!
  eor x0, x0, x0, lsl #13
  eor x0, x0, x0, lsr #7
  eor x0, x0, x0, lsl #17
  ldp x6, x30, [sp], #16
  ret

fill:                           // the page around x10, with x0 or, one time in two, zero
  and x14, x10, #-4096
  mov x15, x0
  tbnz w0, #5, 1f
  mov x15, #0
1:
  dup v2.2d, x15
  mov w16, #256
2:
  str q2, [x14], #16
  subs w16, w16, #1
  b.ne 2b
  ret

tell:                           // the last hexadecimal digit of w12
  and w12, w12, #15
  add w13, w12, #'0'
  cmp w12, #10
  b.lo 1f
  add w13, w13, #('a' - '0' - 10)
1:
  str w13, [x2, #12]
  ret
