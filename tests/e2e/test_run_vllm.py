"""Whole runs with a real vLLM server, real weights over ZeroMQ and a real training rank; tiny."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from neox_rl.telemetry.events import read_events
from neox_rl.telemetry.faults import faults
from neox_rl.telemetry.status import read_status
from tests.e2e.runs import Run

RL = 4
SETTINGS = (
    *("metarl.rollout.generator=vllm", "metarl.warmstart.steps=10", f"train_iters={RL}", "metarl.evaluation.num_problems=16"),
    *("metarl.servers.max_num_seqs=32", "metarl.servers.kv_cache_gib=0.25"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm-runs")


def test_asynchronous_rl_with_a_real_server(runs: Path) -> None:
    run = Run(runs, "vllm", *SETTINGS)
    assert run.wait() == 0, run.said()
    assert run.gone()
    summary = run.summary()
    for name in ("heldout_accuracy_warmstart", "heldout_accuracy_final"):
        assert summary[name].keys() == {"mean", "ci95_low", "ci95_high", "n"} and summary[name]["n"] == 16
    assert summary["steps"] == RL and summary["max_staleness_seen"] <= summary["max_staleness_bound"] == 2
    assert summary["rollouts_dropped"] == summary["rollouts_trained_twice"] == 0
    assert summary["tokens_generated"] >= summary["tokens_trained"] + summary["tokens_masked_stale"] > 0
    assert abs(summary["mismatch_kl_max"]) <= 1e-5, "fp32: trainer and engine agree at equal versions"
    assert summary["wall_s"] > 0 and 0 <= summary["trainer_idle_frac"] <= 1
    assert 2 <= summary["weight_updates"] <= RL + 1 and 0 < summary["weight_pause_s_median"] < 10
    spans = {(e.process, e.name) for e in read_events(run.paths.events) if e.kind == "span"}
    assert {("server-0", "generating"), ("server-0", "paused"), ("orchestrator", "start_servers"), ("trainer-0", "train_step")} <= spans


def test_a_server_whose_engine_was_killed_comes_back_and_the_trainer_goes_on(runs: Path) -> None:
    endless = [setting for setting in SETTINGS if not setting.startswith(("train_iters", "metarl.warmstart"))]
    run = Run(runs, "killed", *endless, "train_iters=100000", "metarl.warmstart.steps=0", "metarl.weights.switch_timeout_s=20")
    run.until_step("rl", 1, 400.0)
    assert len(run.processes()) >= 6
    rank = run.one("train.py", "--run-dir", "--local_rank")
    run.kill_one("VLLM::EngineCore")
    # vLLM ends with status 0 then, or hangs in its exit: the orchestrator asks for a new start of a server that answers nothing, mostly
    # when a switch has had its time.
    run.until(lambda: "server-0 is started again (1 of 3)" in run.said(), "the server's second start", 400.0)
    run.until_step("rl", read_status(run.paths.status).step + 3, 400.0)
    assert rank.is_running(), "the very same rank"
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 130 and run.gone()
    assert run.summary()["restarts"] == {"server": 1, "orchestrator": 0, "trainer": 0}
    (fault,) = [fault for fault in faults(read_events(run.paths.events)) if fault.healed_s is not None]
    assert fault.process == "server-0" and fault.healed_s > 0
