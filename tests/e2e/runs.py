"""Whole runs as a user starts them: ``deepy.py`` in a process of its own, everything it starts, and whether anything is left of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import psutil

from neox_rl.config.network import is_loopback
from neox_rl.telemetry.jsonl import read_json, read_jsonl
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.status import read_status

ROOT = Path(__file__).resolve().parents[2]
MARK = "NEOX_RL_TEST_RUN"
"""In the environment of everything that a run starts: how a test finds it again without looking at names."""


def own_address() -> str:
    """An IPv4 address of this machine that is not loopback, where it has one."""
    addresses = (a.address for interface in psutil.net_if_addrs().values() for a in interface if a.family == socket.AF_INET)
    return next((address for address in addresses if not is_loopback(address)), "127.0.0.1")


class Run:
    """One start of a debug config. ``settings`` as for ``--set``, without ``metarl.``."""

    started: ClassVar[list[Run]] = []

    def __init__(self, runs_dir: Path, name: str, *settings: str, config: str = "fake_generator", flags: tuple[str, ...] = ()) -> None:
        self.paths, self.mark = RunPaths.of(runs_dir / name), f"{runs_dir}/{name}/{time.monotonic_ns()}"
        sets = [f"metarl.runs_dir={runs_dir}", f"metarl.name={name}", *settings]
        argv = [sys.executable, "deepy.py", "train.py", f"configs/debug/{config}.yml"]
        argv += [word for setting in sets for word in ("--set", setting)]
        self.seen: set[psutil.Process] = set()
        self.output = runs_dir / f"{name}-{time.monotonic_ns()}.out"
        with self.output.open("wb") as output:
            env = os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                [*argv, *flags], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        self.started.append(self)

    def wait(self, deadline_s: float = 400.0) -> int:
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not done after {deadline_s} s; it said:\n{self.said()}") from None

    def kill(self) -> None:
        """For a test that failed: the guardians end the rest."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def until(self, reached: Callable[[], bool], what: str, deadline_s: float = 300.0) -> None:
        end = time.monotonic() + deadline_s
        while not reached():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise AssertionError(f"the run ended or took too long before {what}; it said:\n{self.said()}")
            time.sleep(0.1)

    def until_step(self, phase: str, step: int, deadline_s: float = 300.0) -> None:
        self.until(
            lambda: (status := read_status(self.paths.status)).phase == phase and status.step >= step, f"{phase} step {step}", deadline_s
        )

    def processes(self) -> list[psutil.Process]:
        """What the run has started and is alive, the launcher included.

        By environment and by descent, and what was found once is remembered: vLLM's processes overwrite theirs with a title.
        """
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    self.seen |= {process, *process.children(recursive=True)}
        return [process for process in self.seen if _alive(process)]

    def one(self, *words: str) -> psutil.Process:
        """The youngest process whose command line has all these words: not its guardian, not a wrapper around it."""
        matching = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):  # one that ends meanwhile
                line = process.cmdline()
                matching += [process] * all(any(word in part for part in line) for word in words)
        assert matching, f"no process of the run has {words} in its command line"
        return max(matching, key=lambda p: (p.create_time(), p.pid))

    def kill_one(self, *words: str) -> None:
        """``kill -9`` for the process that :meth:`one` finds."""
        self.one(*words).send_signal(signal.SIGKILL)

    def gone(self, deadline_s: float = 60.0) -> bool:
        """Whether nothing of the run is left, once it has had a moment to go."""
        end = time.monotonic() + deadline_s
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.2)
        return not left

    def metrics(self) -> list[dict[str, Any]]:
        return read_jsonl(self.paths.metrics)

    def steps(self) -> list[tuple[str, int]]:
        return [(row["phase"], row["step"]) for row in self.metrics()]

    def summary(self) -> dict[str, Any]:
        return read_json(self.paths.summary)


def _alive(process: psutil.Process) -> bool:
    """Whether this very process runs: a later one with its number is another."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
