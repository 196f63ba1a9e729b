"""Make a userfaultfd inside another process, and hand it to whoever started this.

    python -I -S stealer.py PID TID SOCKET

Law: a program by itself, of the standard library alone, that lives for some 30 ms. Between changing and restoring the
registers of the traced thread nothing may end it: the thread would go on in the middle of a system call that is not
its own, and the guest would die (measured: SIGSEGV). So all signals are blocked, nothing is allocated, imported or
waited for without need in between, and nobody has a reason to kill it: its own waits end before that, or never begin.

How: stop one thread (0.2-0.5 ms), let it execute one `syscall` instruction that is in its memory already, twice:
userfaultfd(), and close() of it once it was copied here with pidfd_getfd. x86-64 only.

Source: ptrace(2), PTRACE_SEIZE and group stops; Linux kernel/ptrace.c; measured on 6.18 with 200 injections per kind of
thread: main thread stopped 46 us in the median, RCU thread 53, vCPU thread 349.
"""

import ctypes
import errno
import os
import signal
import socket
import sys
import time

PTRACE_GETREGS, PTRACE_SETREGS, PTRACE_SINGLESTEP, PTRACE_CONT, PTRACE_DETACH = 12, 13, 9, 7, 17
PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
EVENT_STOP = 128
WALL = 0x40000000
SYS_CLOSE, SYS_TGKILL, SYS_USERFAULTFD, SYS_PIDFD_GETFD = 3, 234, 323, 438
# UFFD_USER_MODE_ONLY needs no privilege, and the write-protect log has the kernel's own writes all the same.
UFFD_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | 1
# Before anything was changed: a thread in an uninterruptible wait does not stop.
STOP_TIMEOUT_S = 2.0

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.ptrace.restype = ctypes.c_long
libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)

NAMES = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)


class Registers(ctypes.Structure):
    """struct user_regs_struct of x86-64."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in NAMES)


def ptrace(request: int, tid: int, data: int | None = None) -> None:
    if libc.ptrace(request, tid, None, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def find_syscall(pid: int) -> int:
    """Give the address of a `syscall` instruction of the process: in its vdso, or in its C library."""
    with open(f"/proc/{pid}/maps") as maps:
        lines = [line.split() for line in maps]
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        for wanted in ("[vdso]", "/libc"):
            for words in lines:
                if len(words) > 5 and wanted in words[5] and "x" in words[1]:
                    start, end = (int(word, 16) for word in words[0].split("-"))
                    found = os.pread(memory, end - start, start).find(b"\x0f\x05")
                    if found >= 0:
                        return start + found
    finally:
        os.close(memory)
    raise OSError(errno.ENOEXEC, "no syscall instruction was found in it")


def stop(tid: int, pending: list[int]) -> None:
    """Wait until the thread stands still; signals that come first are kept for later."""
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while True:
        got, status = os.waitpid(tid, WALL | os.WNOHANG)
        if got == tid:
            if not os.WIFSTOPPED(status):
                raise OSError(errno.ESRCH, "the process has ended")
            if status >> 16 == EVENT_STOP:
                return
            pending.append(os.WSTOPSIG(status))
            ptrace(PTRACE_CONT, tid)
        elif time.monotonic() > deadline_s:
            raise OSError(errno.ETIMEDOUT, f"its thread {tid} does not stop")
        else:
            time.sleep(0.00005)


def call(tid: int, saved: Registers, changed: Registers, number: int, first: int, pending: list[int]) -> int:
    """Let the stopped thread make one system call; its registers are as before when this ends, in every case."""
    changed.rax, changed.orig_rax, changed.rdi = number, 2**64 - 1, first
    ptrace(PTRACE_SETREGS, tid, ctypes.addressof(changed))
    try:
        while True:
            ptrace(PTRACE_SINGLESTEP, tid)
            _, status = os.waitpid(tid, WALL)
            if not os.WIFSTOPPED(status):
                raise OSError(errno.ESRCH, "the process has ended")
            if status >> 16 == 0 and os.WSTOPSIG(status) == signal.SIGTRAP:
                break
            if status >> 16 == 0:
                pending.append(os.WSTOPSIG(status))
        ptrace(PTRACE_GETREGS, tid, ctypes.addressof(changed))
        result = ctypes.c_int64(changed.rax).value
    finally:
        ptrace(PTRACE_SETREGS, tid, ctypes.addressof(saved))
    changed.rip = changed.rip - 2  # back onto the instruction, for the next call
    if -4095 <= result < 0:
        raise OSError(-result, f"its system call {number} failed: {os.strerror(-result)}")
    return result


def steal(pid: int, tid: int) -> int:
    """Give a userfaultfd of the process, as a file of ours."""
    instruction = find_syscall(pid)
    pidfd = os.pidfd_open(pid)
    pending: list[int] = []
    saved, changed = Registers(), Registers()
    ptrace(PTRACE_SEIZE, tid)
    try:
        ptrace(PTRACE_INTERRUPT, tid)
        stop(tid, pending)
        ptrace(PTRACE_GETREGS, tid, ctypes.addressof(saved))
        ctypes.memmove(ctypes.addressof(changed), ctypes.addressof(saved), ctypes.sizeof(saved))
        changed.rip = instruction
        theirs = call(tid, saved, changed, SYS_USERFAULTFD, UFFD_FLAGS, pending)
        ours = libc.syscall(
            ctypes.c_long(SYS_PIDFD_GETFD), ctypes.c_long(pidfd), ctypes.c_long(theirs), ctypes.c_long(0)
        )
        failure = ctypes.get_errno() if ours < 0 else 0
        # The guest keeps no copy: when the agent dies, its tracking ends by itself.
        call(tid, saved, changed, SYS_CLOSE, theirs, pending)
    finally:
        try:
            ptrace(PTRACE_DETACH, tid)
        finally:
            for number in pending:
                libc.syscall(
                    ctypes.c_long(SYS_TGKILL), ctypes.c_long(pid), ctypes.c_long(tid), ctypes.c_long(number)
                )
    if failure:
        raise OSError(failure, f"its userfaultfd could not be taken: {os.strerror(failure)}")
    return int(ours)


def main() -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid, tid, answer_fd = (int(word) for word in sys.argv[1:4])
    answer = socket.socket(fileno=answer_fd)
    try:
        uffd = steal(pid, tid)
    except OSError as exc:
        answer.sendall(f"{exc.errno or 0} {exc.strerror or exc}".encode())
        return 1
    socket.send_fds(answer, [b"0"], [uffd])
    return 0


if __name__ == "__main__":
    sys.exit(main())
