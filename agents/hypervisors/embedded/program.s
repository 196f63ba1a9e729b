# The guest's whole software. Position: linked at 0x1000, entered at its first byte, 64-bit flat, no paging,
# no interrupts. Uses nothing above SSE2, CMOV and the x87 FPU, which every x86-64 CPU has.
#
#   as program.s -o program.o && objcopy -O binary -j .text program.o program.bin
#
# r8 random state   r9, r10 its multiplier and increment   r11 first byte of the working set
# r12 pages of the working set   r13 pages of its hot part   r14 ticks   r15 pages written
# rbp key   rsi errors   rdi last page of the sequential walk   xmm3 two generators of content, xmm2 their factor
# st(0) heartbeats: so that the x87 stack has to be moved as well

    .intel_syntax noprefix
    .code64

    .set P_PATTERN,       0x2000     # u32: 0 hot, 1 random, 2 sequential, 3 idle
    .set P_CONTENT,       0x2004     # u32: 0 compressible, 1 incompressible
    .set P_HOT_SHARE,     0x2008     # u32: of 65536 writes so many go to the hot part
    .set P_MXCSR,         0x200c     # u32
    .set P_BASE,          0x2010     # u64: address of the working set
    .set P_PAGES,         0x2018     # u64
    .set P_HOT_PAGES,     0x2020     # u64
    .set P_SEED,          0x2028     # u64
    .set P_KEY,           0x2030     # u64
    .set P_BEAT_MASK,     0x2038     # u64: a heartbeat at each tick whose number has none of these bits
    .set P_FACTOR,        0x2040     # 2 x u64: multiply-with-carry factor
    .set P_CONTENT_SEED,  0x2050     # 2 x u64

    .set C_TICKS,         0x3000     # u64 each
    .set C_PAGES_WRITTEN, 0x3008
    .set C_ERRORS,        0x3010
    .set C_BEATS,         0x3018
    .set C_BEATS_X87,     0x3020     # a double

    .set SECTOR_OUT,      0x4000     # 512 bytes that go to the disk
    .set SECTOR_BACK,     0x4200     # the same, read back

    .set CONSOLE,         0x3f8
    .set DISK_SECTOR,     0x500      # u32 out: number of the sector
    .set DISK_ADDRESS,    0x504      # u32 out: address in RAM
    .set DISK_COMMAND,    0x508      # u32 out: 1 write, 2 read
    .set DISK_STATUS,     0x50c      # u32 in: 0 done, 1 failed, 255 no disk
    .set DISK_WINDOW,     127        # sectors 0..127 are written in turn

boot:
    fninit
    fldz
    ldmxcsr [P_MXCSR]
    movaps  xmm2, [P_FACTOR]
    movaps  xmm3, [P_CONTENT_SEED]
    mov     r8, [P_SEED]
    movabs  r9, 6364136223846793005
    movabs  r10, 1442695040888963407
    mov     r11, [P_BASE]
    mov     r12, [P_PAGES]
    mov     r13, [P_HOT_PAGES]
    mov     rbp, [P_KEY]
    xor     r14d, r14d
    xor     r15d, r15d
    xor     esi, esi
    xor     edi, edi

tick:
    inc     r14
    mov     [C_TICKS], r14
    mov     eax, [P_PATTERN]
    cmp     eax, 2
    je      sequential
    ja      ticked

    imul    r8, r9                   # hot and random: they differ only in P_HOT_SHARE
    add     r8, r10
    mov     rax, r8
    shr     rax, 32
    mov     rcx, r8
    shr     rcx, 16
    and     ecx, 0xffff
    mov     rdx, r12
    cmp     ecx, [P_HOT_SHARE]
    cmovb   rdx, r13
    imul    rax, rdx
    shr     rax, 32
    jmp     write

sequential:
    inc     rdi
    xor     eax, eax
    cmp     rdi, r12
    cmovae  rdi, rax
    mov     rax, rdi

write:
    shl     rax, 12
    lea     rbx, [r11 + rax]
    mov     rcx, rbx
    shr     rcx, 12
    xor     rcx, rbp
    or      rcx, 1                   # factor of this page: (gfn ^ key) | 1
    mov     rax, [rbx]               # word 0: how often this page was written
    mov     rdx, rax
    imul    rdx, rcx
    cmp     rdx, [rbx + 8]           # word 1: word 0 * factor; a page of zeros obeys it too
    jne     page_is_wrong
checked:
    inc     rax
    mov     [rbx], rax
    imul    rcx, rax
    mov     [rbx + 8], rcx
    mov     ecx, 64
    shl     eax, 6
    and     eax, 0xfc0               # the line wanders over the page, round the first one
    cmovz   eax, ecx
    add     rbx, rax
    cmp     dword ptr [P_CONTENT], 0
    jne     incompressible

    movq    xmm0, r14
    punpcklqdq xmm0, xmm0
    movaps  [rbx], xmm0
    movaps  [rbx + 16], xmm0
    movaps  [rbx + 32], xmm0
    movaps  [rbx + 48], xmm0
    jmp     written

incompressible:
    .irp    offset, 0, 16, 32, 48
    movdqa  xmm4, xmm3
    psrlq   xmm4, 32
    pmuludq xmm3, xmm2
    paddq   xmm3, xmm4
    movaps  [rbx + \offset], xmm3
    .endr

written:
    inc     r15
    mov     [C_PAGES_WRITTEN], r15

ticked:
    test    r14, [P_BEAT_MASK]
    jnz     tick

    fld1
    faddp   st(1), st
    fst     qword ptr [C_BEATS_X87]
    inc     qword ptr [C_BEATS]
    mov     edx, CONSOLE
    mov     al, 't'
    out     dx, al
    mov     rbx, r14
    mov     ecx, 16
digit:
    rol     rbx, 4
    mov     eax, ebx
    and     eax, 15
    movzx   eax, byte ptr [rax + 0x1000 + digits - boot]
    out     dx, al
    dec     ecx
    jnz     digit
    mov     al, 10
    out     dx, al

    mov     edx, DISK_STATUS
    in      eax, dx
    cmp     eax, 255
    je      tick
    mov     [SECTOR_OUT], r14
    mov     [SECTOR_OUT + 8], r15
    mov     [SECTOR_OUT + 16], rsi
    mov     [SECTOR_OUT + 504], rbp
    mov     eax, [C_BEATS]
    and     eax, DISK_WINDOW
    mov     edx, DISK_SECTOR
    out     dx, eax
    mov     eax, SECTOR_OUT
    mov     edx, DISK_ADDRESS
    out     dx, eax
    mov     eax, 1
    mov     edx, DISK_COMMAND
    out     dx, eax
    mov     eax, SECTOR_BACK
    mov     edx, DISK_ADDRESS
    out     dx, eax
    mov     eax, 2
    mov     edx, DISK_COMMAND
    out     dx, eax
    cmp     r14, [SECTOR_BACK]
    je      tick
    inc     rsi
    mov     [C_ERRORS], rsi
    jmp     tick

page_is_wrong:
    inc     rsi
    mov     [C_ERRORS], rsi
    jmp     checked

digits:
    .ascii  "0123456789abcdef"
