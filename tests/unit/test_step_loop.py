"""The order of a run as rank 0 sees it, with an engine and a feed that only write down what is asked of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neox_rl.batch.record import record_batch
from neox_rl.config.run import RunConfig
from neox_rl.engines.base import RankEngine
from neox_rl.engines.port import StepReport, Topology
from neox_rl.errors import GIVES_UP, ConfigError, DiskFullError, DiskStaysFullError, exit_status
from neox_rl.queue.wire import Phase
from neox_rl.run.signs import Signs
from neox_rl.step import loop as loop_module
from neox_rl.step.feed import RecordedFeed
from neox_rl.step.loop import Leader, TrainingLoop
from neox_rl.step.position import Position
from neox_rl.telemetry.events import EventLog, read_events
from neox_rl.telemetry.heartbeat import Beat
from neox_rl.telemetry.jsonl import read_jsonl
from neox_rl.telemetry.status import read_status
from neox_rl.types import Group, Json
from tests.unit.small_run import demonstration_group, rollout_group, small_config, small_paths


class Story:
    """What happened, in order; engine and feed write to it."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.saved: dict[str, Json] = {}


class WrittenEngine:
    """An ``Engine`` of one rank without a model."""

    topology = Topology(0, 1, 1, 1, 1, 0, 0, 0, "cpu")

    def __init__(self, story: Story) -> None:
        self.story = story
        self.full = 0

    def __getattr__(self, name: str) -> Any:
        def note(*args: Any, **kwargs: Any) -> None:
            self.story.said.append(name)

        return note

    def step(self, microbatches: Any, loss_fn: Any, lr: float, temperature: float = 1.0) -> StepReport:
        self.story.said.append("step")
        return StepReport(0.5, 1.0, lr, 4, {})

    def logprobs(self, microbatches: Any, which: str = "current", temperature: float = 1.0) -> list[Any]:
        self.story.said.append(f"logprobs {which}")
        return [np.zeros(m.terms.shape, np.float32) for m in microbatches]

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "w", torch.zeros(2)

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        assert data is not None
        return data

    def save(self, directory: Path, client_state: Mapping[str, Json]) -> Path:
        self.story.said.append("save")
        if self.full:
            self.full -= 1
            raise DiskFullError("no room on the disk of d")
        self.story.saved = dict(client_state)
        return directory

    def load(self, directory: Path) -> dict[str, Json]:
        self.story.said.append(f"load {directory.name}")
        return self.story.saved

    def barrier(self) -> None: ...


class WrittenFeed:
    """Batches of demonstrations and rollouts; stops at ``stop_at`` (``sft 2``, ``rl 1``, ``evaluate final``)."""

    def __init__(self, story: Story, stop_at: str = "") -> None:
        self.story, self.stop_at = story, stop_at
        self.state: dict[str, Json] = {}

    def hello(self, world: int, position: Position) -> None:
        self.story.said.append(f"hello sft {position.sft_step} rl {position.rl_step}")

    def next_groups(self, phase: Phase, step: int) -> tuple[Group, ...]:
        if self.stop_at == f"{phase} {step}":
            return ()
        self.state = {"after": f"{phase} {step}"}
        return (demonstration_group(step) if phase is Phase.SFT else rollout_group(step, step - 1),)

    def evaluate(self, label: str, version: int) -> bool:
        self.story.said.append(f"evaluate {label} v{version}")
        return self.stop_at != f"evaluate {label}"

    def report(self, phase: Phase, step: int, metrics: Mapping[str, Json]) -> None:
        self.story.said.append(f"{phase} {step}")

    def saved(self, position: Position) -> None:
        self.story.said.append(f"saved sft {position.sft_step} rl {position.rl_step}")

    def published(self, version: int, digest: str) -> None:
        self.story.said.append(f"v{version}")

    def done(self, reason: str) -> None:
        self.story.said.append(f"done {reason}")

    def close(self) -> None: ...


def run(config: RunConfig, story: Story, feed: Any = None, resume: bool = False, full: int = 0) -> str:
    """``full``: how often the engine finds no room to save."""
    paths = small_paths(config)
    events = EventLog(paths.event_log("trainer-0"), "trainer-0")
    engine = WrittenEngine(story)
    engine.full = full
    loop = TrainingLoop(config, engine, Leader(feed or WrittenFeed(story), None), events, paths)
    try:
        return loop.run(resume)
    finally:
        events.close()


class Overflows(RankEngine):
    """In each optimizer step the gradient overflows ``times`` times. One rank, no model."""

    topology = WrittenEngine.topology

    def __init__(self, times: int, tried: Callable[[], None]) -> None:
        self.times, self.tried, self._steps = times, tried, 0

    def _train(self, microbatches: Any, on_logits: Any, lr: float) -> float | None:
        self.tried()
        self.times -= 1
        return None if self.times >= 0 else 1.0

    def _reduce(self, sums: Any) -> dict[str, float]:
        return {"loss": 0.5, "tokens": 4.0}

    def _forward(self, microbatches: Any, on_logits: Any) -> None: ...

    def _weights_changed(self) -> None: ...


def test_each_try_of_a_step_that_overflows_is_a_sign_that_it_goes_on(tmp_path: Path) -> None:
    """Forty tries of 30 s are no step that stands still for 900; one try that does is found as before."""
    events, signs, now = EventLog(tmp_path / "events.jsonl", "trainer-0"), Signs(60.0, 900.0, 600.0), 0.0

    def passes(seconds: int) -> str:
        nonlocal now
        found = ""
        for _ in range(seconds):
            now += 1.0
            signs.hear({"trainer-0": Beat("trainer-0", 7, "here", round(now), events.doing)}, now, 1.0)
            found = found or signs.stuck("trainer-", now)
        return found

    said: list[str] = []
    engine = Overflows(40, lambda: said.append(passes(30)))
    config, paths = small_config(tmp_path), small_paths(small_config(tmp_path))
    TrainingLoop(config, engine, None, events, paths)
    with events.span("train_step", phase="rl", step=3):
        engine.step([np.zeros(4)], None, 1e-3)  # type: ignore[list-item, arg-type]
        assert events.doing == "train_step phase rl step 3 overflows 40" and not any(said) and now > 900.0
        assert "stands still" in passes(901) and "overflows 40" in passes(1)
    assert events.doing == ""
    events.close()


def with_neox(config: RunConfig, **keys: Any) -> RunConfig:
    return RunConfig(replace(config.neox, **keys), config.metarl)


def test_warm_start_then_v0_then_a_version_a_step_then_checkpoint_and_export(tmp_path: Path) -> None:
    story = Story()
    assert run(small_config(tmp_path, train_iters=2), story) == "finished"
    assert story.said == [
        *("hello sft 0 rl 0", "step", "sft 1", "step", "sft 2", "v0", "evaluate warmstart v0"),
        *("step", "rl 1", "v1", "step", "rl 2", "v2", "evaluate final v2", "save", "saved sft 2 rl 2", "save_hf", "done finished"),
    ]
    report = story.saved.pop("report")
    assert story.saved == {"sft_step": 2, "rl_step": 2, "feed": {"after": "rl 2"}}
    assert isinstance(report, dict) and (report["phase"], report["step"]) == ("rl", 2) and "loss" in str(report["metrics"])


@pytest.mark.parametrize(
    ("stop_at", "saved"),
    [
        ("sft 2", {"sft_step": 1, "rl_step": 0, "feed": {"after": "sft 1"}}),
        ("evaluate warmstart", {"sft_step": 2, "rl_step": 0, "feed": {"after": "sft 2"}}),
        ("rl 2", {"sft_step": 2, "rl_step": 1, "feed": {"after": "rl 1"}}),
        ("evaluate final", {"sft_step": 2, "rl_step": 3, "feed": {"after": "rl 3"}}),
    ],
)
def test_a_stopped_run_is_saved_where_it_is_and_goes_on_from_there(tmp_path: Path, stop_at: str, saved: dict[str, Json]) -> None:
    config, story = small_config(tmp_path), Story()
    assert run(config, story, WrittenFeed(story, stop_at)) == "stopped"
    told = f"saved sft {saved['sft_step']} rl {saved['rl_step']}"
    assert story.said[-3:] == ["save", told, "done stopped"] and "save_hf" not in story.said and saved.items() <= story.saved.items()
    before, story.said = [s for s in story.said if s.startswith(("sft", "rl"))], []
    assert run(config, story, resume=True) == "finished"
    again = [s for s in story.said if s.startswith(("sft", "rl"))]
    assert before + again == ["sft 1", "sft 2", "rl 1", "rl 2", "rl 3"], "each step once"
    assert story.said[:2] == ["load checkpoints", f"hello sft {saved['sft_step']} rl {saved['rl_step']}"]
    assert ("evaluate warmstart v0" in story.said) == (saved["rl_step"] == 0) and "evaluate final v3" in story.said
    assert "save_hf" in story.said


def test_checkpoints_every_n_steps_over_both_phases(tmp_path: Path) -> None:
    story = Story()
    run(with_neox(small_config(tmp_path, train_iters=4), checkpoint_factor=3), story)
    assert [story.said[i - 2 : i + 1] for i, s in enumerate(story.said) if s == "save"] == [["rl 1", "v1", "save"], ["rl 4", "v4", "save"]]


def test_a_full_disk_is_waited_for_and_no_checkpoint_is_told_before_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "DISK_S", 0.001)
    config, story = small_config(tmp_path, train_iters=1), Story()
    assert run(config, story, full=3) == "finished"
    assert story.said[-7:] == [*["save"] * 4, "saved sft 2 rl 1", "save_hf", "done finished"]
    waits = [event for event in read_events(small_paths(config).events) if event.name == "wait_disk"]
    assert len(waits) == 3 and waits[0].fields["directory"].endswith("checkpoints")


def test_a_disk_that_stays_full_ends_the_ranks_with_a_word(tmp_path: Path) -> None:
    story = Story()
    with pytest.raises(DiskStaysFullError, match=r"waited 0 s for room to save: no room on the disk of d; the run goes on from") as raised:
        run(small_config(tmp_path, train_iters=1, queue={"disk_full_s": 0.0}), story, full=1)
    assert exit_status(raised.value) == GIVES_UP, "a new start would wait again"
    assert not [said for said in story.said if said.startswith(("saved", "done"))]


def test_a_loaded_or_imported_model_is_v0_of_a_run_without_a_warm_start(tmp_path: Path) -> None:
    story = Story()
    story.saved = {"sft_step": 9, "rl_step": 9, "feed": {"of": "another run"}}
    run(with_neox(small_config(tmp_path, train_iters=1), load="/other/checkpoints"), story)
    assert story.said[:4] == ["load checkpoints", "hello sft 2 rl 0", "v0", "evaluate warmstart v0"]
    story = Story()
    config = small_config(tmp_path, train_iters=1, warmstart={"hf_checkpoint": "/other/model"})
    run(config, story)
    assert story.said[:3] == ["load_hf", "hello sft 2 rl 0", "v0"]
    run(config, story, resume=True)
    loads = [str(event.fields["directory"]) for event in read_events(small_paths(config).events) if event.name == "load"]
    assert loads[:2] == ["/other/checkpoints", "/other/model"] and loads[2].endswith("small/checkpoints"), "what beats and errors say then"


def test_the_reference_policy_is_v0_also_after_a_resume(tmp_path: Path) -> None:
    config, story = small_config(tmp_path, objective={"kl_coef": 0.1}), Story()
    run(config, story, WrittenFeed(story, "rl 2"))
    assert story.said.count("set_reference") == 1 and story.said.index("set_reference") < story.said.index("v0")
    assert story.said.count("logprobs reference") == 1
    story.said = []
    run(config, story, resume=True)
    assert "set_reference" not in story.said, "the checkpoint holds it; the resumed policy is another"


def test_fewer_publishes_than_steps_but_always_the_last(tmp_path: Path) -> None:
    story = Story()
    run(small_config(tmp_path, train_iters=5, weights={"publish_every": 2}, staleness={"admission_slack": 2}), story)
    assert [s for s in story.said if s.startswith("v")] == ["v0", "v2", "v4", "v5"]


def test_rollouts_only_publishes_and_never_steps(tmp_path: Path) -> None:
    story = Story()
    run(small_config(tmp_path, train_iters=2, warmstart={"steps": 0}, debug={"mode": "rollout_only"}), story)
    assert "step" not in story.said and [s for s in story.said if s.startswith("v")] == ["v0", "v1", "v2"]


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    story = Story()
    story.saved = {"epoch": 3}
    with pytest.raises(ConfigError, match="was not written by a run"):
        run(small_config(tmp_path), story, resume=True)


def test_training_on_recorded_batches_writes_metrics_and_status_and_stops_when_asked(tmp_path: Path) -> None:
    batches = tmp_path / "batches"
    for step in (1, 2, 3):
        record_batch(batches, "rl", step, [rollout_group(step, step - 1)])
    config = small_config(tmp_path, warmstart={"steps": 0}, debug={"mode": "train_only", "batches": str(batches)})
    paths, story = small_paths(config), Story()
    assert run(config, story, RecordedFeed(config, paths)) == "finished"
    rows = read_jsonl(paths.metrics)
    assert [(row["phase"], row["step"], row["version"], row["staleness_bound"]) for row in rows] == [("rl", s, s - 1, 2) for s in (1, 2, 3)]
    assert (read_status(paths.status).phase, read_status(paths.status).message) == ("report", "finished")
    assert "v0" not in story.said, "nobody to publish to"
    paths.stop.touch()
    story.saved = {"sft_step": 0, "rl_step": 1, "feed": {}}
    assert run(config, story, RecordedFeed(config, paths), resume=True) == "stopped"
    assert [row["step"] for row in read_jsonl(paths.metrics)] == [1], "what comes after the checkpoint is done again"


@pytest.mark.parametrize(("status", "said"), [(0, "last line\nat exit\n"), (3, "last line\nat exit\ntaken apart\n")])
def test_a_rank_leaves_with_its_status_and_every_word_and_is_taken_apart_only_where_it_failed(status: int, said: str) -> None:
    lines = [
        "import atexit",
        "from neox_rl.step.main import leave",
        "class Kept:",
        "    def __del__(self):",
        "        print('taken apart', flush=True)",
        "kept = Kept()",
        "atexit.register(print, 'at exit')",
        "print('last line')",
        f"leave({status})",
    ]
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (status, said), ended.stderr


@pytest.mark.parametrize(("given", "threads"), [({}, 1), ({"OMP_NUM_THREADS": "2"}, 2)])
def test_a_rank_without_a_gpu_that_another_launcher_started_has_one_math_thread(given: dict[str, str], threads: int) -> None:
    lines = [
        "import torch",
        "from neox_rl.config.load import load_config",
        "from neox_rl.config.machine import Machine",
        "from neox_rl.step.main import pin",
        "config = load_config(['configs/debug/fake_generator.yml'], ())",
        "pin(config, Machine(Machine.here().cores), 0)",
        "print(torch.get_num_threads())",
    ]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | given
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False, env=env)
    assert ended.stdout.split() == [str(threads)], ended.stderr
