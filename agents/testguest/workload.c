/* The one program of the test guest: its init. Freestanding: no library, so that it is a few KiB for everybody.
 *
 *   workload [set=MiB] [rate=MiB/s] [fill=MiB] [pattern=hot|random] [content=mixed|random|zero] [page=1]
 *
 * It fills memory, then writes pages of its working set at a rate, keeps a heartbeat, and checks what it reads against
 * what it wrote. Every page carries its own number and a version; versions are kept a second time in a table, so that
 * an old page, a foreign page and a lost write are all seen. One line of output, five times a second:
 *
 *   HB <ms since start> writes=<pages> checks=<pages> errors=<pages> maxgap_us=<longest standstill since the last line>
 *
 * A console is no clock: it is late by some ten ms. So there is a page besides, BEAT_MARK in its first four words, whose
 * fifth word counts the turns of the program, one a ms or more: whoever maps the guest's RAM can watch it.
 *
 * Build: make -C agents/testguest (gcc, x86-64). The test that compares SOURCE_SHA256 notices a forgotten build.
 */
typedef unsigned long u64;
typedef unsigned char u8;

#define PAGE 4096UL
#define WORDS (PAGE / 8)
#define STEP_PAGES 64

#ifndef SOURCE_SHA256
#define SOURCE_SHA256 "unknown"
#endif
__attribute__((used)) static const char mark[] = "vmferry-workload " SOURCE_SHA256;

static long call(long n, long a, long b, long c, long d, long e, long f) {
    long r;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return r;
}

static u64 now_us(void) {
    long t[2];
    call(228, 1, (long)t, 0, 0, 0, 0); /* clock_gettime(CLOCK_MONOTONIC) */
    return (u64)t[0] * 1000000UL + (u64)t[1] / 1000;
}

static void rest_us(long us) {
    long t[2] = {0, us * 1000};
    call(35, (long)t, 0, 0, 0, 0, 0); /* nanosleep */
}

static u8 *memory(u64 bytes) {
    long p = call(9, 0, (long)bytes, 3, 0x22, -1, 0); /* mmap(private, anonymous) */
    return p < 0 && p > -4096 ? 0 : (u8 *)p;
}

/* Made at run time, so that no copy of this program has the mark. */
#define BEAT_MARK(i) (0x9e3779b97f4a7c15UL * ((u64)(i) + beat_seed))
static volatile u64 beat_seed = 0x76667272;
static volatile u64 beat_page[WORDS] __attribute__((aligned(PAGE)));

static char line[256];
static u64 at;

static void text(const char *s) {
    while (*s) line[at++] = *s++;
}

static void number(u64 v) {
    char digits[24];
    int n = 0;
    do {
        digits[n++] = '0' + v % 10;
        v /= 10;
    } while (v);
    while (n) line[at++] = digits[--n];
}

static void say(void) {
    line[at++] = '\n';
    call(1, 1, (long)line, (long)at, 0, 0, 0);
    at = 0;
}

static int begins(const char *s, const char *with) {
    while (*with)
        if (*s++ != *with++) return 0;
    return 1;
}

static u64 value(const char *s) {
    u64 v = 0;
    while (*s && *s != '=') s++;
    if (*s) s++;
    while (*s >= '0' && *s <= '9') v = v * 10 + (u64)(*s++ - '0');
    return v;
}

static u64 seed = 88172645463325252UL;

static u64 chance(void) {
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

/* Words 0 and 1 are the page's number and version; the rest never changes and is made from the number. */
static void fill_page(u64 *page, u64 index, int content) {
    for (u64 i = 2; i < WORDS; i++)
        page[i] = content == 0 ? 0 : (content == 2 || i % 4 == 0) ? chance() : (index * i) & 0xffff;
    page[0] = index * 2654435761UL + 1;
    page[1] = 0;
}

__attribute__((noreturn)) static void fail(const char *why) {
    text("FAILED ");
    text(why);
    say();
    for (;;) rest_us(900000);
}

__attribute__((noreturn, used)) void start(long *stack) {
    long argc = stack[0];
    char **argv = (char **)(stack + 1);
    u64 set_mib = 64, rate_mib = 10, fill_mib = 0, whole_pages = 0;
    int is_random = 0, content = 1;
    for (long i = 1; i < argc; i++) {
        const char *s = argv[i];
        if (begins(s, "set=")) set_mib = value(s);
        if (begins(s, "rate=")) rate_mib = value(s);
        if (begins(s, "fill=")) fill_mib = value(s);
        if (begins(s, "page=")) whole_pages = value(s);
        if (begins(s, "pattern=random")) is_random = 1;
        if (begins(s, "content=random")) content = 2;
        if (begins(s, "content=zero")) content = 0;
    }
    u64 pages = set_mib * 256, still_pages = fill_mib * 256;
    u8 *set = memory(pages * PAGE), *still = still_pages ? memory(still_pages * PAGE) : 0;
    u64 *versions = (u64 *)memory(pages * 8 + PAGE);
    if (!set || !versions || (still_pages && !still)) fail("no memory for the working set");
    for (u64 i = 0; i < pages; i++) fill_page((u64 *)(set + i * PAGE), i, content);
    for (u64 i = 0; i < still_pages; i++) fill_page((u64 *)(still + i * PAGE), i, content);
    text("READY set=");
    number(set_mib);
    text(" rate=");
    number(rate_mib);
    say();

    for (int i = 0; i < 4; i++) beat_page[i] = BEAT_MARK(i + 1);
    u64 born = now_us(), begin = born, last = born, told = born, gap = 0, writes = 0, checks = 0, errors = 0, looked = 0;
    for (;;) {
        u64 now = now_us();
        beat_page[4]++;
        if (now - last > gap) gap = now - last;
        last = now;
        u64 due = (now - begin) * rate_mib / 1000 * 256 / 1000;
        u64 step = 0;
        /* A guest that was stopped for long does not make up for it. */
        if (due > writes + rate_mib * 256) begin += (due - writes) * 1000 / 256 * 1000 / (rate_mib ? rate_mib : 1);
        for (; writes < due && step < STEP_PAGES; step++) {
            u64 i = is_random ? chance() % pages : writes * 2654435761UL % pages;
            u64 *page = (u64 *)(set + i * PAGE);
            if (page[0] != i * 2654435761UL + 1 || page[1] != versions[i]) errors++;
            if (whole_pages)
                for (u64 k = 2; k < WORDS; k++) page[k] = page[k] * 6364136223846793005UL + writes;
            page[1] = ++versions[i];
            writes++;
            checks++;
        }
        /* And a look at pages that nobody wrote for long. */
        for (int k = 0; k < 2; k++, looked++, checks++) {
            u64 all = pages + still_pages, i = looked % all;
            u64 *page = (u64 *)(i < pages ? set + i * PAGE : still + (i - pages) * PAGE);
            u64 index = i < pages ? i : i - pages;
            if (page[0] != index * 2654435761UL + 1 || page[1] != (i < pages ? versions[i] : 0)) errors++;
        }
        if (now - told >= 200000) {
            text("HB ");
            number((now - born) / 1000);
            text(" writes=");
            number(writes);
            text(" checks=");
            number(checks);
            text(" errors=");
            number(errors);
            text(" maxgap_us=");
            number(gap);
            say();
            told = now;
            gap = 0;
            last = now_us();
        }
        if (step < STEP_PAGES) rest_us(1000);
    }
}

__asm__(".globl _start\n_start:\n  mov %rsp, %rdi\n  and $-16, %rsp\n  call start\n");

void *memset(void *to, int byte, u64 n) {
    for (u8 *p = to; n--;) *p++ = (u8)byte;
    return to;
}
