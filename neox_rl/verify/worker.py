"""The process behind one slot of the pool: a template that has imported sympy and forks the child that checks.

    pool --request pipe--> child --response pipe--> pool          pool --control pipe--> template --fork, kill--> child

The template is single-threaded and started by exec, so that forking it is safe; a child that was killed is replaced in
milliseconds, without a second import of sympy. A ``K`` on the control pipe kills the child; its end of file means that the
pool's process is gone, and ends both. Frames are a 4-byte big-endian length and JSON.

Started by ``neox_rl.verify.pool`` with: control fd, request fd, response fd, policy as JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import resource
import select
import signal
import struct
import sys
import time
from typing import Any

from neox_rl.types import Reason
from neox_rl.verify.finding import Finding
from neox_rl.verify.math import check_math, readable_gold
from neox_rl.verify.policy import MathPolicy
from neox_rl.verify.warmup import warm_up
from neox_rl.waits import readable

KILL = b"K"
RECYCLE_STATUS = 17
CHECKS_PER_CHILD = 2_000
MAX_MEMORY_BYTES = 2 << 30
MAX_CPU_S = 3_600
MAX_OPEN_FILES = 64
MAX_RECURSION = 2_500
PARENT_POLL_S = 5.0
_PR_SET_PDEATHSIG = 1


def encode(message: dict[str, Any]) -> bytes:
    """One frame. Lone surrogates travel as JSON escapes."""
    body = json.dumps(message).encode("ascii")
    return struct.pack(">I", len(body)) + body


def answer(request: dict[str, Any], policy: MathPolicy) -> Finding:
    """The finding of one request: ``{"gold": ..., "text": ...}``, or ``{"gold": ...}`` alone to check the gold answer."""
    if "text" in request:
        return check_math(request["gold"], request["text"], policy)
    return Finding(Reason.MATCH if readable_gold(request["gold"]) else Reason.BAD_GOLD, request["gold"])


def _read_exactly(fd: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = os.read(fd, count - len(data))
        if not chunk:
            os._exit(0)
        data += chunk
    return data


def _serve(requests: int, responses: int, policy: MathPolicy) -> None:
    """The child: answers until it is killed, the pool is gone, or it is due for replacement."""
    for _ in range(CHECKS_PER_CHILD):
        (size,) = struct.unpack(">I", _read_exactly(requests, 4))
        request = json.loads(_read_exactly(requests, size))
        sound = True
        try:
            finding = answer(request, policy)
        # The boundary where a failure inside sympy becomes a verdict of its own; the child may be damaged, so it is replaced.
        except Exception as error:
            finding, sound = Finding(Reason.ERROR, f"{type(error).__name__}: {str(error)[:100]}"), False
        os.write(responses, encode({"id": request["id"], "reason": finding.reason.value, "extracted": finding.extracted[:400]}))
        if not sound:
            break
    os._exit(RECYCLE_STATUS)


def _limit() -> None:
    """The child dies with its template, writes no file, and cannot take the machine's memory."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_OPEN_FILES, MAX_OPEN_FILES))


def _fork(control: int, requests: int, responses: int, policy: MathPolicy) -> tuple[int, int]:
    """Pid of a new child, and a pipe that reads end of file once it is dead."""
    alive, held = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(control)
            os.close(alive)
            _limit()
            _serve(requests, responses, policy)
        finally:
            os._exit(1)
    os.close(held)
    return pid, alive


def main(argv: list[str]) -> None:
    """The template: forks, watches and replaces children until the control pipe closes."""
    control, requests, responses = (int(fd) for fd in argv[:3])
    policy = MathPolicy(**json.loads(argv[3]))
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    sys.setrecursionlimit(MAX_RECURSION)
    warm_up(policy)
    os.dup2(os.open(os.devnull, os.O_RDWR), 2)
    gc.collect()
    gc.freeze()
    ready = False
    while True:
        pid, alive = _fork(control, requests, responses, policy)
        if not ready:
            os.write(responses, encode({"ready": True}))
            ready = True
        killed = _watch(control, alive, parent)
        if killed is not False:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(alive)
        if killed is None:
            os._exit(0)
        if killed:
            _drain(requests)
        if killed or os.waitstatus_to_exitcode(status) != RECYCLE_STATUS:
            os.write(responses, encode({"died": status, "killed": killed}))


def _drain(requests: int) -> None:
    """Drops what the killed child left unread: it may have died between the length and the body of a request."""
    while readable(requests, time.monotonic()) and os.read(requests, 1 << 16):
        pass


def _watch(control: int, alive: int, parent: int) -> bool | None:
    """Waits for the child to die (False), an order to kill it (True) or the end of the pool's process (None)."""
    # Not ``select``: the control pipe has the number that it has in the pool's process, which may be beyond 1,023.
    both = select.poll()
    both.register(control, select.POLLIN)
    both.register(alive, select.POLLIN)
    while True:
        ready = [fd for fd, _ in both.poll(PARENT_POLL_S * 1e3)]
        if control in ready:
            return True if os.read(control, 1) == KILL else None
        if alive in ready:
            return False
        # A fork of the pool's process may hold the control pipe open after the process itself is gone.
        if os.getppid() != parent:
            return None
