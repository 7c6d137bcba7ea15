"""Whole runs with the scripted generator: real launcher, orchestrator and training ranks, no vLLM."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from neox_rl.batch.record import read_batch
from neox_rl.keys import RUN_FILE, Keys
from neox_rl.metacot import goal_prompt
from neox_rl.problems.make_tokenizer import EOS, PAD, train_tokenizer
from neox_rl.problems.tokenizer import DirectoryTokenizer, save_hf
from neox_rl.queue.sim.measured import measure
from neox_rl.telemetry.events import read_events
from neox_rl.telemetry.jsonl import read_jsonl
from neox_rl.types import NO_VERSION, Role
from tests.e2e.runs import ROOT, Run, own_address

SFT, RL = 4, 10
SHORT = (f"metarl.warmstart.steps={SFT}", f"train_iters={RL}", "metarl.evaluation.num_problems=8", "metarl.evaluation.every_steps=5")
LONG = ("train_iters=100000", "metarl.warmstart.steps=2", "metarl.evaluation.num_problems=4")
STEPS = [*(("sft", s) for s in range(1, SFT + 1)), *(("rl", s) for s in range(1, RL + 1))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(runs: Path) -> Run:
    """One run to the end, which several tests look at. Its batches are recorded, and its sockets have keys."""
    network = (f"metarl.network.bind_host={own_address()}", "metarl.network.curve=always")
    run = Run(runs, "whole", *SHORT, *network, f"metarl.debug.record_batches={runs}/batches", "metarl.logging.tensorboard=true")
    assert run.wait() == 0, run.said()
    return run


def test_a_run_ends_with_every_step_once_and_its_books_in_order(finished: Run) -> None:
    assert finished.steps() == STEPS and finished.gone()
    summary = finished.summary()
    assert (summary["phase"], summary["steps"], summary["warmstart_steps"], summary["max_staleness_bound"]) == ("done", RL, SFT, 2)
    assert summary["max_staleness_seen"] <= 2 and summary["rollouts_dropped"] == summary["rollouts_trained_twice"] == 0
    assert summary["heldout_accuracy_warmstart"]["n"] == summary["heldout_accuracy_final"]["n"] == 8
    assert summary["tokens_generated"] >= summary["tokens_trained"] + summary["tokens_masked_stale"] > 0
    labels = [row["label"] for row in read_jsonl(finished.paths.evaluations) if row["mode"] == "greedy"]
    assert labels[0] == "warmstart" and labels[-1] == "final"


def test_the_keys_of_its_sockets_are_nowhere_but_in_their_files(finished: Run) -> None:
    keys = Keys.load(finished.paths.keys / RUN_FILE)
    secrets = [
        key.encode() for key in (keys.server_public, keys.server_secret, keys.client_public, keys.client_secret, keys.trainer_secret)
    ]
    others = [path for path in finished.paths.root.rglob("*") if path.is_file() and path.parent != finished.paths.keys]
    assert len(others) > 10 and not [path for path in others if any(secret in path.read_bytes() for secret in secrets)]
    assert not any(secret.decode() in finished.said() for secret in secrets)


def test_it_leaves_a_report_events_of_every_process_and_tensorboard_files(finished: Run) -> None:
    assert finished.paths.report.stat().st_size > 10_000 and list(finished.paths.tensorboard.iterdir())
    assert {e.process for e in read_events(finished.paths.events)} == {"launcher", "orchestrator", "server-0", "trainer-0"}
    assert "after RL" in finished.said() and str(finished.paths.report) in finished.said()


def test_its_events_say_what_the_planner_needs(finished: Run) -> None:
    measured = measure(finished.paths.root)
    scenario, rates = measured.scenario, measured.rates
    publishing, decoding = scenario.publishing, scenario.decoding
    assert len(scenario.step.measured) == RL - 1 and scenario.evaluations.lengths
    # Of one time's parts a fit may find any to be nothing, as where the machine stood still once.
    assert publishing.stage_s + publishing.stage_seq_s > 0.0 and publishing.pause_s + publishing.pause_seq_s > 0.0
    assert decoding.latency_s + decoding.step_s(1) + decoding.prefill_s > 0.0 and measured.group_s > 0.0
    assert 0.0 <= rates.idle_frac < 1.0 and 0.0 < rates.busy_frac <= 1.0 and rates.tokens_per_s > 0.0


def test_the_exported_model_loads_in_transformers(finished: Run) -> None:
    directory = finished.paths.root / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    prompt = read_jsonl(finished.paths.rollouts)[0]["prompt"]
    ids = tokenizer(prompt, return_tensors="pt")
    assert model.config.vocab_size == len(tokenizer) and tokenizer.decode(ids["input_ids"][0]).split() == prompt.split()
    assert model(**ids).logits.shape[-1] == len(tokenizer)


def test_ctrl_c_saves_and_says_how_to_go_on_and_resume_goes_on(runs: Path) -> None:
    """Stopped in the warm start, resumed, stopped in RL, resumed to the end: each step once."""
    settings = ("metarl.warmstart.steps=300", "train_iters=40", "metarl.evaluation.num_problems=4")
    run = Run(runs, "stopped", *settings)
    run.until_step("warmstart", 3)
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 130 and "to continue: " in run.said() and "--resume" in run.said() and run.gone()
    stopped = len(run.steps())
    assert 3 <= stopped < 300 and list(run.paths.checkpoints.iterdir())

    refused = Run(runs, "stopped", *settings, "metarl.rollout.groups_per_step=8", flags=("--resume",))
    assert refused.wait() == 2 and "metarl.rollout.groups_per_step = 8: the run to resume has 4" in refused.said()

    run = Run(runs, "stopped", *settings, flags=("--resume",))
    run.until_step("rl", 3)
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 130 and run.gone()
    half_way = run.metrics()[-1]

    run = Run(runs, "stopped", *settings, flags=("--resume",))
    assert run.wait() == 0, run.said()
    assert run.steps() == [*(("sft", s) for s in range(1, 301)), *(("rl", s) for s in range(1, 41))]
    last = run.metrics()[-1]
    assert last["rollouts_generated"] > half_way["rollouts_generated"] and last["rollouts_trained_twice"] == last["rollouts_dropped"] == 0
    assert [row["label"] for row in read_jsonl(run.paths.evaluations) if row["mode"] == "greedy"] == ["warmstart", "final"]


@pytest.fixture
def long_run(runs: Path, request: pytest.FixtureRequest) -> Iterator[Run]:
    run = Run(runs, f"long-{request.node.name.split('[')[-1].strip(']')}", *LONG)
    run.until_step("rl", 2)
    yield run
    run.kill()


def test_a_lost_rank_ends_the_run_with_its_name_and_log_and_leaves_nothing(long_run: Run) -> None:
    begin = time.monotonic()
    long_run.kill_one("train.py", "--run-dir", "--local_rank")
    assert long_run.wait(200.0) == 1 and long_run.gone()
    assert time.monotonic() - begin < 55.0
    error = long_run.said().split("error: ")[1]
    assert error.startswith("trainer") and str(long_run.paths.log("trainer")) in error
    assert "shows no sign of life" not in error, "its death is seen before its silence"
    summary: dict[str, Any] = long_run.summary()
    assert summary["phase"] == "failed" and summary["steps"] >= 2
    assert "This run failed" in long_run.paths.report.read_text()


def test_nothing_is_left_of_a_run_whose_launcher_was_killed(long_run: Run) -> None:
    assert len(long_run.processes()) >= 4
    long_run.process.kill()
    long_run.process.wait()
    assert long_run.gone(40.0), [p.cmdline() for p in long_run.processes()]


@pytest.mark.parametrize(("tp", "ranks"), [(2, 2), (1, 2)], ids=["tp2", "dp2"])
def test_two_ranks_train_and_export_as_one_does(runs: Path, tp: int, ranks: int) -> None:
    settings = (*SHORT, f"num_gpus={ranks}", f"model_parallel_size={tp}")
    run = Run(runs, f"tp{tp}-of-{ranks}", *settings)
    assert run.wait() == 0, run.said()
    assert run.steps() == STEPS and run.summary()["phase"] == "done" and run.gone()
    assert AutoModelForCausalLM.from_pretrained(run.paths.root / "model").config.hidden_size == 64


def test_training_alone_on_recorded_batches_from_another_runs_model(runs: Path, finished: Run) -> None:
    """``hf_checkpoint`` stands for the warm start; the batches are those of the whole run."""
    settings = (f"metarl.debug.batches={runs}/batches", f"train_iters={RL}", f"metarl.warmstart.hf_checkpoint={finished.paths.root}/model")
    run = Run(runs, "train-only", *settings, config="train_only")
    assert run.wait() == 0, run.said()
    assert run.steps() == [("rl", s) for s in range(1, RL + 1)] and run.summary()["steps"] == RL


def test_a_run_of_several_episodes_a_rollout_trains_them_and_evaluates_by_episode(runs: Path) -> None:
    run = Run(runs, "episodes", *SHORT[:3], config="episodes")
    assert run.wait() == 0, run.said()
    assert run.steps() == STEPS and run.gone()
    summary = run.summary()
    assert summary["rollouts_dropped"] == summary["rollouts_trained_twice"] == 0 and summary["max_staleness_seen"] <= 2
    for row in read_jsonl(run.paths.evaluations):
        found = [each["mean"] for each in row["found_by"]]
        assert len(found) == len(row["right_in"]) == 3 and found == sorted(found) and found[-1] == row["accuracy"]["mean"]
        assert (len(row.get("by_tag", ())) == 2) == (row["label"] in ("warmstart", "final")), "under every discount at both ends"
    rl = [row for row in run.metrics() if row["phase"] == "rl"]
    assert max(row["reward_mean"] for row in rl) > 1, "more than one episode of a rollout may be right"
    rows = read_jsonl(run.paths.rollouts)
    assert any("\n[EPISODE 2] wrong" in row["text"] for row in rows) and all(len(row["lines"]) <= 5 for row in rows)
    assert audited(run)


def audited(run: Run) -> bool:
    audit = subprocess.run([sys.executable, "tools/audit.py", str(run.paths.root)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    return True


@pytest.fixture(scope="module")
def called(runs: Path) -> dict[str, Run]:
    """By the name of their tool, runs whose policy calls it. They start together: most of their time goes into starting."""
    words = train_tokenizer([goal_prompt(6), "[PYTHON]\nprint(1 + 2)\n[/PYTHON]\n[EPISODE 2] wrong\n[CALC 1 + 2]"], 320)
    save_hf(words, {"pad_token": PAD, "eos_token": EOS}, runs / "tokenizer")

    def started(tool: str) -> Run:
        asked = (f"metarl.episodes.tool={tool}", "metarl.episodes.tool_deadline_s=0.3", "metarl.problems.source=goal_finding")
        recorded = (f"metarl.debug.record_batches={runs}/{tool}-batches", f"metarl.tokenizer.path={runs}/tokenizer")
        return Run(runs, tool, *asked, *recorded, "train_iters=3", "metarl.warmstart.steps=1", config="episodes")

    started_runs = {tool: started(tool) for tool in ("calculator", "python")}
    for run in started_runs.values():
        assert run.wait() == 0, run.said()
    return started_runs


@pytest.mark.parametrize(
    ("tool", "answers"),
    [
        ("calculator", {"= 3", "= error: division by zero"}),
        ("python", {"> 3", "> ZeroDivisionError, line 1: division by zero", "> ended: time limit of 0.3 s"}),
    ],
)
def test_what_a_tool_answers_is_read_and_not_trained(runs: Path, called: dict[str, Run], tool: str, answers: set[str]) -> None:
    """Programs that never end among them: they cost their deadline and no more."""
    run, tokenizer, said = called[tool], DirectoryTokenizer(runs / "tokenizer"), set[str]()
    assert run.gone() and audited(run)
    for row in (row for row in run.metrics() if row["phase"] == "rl"):
        groups, _ = read_batch(runs / f"{tool}-batches", "rl", row["step"])
        traces = [trace for group in groups for trace in group.traces]
        told = [segment for trace in traces for segment in trace.segments]
        heard = [s for s in told if s.role is Role.ENV]
        said |= {line for s in heard for line in tokenizer.decode(s.ids).splitlines()}
        assert all((s.mask, s.logprobs, s.version) == (0.0, (), NO_VERSION) for s in heard)
        assert row["tokens_trained"] + row["tokens_masked_stale"] == sum(len(s.ids) for s in told if s.role is Role.THINK)
        assert row["tool_calls_mean"] == sum(tokenizer.decode(s.ids)[:2] in ("\n=", "\n>") for s in heard) / len(traces) > 0
    assert answers <= said and any(line.startswith("[EPISODE 2] wrong") for line in said)
    assert any(re.search(r"[=>] (\d)\n\1\n", row["text"]) for row in read_jsonl(run.paths.rollouts)), "the door that the tool said is named"
