# The guest of the emulator host (tests/abi), for x86-64. It is loaded at 0x1000 and runs in 64-bit
# mode. guest_aarch64.s does the same.
#
# The host leaves a table at 0x8000:
#   0 address of the device   8 first random number   16 rounds   24 ticks of the alarm
#   32 number of ranges       40 of each range: address, words of 8 bytes; whole pages of 4 KiB
# Each round changes one random word in one of the ranges, every 64th fills a page, some with
# zeros; rbx and xmm0 hold checksums of all that was read. The device's registers (32 bits):
#   0 ticks, low (latches the high half)   4 ticks, high   8 alarm: write ticks from now; read 1 when
#   they are over   12 console, a character   16 power: off
.intel_syntax noprefix
.text
start:
  mov rsp, 0xf000
  mov esi, 0x8000
  mov r15, [rsi]                # device
  mov rax, [rsi + 8]            # random number
  mov r13, [rsi + 16]           # rounds left
  mov r14, [rsi + 24]           # ticks of the alarm
  mov r12, [rsi + 32]           # ranges
  xor ebx, ebx                  # checksum
  pxor xmm0, xmm0
  mov [r15 + 8], r14d

round:
  call random
  mov rdx, rax                  # a range ...
  shr rdx, 40
  imul rdx, r12
  shr rdx, 24
  shl rdx, 4
  mov r8, [rsi + rdx + 40]
  mov r9, [rsi + rdx + 48]
  mov ecx, eax                  # ... and a word of it
  imul rcx, r9
  shr rcx, 32
  lea r10, [r8 + rcx * 8]
  mov r11, [r10]
  xor r11, rax
  mov [r10], r11
  rol rbx, 7
  add rbx, r11
  movq xmm1, r11
  paddq xmm0, xmm1
  pshufd xmm0, xmm0, 0x93
  test r13d, 63
  jnz no_fill
  call fill
no_fill:
  test r13d, 255
  jnz no_time
  mov ecx, [r15]
  mov edx, [r15 + 4]
  shl rdx, 32
  or rcx, rdx
  xor rbx, rcx
no_time:
  mov ecx, [r15 + 8]
  test ecx, ecx
  jz no_alarm
  mov ecx, ebx                  # the checksum's last digit to the console
  call tell
  mov [r15 + 8], r14d
no_alarm:
  dec r13
  jnz round

  mov dword ptr [r15 + 12], 10  # the end of the line
  mov dword ptr [r15 + 16], 1
stop:
  jmp stop

random:                         # rax: the next one
  push rdx
  mov rdx, rax
  shl rdx, 13
  xor rax, rdx
  mov rdx, rax
  shr rdx, 7
  xor rax, rdx
  mov rdx, rax
  shl rdx, 17
  xor rax, rdx
  pop rdx
  ret

fill:                           # the page around r10, with rax or, one time in two, zero
  push rax
  mov rdi, r10
  and rdi, -4096
  test eax, 32
  jnz 1f
  xor eax, eax
1:
  mov ecx, 512
  rep stosq
  pop rax
  ret

tell:                           # the last hexadecimal digit of ecx
  and ecx, 15
  lea edx, [rcx + '0']
  cmp ecx, 10
  jb 1f
  add edx, 'a' - '0' - 10
1:
  mov [r15 + 12], edx
  ret
