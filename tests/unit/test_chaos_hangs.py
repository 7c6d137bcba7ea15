"""A process that ``tools/chaos.py`` lets stand still for good must be ended by the run, in time, and be named."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from neox_rl.telemetry.events import Event
from tests.contracts.test_floors import tool
from tests.unit.small_run import small_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
chaos = tool("chaos")
ROLES = ("server", "server", "orchestrator", "rank")


class Run:
    """Processes that sleep, and a trainer that is one step further each time it is asked."""

    def __init__(self) -> None:
        self.children = [subprocess.Popen(["sleep", "600"]) for _ in ROLES]
        self.processes = [psutil.Process(child.pid) for child in self.children]
        self.launcher, self.agents, self.step = SimpleNamespace(poll=lambda: None), dict[str, Any](), 0

    def position(self) -> tuple[str, int]:
        self.step += 1
        return "rl", self.step

    def victims(self) -> Any:
        alive = [(role, process) for role, process in zip(ROLES, self.processes, strict=True) if chaos.alive(process)]
        by_role = {role: [process for other, process in alive if other == role] for role in ROLES}
        return SimpleNamespace(by_role=by_role, names={process.pid: role for role, process in alive})


@pytest.fixture
def run() -> Iterator[Run]:
    run = Run()
    yield run
    for process in run.children:
        process.kill()
        process.wait()


def test_who_stands_still_must_be_gone_in_time_one_at_a_time(run: Run, tmp_path: Path) -> None:
    for seed in range(6):
        tormentor = chaos.Chaos(run, small_config(tmp_path), random.Random(seed), 1, 400.0)
        tormentor._hit("hang", time.monotonic())
        tormentor._hit("hang", time.monotonic())
        (hung,) = tormentor._hung
        os.waitid(os.P_PID, hung.process.pid, os.WSTOPPED)
        assert tormentor._look() and tormentor.faults == []
        hung.until = 0.0
        with pytest.raises(chaos.ViolationError, match=f"{hung.role} {hung.role} stands still for .* s, and nobody ended it"):
            tormentor._look()
        hung.process.resume()
        os.waitid(os.P_PID, hung.process.pid, os.WCONTINUED)
    child = next(child for child in run.children if child.pid == hung.process.pid)
    child.kill()
    child.wait()
    assert tormentor._look() and [fault.kind for fault in tormentor.faults] == [f"hang {hung.role}"] and tormentor._hung == []


def test_no_last_server_stands_still_and_none_outside_of_training(run: Run, tmp_path: Path) -> None:
    run.children[0].kill()
    run.children[0].wait()
    tormentor = chaos.Chaos(run, small_config(tmp_path), random.Random(1), 1, 400.0)
    for _ in range(20):
        tormentor._hit("hang", time.monotonic())
        (hung,) = tormentor._hung
        assert hung.role != "server"
        hung.process.resume()
        tormentor._hung.clear()
    run.position = lambda: ("starting", 0)  # type: ignore[method-assign]
    tormentor._hit("hang", time.monotonic())
    assert tormentor._hung == []


def test_who_was_replaced_and_not_named_is_told() -> None:
    def died(process: str, t_ns: int) -> Event:
        return Event("launcher", "instant", "died", t_ns, fields={"process": process})

    faults = [chaos.Fault(f"hang {who}", who, 10) for who in ("server-1", "orchestrator", "trainer")]
    assert len(chaos.unnamed(faults, [died("server-1", 9)])) == 3
    assert chaos.unnamed(faults, [died("server-1", 11), died("trainer", 12)]) == [], "the orchestrator went along with the ranks"
    silent = chaos.unnamed(faults, [died("orchestrator", 11), died("server-1", 12)])
    assert silent == ["hang trainer trainer: it was ended, and nothing says so"]
