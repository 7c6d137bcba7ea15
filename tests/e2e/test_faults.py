"""Whole runs in which processes are killed or stopped: they heal, finish, and train every step and ticket once."""

from __future__ import annotations

import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from neox_rl.telemetry.events import read_events
from neox_rl.telemetry.faults import faults
from tests.e2e.runs import Run

SFT, RL = 2, 20
SETTINGS = (*(f"metarl.warmstart.steps={SFT}", f"train_iters={RL}", "metarl.evaluation.num_problems=4", "checkpoint_factor=4"),)
SERVER, ORCHESTRATOR, RANK = ("neox_rl.run.scripted_server",), ("neox_rl.run.orchestrator",), ("train.py", "--run-dir", "--local_rank")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fault-runs")


def finished_in_order(run: Run, rl: int = RL) -> None:
    """To the end, with every step once and nothing lost or doubled, and nothing left behind."""
    assert run.wait() == 0, run.said()
    assert run.steps() == [*(("sft", s) for s in range(1, SFT + 1)), *(("rl", s) for s in range(1, rl + 1))] and run.gone()
    summary = run.summary()
    assert summary["phase"] == "done" and summary["rollouts_dropped"] == summary["rollouts_trained_twice"] == 0
    assert summary["max_staleness_seen"] <= summary["max_staleness_bound"]


def died(run: Run) -> Counter[str]:
    return Counter(fault.process for fault in faults(read_events(run.paths.events)) if fault.healed_s is not None)


def test_a_killed_server_and_a_killed_orchestrator_come_back_while_the_trainer_goes_on(runs: Path) -> None:
    rl = 2 * RL
    run = Run(runs, "healed", *SETTINGS, f"train_iters={rl}", "metarl.scripted.token_s=0.01")  # it must not be over before it is looked at
    run.until_step("rl", 3)
    rank = run.one(*RANK)
    run.kill_one(*SERVER)
    run.until_step("rl", 8)
    run.kill_one(*ORCHESTRATOR)
    run.until_step("rl", 13)
    assert rank.is_running(), "the very same rank"
    finished_in_order(run, rl)
    assert run.summary()["restarts"] == {"server": 1, "orchestrator": 1, "trainer": 0}
    assert died(run) == {"server-0": 1, "orchestrator": 1}
    for name in ("server-0", "orchestrator"):
        assert f"warning: {name} was killed by SIGKILL" in run.said() and f"{name} is started again (1 of 3)" in run.said()
    assert "What failed on the way" in run.paths.report.read_text()


def test_a_stopped_rank_is_found_and_the_run_goes_on_from_its_checkpoint(runs: Path) -> None:
    """Two tensor-parallel ranks: the other one waits in a collective, and would for as long as that may."""
    settings = (*SETTINGS, "num_gpus=2", "model_parallel_size=2", "metarl.deadlines.silence_s=15", "metarl.scripted.token_s=0.01")
    run = Run(runs, "resumed", *settings, flags=("--restarts", "1"))
    run.until_step("rl", 1)
    server, rank = run.one(*SERVER), run.one("--local_rank=1")  # finding them takes its time, in which the run goes on
    run.until_step("rl", 6)
    rank.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    run.until(lambda: "start again (1 of 1)" in run.said(), "the second attempt")
    assert time.monotonic() - begin < 90.0
    assert server.is_running(), "the very same server"
    finished_in_order(run)
    said = next(line for line in run.said().splitlines() if line.startswith("warning: trainer"))
    assert re.search(rf"shows no sign of life for \d+ s: trainer-1 \(pid {rank.pid} on .*\), at ", said)
    assert run.summary()["restarts"] == {"server": 0, "orchestrator": 0, "trainer": 1} and died(run) == {"trainer": 1}
