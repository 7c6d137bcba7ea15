"""The process behind one slot of the sandbox: a template that has imported the library and forks, for each program, a child that runs it.

    pool --R and two pipes--> template --fork--> child          pool --K--> template --kill--> child
         <--{"pid"}, {"status"}--

The template reads nothing that a model wrote: program and output go through pipes that only the child has. Before the program is read, the
child has no descriptor but these, no environment, hard limits, and a system call filter (seccomp, BPF) that lets through what computing in
memory needs and nothing else: no file, socket, process, thread or signal, whatever code runs in it. All that is not named is EPERM.

Started by ``neox_rl.episodes.sandbox`` as a file, isolated, without site-packages and unbuffered (``python -I -S -u``), with: fd of its
socket, CPU seconds, memory in bytes. Standard library alone, so that nothing of the run is in its memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable

LIBRARY = (
    "math cmath fractions decimal numbers random statistics itertools functools operator collections heapq bisect re string textwrap "
    "datetime calendar copy dataclasses enum typing json array struct traceback linecache"
)
"""What a program can import: it cannot open the file of anything else."""
RAISED, REFUSED = 1, 18
"""Exit status of a child whose program raised, and of one that could not be confined."""
MAX_PROGRAM_BYTES = 1 << 16
PROGRAM = "<program>"
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER_MODE = 1, 38, 22, 2

_ALLOWED = (
    "read write close munmap brk mremap futex exit exit_group rt_sigreturn rt_sigprocmask sigaltstack getpid gettid "
    "clock_gettime clock_nanosleep nanosleep gettimeofday getrandom sched_yield fstat lseek"
)
# Not madvise: a process of root could take pages of the machine's memory out of use (MADV_HWPOISON), and nothing here needs it.
_NOT_EXECUTABLE = "mmap mprotect"
"""Allowed unless the pages are to be executable: no machine code of the program's own."""
_NUMBERS = {
    "x86_64": (
        0xC000003E,
        {
            "read": 0,
            "write": 1,
            "close": 3,
            "fstat": 5,
            "lseek": 8,
            "mmap": 9,
            "mprotect": 10,
            "munmap": 11,
            "brk": 12,
            "rt_sigprocmask": 14,
            "rt_sigreturn": 15,
            "sched_yield": 24,
            "mremap": 25,
            "nanosleep": 35,
            "getpid": 39,
            "exit": 60,
            "gettimeofday": 96,
            "sigaltstack": 131,
            "gettid": 186,
            "futex": 202,
            "clock_gettime": 228,
            "clock_nanosleep": 230,
            "exit_group": 231,
            "getrandom": 318,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "close": 57,
            "lseek": 62,
            "read": 63,
            "write": 64,
            "fstat": 80,
            "exit": 93,
            "exit_group": 94,
            "futex": 98,
            "nanosleep": 101,
            "clock_gettime": 113,
            "clock_nanosleep": 115,
            "sched_yield": 124,
            "sigaltstack": 132,
            "rt_sigprocmask": 135,
            "rt_sigreturn": 139,
            "gettimeofday": 169,
            "getpid": 172,
            "gettid": 178,
            "brk": 214,
            "munmap": 215,
            "mremap": 216,
            "mmap": 222,
            "mprotect": 226,
            "getrandom": 278,
        },
    ),
}
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL, _EPERM = 0x7FFF0000, 0x80000000, 0x00050001
_PROT_EXEC, _X32 = 4, 0x40000000
_NR, _ARCH, _ARG2 = 0, 4, 32
"""Offsets in ``struct seccomp_data``; of the third argument its lower half (little-endian)."""


def machines() -> tuple[str, ...]:
    """The machines whose system calls are known, as ``os.uname`` names them."""
    return tuple(_NUMBERS)


def bpf(machine: str) -> bytes:
    """The filter as an array of ``struct sock_filter``. Calls by the numbers of another architecture end the process."""
    arch, numbers = _NUMBERS[machine]
    allowed, guarded = ([numbers[name] for name in names.split()] for names in (_ALLOWED, _NOT_EXECUTABLE))
    size = len(allowed) + len(guarded)
    program = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NR)]
    program += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    program += [(_EQUAL, size - i, 0, number) for i, number in enumerate(allowed)]
    program += [(_EQUAL, len(guarded) - i + 1, 0, number) for i, number in enumerate(guarded)]
    program += [(_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]
    program += [(_LOAD, 0, 0, _ARG2), (_ANY_BIT, 0, 1, _PROT_EXEC), (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


class _Program(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def confine(parent: int, cpu_s: int, memory_bytes: int) -> None:
    """Limits and filter for this child of ``parent``, for good. Raises OSError where the kernel refuses either."""
    libc = ctypes.CDLL(None, use_errno=True)
    instructions = bpf(os.uname().machine)
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    program = _Program(len(instructions) // 8, ctypes.addressof(buffer))
    for limit, value in (
        *((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)),
        *((resource.RLIMIT_NOFILE, 3), (resource.RLIMIT_STACK, 8 << 20)),
    ):
        resource.setrlimit(limit, (value, value))
    # At the hard limit the kernel kills, as it does where memory runs out; below it SIGXCPU says that it was time.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    for call in (
        (PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL)),
        (PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)),
        (PR_SET_SECCOMP, ctypes.c_ulong(FILTER_MODE), ctypes.byref(program)),
    ):
        if libc.prctl(*call) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({call[0]}): the kernel does not confine a process")
        if call[0] == PR_SET_PDEATHSIG and os.getppid() != parent:
            raise OSError(0, "the template has ended")


def forbidden_things() -> list[str]:
    """What of the forbidden this process can still do: nothing, once it is confined. What fails for another reason than the filter's
    EPERM was let through."""

    def can(action: Callable[[], object]) -> bool:
        try:
            action()
        except OSError as error:
            return error.errno != errno.EPERM
        return True

    attempts: dict[str, Callable[[], object]] = {
        "open a file": lambda: os.open("/proc/self/status", os.O_RDONLY),
        "write a file": lambda: os.open("/tmp", os.O_RDWR | os.O_TMPFILE),
        "open a socket": lambda: socket.socket(socket.AF_UNIX),
        "start a process": lambda: os.fork() or os._exit(0),
        "signal its parent": lambda: os.kill(os.getppid(), 0),
        "run a program": lambda: os.execv("/", ["/"]),
    }
    return [name for name, action in attempts.items() if can(action)]


def _run_program() -> int:
    """Reads the program to the end of standard input and runs it; what it prints and what it raises is its output."""
    source = sys.stdin.buffer.read(MAX_PROGRAM_BYTES).decode(errors="replace")
    try:
        exec(compile(source, PROGRAM, "exec"), {"__name__": "__main__"})  # noqa: S102 - what this process is for, and all that it can do
        return 0
    except SystemExit:
        return 0
    except MemoryError:
        _tell("MemoryError")
    # The boundary: whatever the program raises is told to whoever wrote it.
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__, limit=-20)
        line = next((f", line {frame.lineno}" for frame in reversed(frames) if frame.filename == PROGRAM), "")
        _tell(f"{type(error).__name__}{line}: {_words_of(error)}")
    return RAISED


def _words_of(error: BaseException) -> str:
    try:
        return str(error)[:300]
    except BaseException:  # the program's own code, which may raise anything
        return "its words cannot be had: __str__ raises"


def _tell(text: str) -> None:
    """Past ``sys.stdout``, which the program may have replaced or closed."""
    with contextlib.suppress(OSError):
        os.write(1, f"{text}\n".encode(errors="replace"))


def _flush() -> None:
    """What the program put in the place of its streams: its own are unbuffered, so that nothing printed is lost where it is killed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()


def _child(parent: int, pipes: list[int], cpu_s: int, memory_bytes: int) -> None:
    """Never returns."""
    status = REFUSED
    try:
        os.dup2(pipes[0], 0)
        os.dup2(pipes[1], 1)
        os.dup2(pipes[1], 2)
        os.closerange(3, 1 << 16)
        confine(parent, cpu_s, memory_bytes)
        if not (allowed := forbidden_things()):
            status = _run_program()
            _flush()
        else:
            print(allowed)
    finally:
        os._exit(status)


def main(argv: list[str]) -> None:
    """The template: one program at a time, until its socket closes."""
    control = socket.socket(fileno=int(argv[0]))
    cpu_s, memory_bytes = int(argv[1]), int(argv[2])
    for name in LIBRARY.split():
        __import__(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    control.send(b'{"ready": true}')
    while True:
        word, pipes, _, _ = socket.recv_fds(control, 16, 2)
        if not word:
            os._exit(0)
        if word != b"R":
            continue  # a K that came when the child had just ended
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            _child(parent, pipes, cpu_s, memory_bytes)
        for fd in pipes:
            os.close(fd)
        status = _watch(control, pid)
        control.send(json.dumps({"status": status}).encode())


def _watch(control: socket.socket, pid: int) -> int:
    """The child's exit status once it has ended, by itself or on order; negative: the signal that ended it."""
    ended = os.pidfd_open(pid)
    try:
        # Not ``select``: the socket has the number that it has in the pool's process, which may be beyond 1,023.
        both = select.poll()
        both.register(ended, select.POLLIN)
        both.register(control, select.POLLIN)
        while all(fd != ended for fd, _ in both.poll()):
            if control.recv(16) != b"R":
                os.kill(pid, signal.SIGKILL)
                break
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(ended)


if __name__ == "__main__":
    main(sys.argv[1:])
