"""Programs that a model wrote, run in processes that can do nothing but compute and print.

What holds, by the kernel and not by Python, so that no trick inside the interpreter changes it (``sandbox_worker``):

- no file is opened, read or written, no socket, process, thread, signal, debugger or executable memory: a system call filter refuses all
  but some twenty calls, and every program's process tries the forbidden ones before it reads the program; one that could do any does not
  run it;
- memory, CPU time, wall time and output are bounded, and the process is killed at the bound;
- a program sees no environment, no descriptor but its own two pipes, and nothing of the run or of earlier programs.

What does not hold: the filter does not hide how long things take, what processor it is, or how busy; and a hole in the kernel behind one of
the calls that are let through would be open. Linux on x86_64 or aarch64 with seccomp; elsewhere ``PythonSandbox`` refuses to start.
Programs have the part of the standard library named in ``sandbox_worker.LIBRARY``, and no package.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from neox_rl.episodes import sandbox_worker
from neox_rl.errors import ConfigError, DeadlineError
from neox_rl.waits import readable, writable

START_S = 60.0
KILL_S = 5.0
CPU_SLACK_S = 2
"""CPU seconds beyond the limit on the wall clock, which is the tighter one."""
IDLE_WAIT_S = 600.0
MAX_MESSAGE_BYTES = 4096


class End(StrEnum):
    """How a program ended. MEMORY is known only where Python says so; a program that dies of it otherwise DIED."""

    DONE = "done"
    RAISED = "raised"
    TIME = "time"
    OUTPUT = "output"
    DIED = "died"


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one program. ``output_chars``: more is cut, and much more ends the program."""

    wall_s: float = 2.0
    memory_mib: int = 256
    output_chars: int = 1000


@dataclass(frozen=True, slots=True)
class Printed:
    """What a program printed (its error in the last line), cut at the limit."""

    text: str
    end: End
    ms: float


def why_not() -> str:
    """Why this machine cannot confine a program, empty where it can; whether it does is tried when the sandbox starts."""
    machine = os.uname().machine
    if not sys.platform.startswith("linux") or machine not in sandbox_worker.machines():
        return f"{sys.platform} on {machine} has no system call filter that this sandbox knows (Linux on x86_64 or aarch64)"
    return ""


class _SilentError(Exception):
    """The template ended, or did not answer in time."""


class _Slot:
    """One template process; used by one thread at a time."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._start()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The limit on CPU time holds where the pool's own process is stopped and cannot look at the clock.
        numbers = [theirs.fileno(), int(self._limits.wall_s) + CPU_SLACK_S, self._limits.memory_mib << 20]
        command = [sys.executable, "-I", "-S", "-B", "-u", str(Path(sandbox_worker.__file__)), *map(str, numbers)]
        null = subprocess.DEVNULL
        with theirs:
            self._process = subprocess.Popen(
                command, env={}, pass_fds=[theirs.fileno()], stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/"
            )

    def wait_ready(self) -> None:
        try:
            self._message(time.monotonic() + START_S)
        except _SilentError:
            found = f"sandbox template {self._process.pid} to start (exit status {self._process.poll()})"
            raise DeadlineError(found, START_S, f"try: {sys.executable} -I -S -c 'import ctypes'") from None

    def run(self, program: str, wall_s: float) -> Printed:
        started = time.monotonic()
        pipes = _pipes()
        try:
            text, end = self._run(program, pipes, started + wall_s)
        except _SilentError:
            self.replace()
            text, end = "", End.DIED
        except BaseException:
            self.replace()  # the next program would read what is left of this one
            raise
        return Printed(text, end, (time.monotonic() - started) * 1e3)

    def _run(self, program: str, pipes: tuple[int, int, int, int], deadline: float) -> tuple[str, End]:
        theirs, source, output, printed = pipes
        try:
            try:
                socket.send_fds(self._control, [b"R"], [theirs, printed])
            except OSError:
                os.close(source)
                raise _SilentError from None
            finally:
                os.close(theirs)
                os.close(printed)
            _feed(source, program.encode(errors="replace")[: sandbox_worker.MAX_PROGRAM_BYTES], deadline)
            data, over = self._collect(output, deadline)
            status, over = self._status(over, deadline)
            data += _rest(output, 4 * self._limits.output_chars - len(data))
        finally:
            os.close(output)
        return data.decode(errors="replace")[: self._limits.output_chars + 1], over or _end_of(status)

    def _collect(self, output: int, deadline: float) -> tuple[bytes, End | None]:
        """What is printed until the program closes its output or is to be ended, and why it is."""
        data = b""
        while True:
            if len(data) > 4 * self._limits.output_chars:
                return data, End.OUTPUT
            if not readable(output, deadline):
                return data, End.TIME
            chunk = os.read(output, 1 << 16)
            if not chunk:
                return data, None
            data += chunk

    def _status(self, over: End | None, deadline: float) -> tuple[int, End | None]:
        """Ends the child where it is over, or at the deadline: it may have closed its output and go on computing."""
        try:
            if over is not None:
                self._control.send(b"K")
            return int(self._message(time.monotonic() + KILL_S if over else deadline)["status"]), over
        except _SilentError:
            if over is not None:
                raise
            return self._status(End.TIME, deadline)
        except OSError:
            raise _SilentError from None

    def _message(self, deadline: float) -> dict[str, Any]:
        if not readable(self._control.fileno(), deadline):
            raise _SilentError
        try:
            data = self._control.recv(MAX_MESSAGE_BYTES)
        except OSError:
            raise _SilentError from None
        if not data:
            raise _SilentError
        message: dict[str, Any] = json.loads(data)
        return message

    def replace(self) -> None:
        self.close()
        self._start()
        self.wait_ready()

    def close(self) -> None:
        """Ends the template and its child, which dies with it."""
        self._control.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait(KILL_S)


def _pipes() -> tuple[int, int, int, int]:
    """Both ends of two pipes. Raises OSError, with none left open, where there are no descriptors for them."""
    first = os.pipe()
    try:
        return (*first, *os.pipe())
    except OSError:
        for each in first:
            os.close(each)
        raise


def _feed(source: int, program: bytes, deadline: float) -> None:
    """Writes the program and closes; a child that is gone does not want it."""
    os.set_blocking(source, False)
    try:
        rest = memoryview(program)
        while rest and writable(source, deadline):
            rest = rest[os.write(source, rest) :]
    except BrokenPipeError:
        pass
    finally:
        os.close(source)


def _rest(output: int, room: int) -> bytes:
    """What a child that has ended left in the pipe."""
    os.set_blocking(output, False)
    data = b""
    with contextlib.suppress(BlockingIOError):
        while len(data) < room and (chunk := os.read(output, 1 << 16)):
            data += chunk
    return data


def _end_of(status: int) -> End:
    if status in (0, sandbox_worker.RAISED):
        return End.RAISED if status else End.DONE
    return End.TIME if status == -signal.SIGXCPU else End.DIED


def _close_all(slots: Iterable[_Slot]) -> None:
    for slot in slots:
        slot.close()


class PythonSandbox:
    """Runs programs, ``workers`` at once. Blocks while it starts, 0.1 s. Raises ConfigError where programs cannot be confined."""

    def __init__(self, workers: int = 1, limits: Limits = Limits()) -> None:
        if reason := why_not():
            raise ConfigError(f"metarl.episodes.tool = python: {reason}; set tool: calculator or none")
        self.limits = limits
        self._slots = [_Slot(limits) for _ in range(workers)]
        self._finalizer = weakref.finalize(self, _close_all, self._slots)
        self._idle: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for slot in self._slots:
            slot.wait_ready()
            self._idle.put(slot)
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="sandbox")
        self._require_confined()

    def _require_confined(self) -> None:
        tried = self._run_within("print(6 * 7)", START_S)  # a machine that stands still for a moment confines all the same
        if tried.end is not End.DONE or tried.text.strip() != "42":
            self.close()
            raise ConfigError(
                f"metarl.episodes.tool = python: this machine does not confine a program (it ended as {tried.end}: {tried.text[:200]!r});"
                " the kernel needs seccomp filters, and memory_mib room for the interpreter; set tool: calculator or none"
            )

    async def run(self, program: str) -> Printed:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self.run_sync, program)

    def run_sync(self, program: str) -> Printed:
        """From any thread. Whatever the program does is a ``Printed``."""
        return self._run_within(program, self.limits.wall_s)

    def _run_within(self, program: str, wall_s: float) -> Printed:
        try:
            slot = self._idle.get(timeout=IDLE_WAIT_S)
        except queue.Empty:
            raise DeadlineError("an idle sandbox worker", IDLE_WAIT_S, "raise metarl.episodes.tool_workers") from None
        try:
            return slot.run(program, wall_s)
        finally:
            self._idle.put(slot)

    def close(self) -> None:
        """Ends all processes. Safe to call twice."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._finalizer()
