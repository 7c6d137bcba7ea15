"""Worker processes with a hard deadline for every check, kept by the parent. The same verdict from any thread or event loop.

math-verify's own timeout needs SIGALRM, thus the main thread, and leaves C loops running; here the parent holds the clock and
kills. A check that passes its deadline is a TIMEOUT, a worker that dies an ERROR: never a crash, never a match.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from neox_rl.errors import DeadlineError
from neox_rl.types import Problem, Reason, Verdict
from neox_rl.verify.extract import tail
from neox_rl.verify.finding import Finding
from neox_rl.verify.policy import DEFAULT_POLICY, MathPolicy
from neox_rl.verify.quick import quick_finding
from neox_rl.waits import readable, writable

START_S = 120.0
KILL_S = 5.0
CLOSE_S = 5.0
IDLE_WAIT_S = 600.0
MAX_FRAME_BYTES = 1 << 20
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from neox_rl.verify.worker import main; main(sys.argv[2:])"
_ROOT = str(Path(__file__).resolve().parents[2])


class _Silence(Exception):
    """No whole frame came before the deadline, the pipe closed, or what came is no frame."""


class _Slot:
    """One template process and its pipes; used by one thread at a time."""

    def __init__(self, policy: MathPolicy) -> None:
        self._policy = policy
        self._ids = 0
        self._start()

    def _start(self) -> None:
        control, self._control = os.pipe()
        requests, self._requests = os.pipe()
        self._responses, responses = os.pipe()
        os.set_blocking(self._requests, False)
        self._buffer = b""
        inherited = (control, requests, responses)
        command = [sys.executable, "-s", "-P", "-B", "-c", _BOOT, _ROOT, *map(str, inherited), json.dumps(asdict(self._policy))]
        # Nothing of the run's environment: a fixed hash seed, since sympy's paths depend on the order of its sets.
        env = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "PATH": os.environ.get("PATH", os.defpath)}
        env.update({k: os.environ[k] for k in ("LD_LIBRARY_PATH", "VIRTUAL_ENV") if k in os.environ})
        try:
            self._process = subprocess.Popen(
                command, env=env, pass_fds=inherited, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True, cwd="/"
            )
        finally:
            for fd in inherited:
                os.close(fd)

    def wait_ready(self) -> None:
        """Raises DeadlineError when the worker did not come up."""
        started = time.monotonic()
        try:
            self._frame(started + START_S)
        except _Silence:
            raise DeadlineError(
                f"verifier worker {self._process.pid} to start (exit status {self._process.poll()})",
                time.monotonic() - started,
                "its error is on stderr; try: python -c 'import math_verify'",
            ) from None

    def ask(self, request: dict[str, Any], deadline_s: float) -> Finding:
        """The finding of one request, TIMEOUT when ``deadline_s`` passes, ERROR when the child dies."""
        self._ids += 1
        deadline = time.monotonic() + deadline_s
        try:
            self._send({"id": self._ids, **request}, deadline)
            while True:
                frame = self._frame(deadline)
                if frame.get("id") == self._ids:
                    return Finding(Reason(frame["reason"]), str(frame["extracted"]))
                if "died" in frame:
                    # The child may have died with half a request read: only an acknowledged replacement is in step again.
                    self._replace_child()
                    return Finding(Reason.ERROR, f"worker died with status {frame['died']}")
        except _Silence:
            self._replace_child()
            return Finding(Reason.TIMEOUT)

    def _send(self, request: dict[str, Any], deadline: float) -> None:
        body = json.dumps(request).encode("ascii")
        data = memoryview(struct.pack(">I", len(body)) + body)
        while data:
            if not writable(self._requests, deadline):
                raise _Silence
            try:
                data = data[os.write(self._requests, data) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise _Silence from None

    def _frame(self, deadline: float) -> dict[str, Any]:
        while True:
            if len(self._buffer) >= 4:
                (size,) = struct.unpack(">I", self._buffer[:4])
                if size > MAX_FRAME_BYTES:
                    raise _Silence
                if len(self._buffer) >= 4 + size:
                    body, self._buffer = self._buffer[4 : 4 + size], self._buffer[4 + size :]
                    frame: dict[str, Any] = json.loads(body)
                    return frame
            if not readable(self._responses, deadline):
                raise _Silence
            chunk = os.read(self._responses, 1 << 16)
            if not chunk:
                raise _Silence
            self._buffer += chunk

    def _replace_child(self) -> None:
        """Has the template kill its child; what the child still wrote is dropped. A template that fails is replaced."""
        try:
            os.write(self._control, b"K")
            deadline = time.monotonic() + KILL_S
            while not self._frame(deadline).get("killed"):
                pass
        except (_Silence, OSError):
            self.close()
            self._start()
            self.wait_ready()

    def close(self) -> None:
        """Ends the template and its child, and returns once they are gone."""
        for fd in (self._control, self._requests, self._responses):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._control = self._requests = self._responses = -1
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(CLOSE_S)


def _close_all(slots: Iterable[_Slot]) -> None:
    for slot in slots:
        slot.close()


class VerifierPool:
    """``ports.Verifier`` for mathematics. Blocks while its workers import sympy, about two seconds. Thread-safe.

    ``counts`` has the number of checks by reason. Raises DeadlineError when a worker does not start.
    """

    def __init__(self, workers: int = 1, deadline_s: float = 1.0, policy: MathPolicy = DEFAULT_POLICY) -> None:
        self.deadline_s = deadline_s
        self.counts: Counter[Reason] = Counter()
        self._lock = threading.Lock()
        self._slots = [_Slot(policy) for _ in range(workers)]
        self._finalizer = weakref.finalize(self, _close_all, self._slots)
        self._idle: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for slot in self._slots:
            slot.wait_ready()
            self._idle.put(slot)
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="verify")

    async def check(self, problem: Problem, text: str) -> Verdict:
        """The verdict on ``text`` (the completion, prompt excluded) against ``problem.answer``."""
        gold, text = tail(problem.answer), tail(text)
        if verdict := self._quick(gold, text):
            return verdict
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._ask, {"gold": gold, "text": text})

    def check_sync(self, problem: Problem, text: str) -> Verdict:
        """``check`` for callers without an event loop, from any thread."""
        gold, text = tail(problem.answer), tail(text)
        return self._quick(gold, text) or self._ask({"gold": gold, "text": text})

    def check_gold(self, problem: Problem) -> Verdict:
        """Correct when the problem's own answer can be read; a problem whose answer cannot must not be trained on."""
        gold = tail(problem.answer)
        if finding := quick_finding(gold, gold):
            return finding.verdict(0.0)
        return self._ask({"gold": gold})

    def _quick(self, gold: str, text: str) -> Verdict | None:
        """The verdict on plain numbers, which need no worker; None for all else."""
        started = time.monotonic()
        self._require_open()
        finding = quick_finding(gold, text)
        return self._counted(finding, started) if finding else None

    def _counted(self, finding: Finding, started: float) -> Verdict:
        with self._lock:
            self.counts[finding.reason] += 1
        return finding.verdict((time.monotonic() - started) * 1e3)

    def _require_open(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("the verifier pool is closed")

    def _ask(self, request: dict[str, Any]) -> Verdict:
        self._require_open()
        try:
            slot = self._idle.get(timeout=IDLE_WAIT_S)
        except queue.Empty:
            raise DeadlineError("an idle verifier worker", IDLE_WAIT_S, "raise verify.workers") from None
        started = time.monotonic()
        try:
            finding = slot.ask(request, self.deadline_s)
        finally:
            self._idle.put(slot)
        return self._counted(finding, started)

    def close(self) -> None:
        """Ends all worker processes. Safe to call twice."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._finalizer()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
