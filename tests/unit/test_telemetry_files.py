"""What processes write while a run goes on: events, metrics, status, rollouts. Nothing is lost, nothing is half-read."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from synthetic_run import evaluation_rows, rl_row, rollout_row, write_run

from neox_rl.config.schema import LoggingConfig
from neox_rl.errors import ConfigError
from neox_rl.telemetry import events as events_module
from neox_rl.telemetry import rollouts
from neox_rl.telemetry.events import EventLog, read_events
from neox_rl.telemetry.jsonl import JsonlWriter, read_json, read_jsonl, write_json
from neox_rl.telemetry.metrics import MetricsWriter, scalars
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.sinks import check_logging
from neox_rl.telemetry.status import Status, read_status, write_status
from neox_rl.types import Finish, Problem, Reason, Role, Segment, Trace, Verdict


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


# --- events


def test_a_span_records_its_duration_its_fields_and_what_the_body_adds(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "trainer.jsonl", "trainer")
    with log.span("train_step", step=3) as fields:
        time.sleep(0.02)
        fields["tokens"] = 700
    log.instant("offered", version=3)
    log.counter("queue", ready=2, inflight=5)
    log.close()
    span, instant, counter = read_events(tmp_path)
    assert (span.process, span.name, span.fields) == ("trainer", "train_step", {"step": 3, "tokens": 700})
    assert 0.02e9 <= span.dur_ns < 60e9
    assert abs(span.t_ns - time.time_ns()) < 60e9
    assert (instant.kind, instant.dur_ns, counter.fields) == ("instant", 0, {"ready": 2, "inflight": 5})


def test_a_span_is_recorded_when_its_body_fails(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "a.jsonl", "a")
    with pytest.raises(RuntimeError), log.span("publish"):
        raise RuntimeError("no peer")
    log.close()
    assert [e.name for e in read_events(tmp_path)] == ["publish"]


@pytest.mark.parametrize("kind", ["span", "instant", "counter"])
def test_a_name_outside_the_vocabulary_is_refused(tmp_path: Path, kind: str) -> None:
    log = EventLog(tmp_path / "a.jsonl", "a")
    with pytest.raises(ValueError, match="not in the vocabulary"):
        if kind == "span":
            with log.span("tain_step"):
                pass
        else:
            getattr(log, kind)("tain_step")
    log.close()


def test_events_wait_in_memory_for_a_second_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(tmp_path / "a.jsonl", "a")
    log.instant("live", version=1)
    assert read_events(tmp_path) == []
    monkeypatch.setattr(events_module, "FLUSH_S", 0.0)
    log.instant("live", version=2)
    assert len(read_events(tmp_path)) == 2
    log.close()


@pytest.mark.parametrize("name", ["acked", "staged", "serving"])
def test_what_a_server_holds_is_on_the_disk_before_anybody_acts_on_it(tmp_path: Path, name: str) -> None:
    """And survives the kill -9 of who wrote it, with all that was told before."""
    log = EventLog(tmp_path / "a.jsonl", "a")
    log.instant("offered", version=1)
    log.instant(name, version=1, digest="d")
    assert [event.name for event in read_events(tmp_path)] == ["offered", name]
    log.close()


def test_a_process_that_ends_without_closing_loses_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from neox_rl.telemetry.events import EventLog\n"
        "EventLog(Path(sys.argv[1]), 'p').instant('live', version=1)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "p.jsonl")], check=True, timeout=240)
    assert [e.fields for e in read_events(tmp_path)] == [{"version": 1}]


def test_a_forked_child_does_not_write_its_parents_events_again(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "a.jsonl", "a")
    log.instant("live", version=1)
    child = os.fork()
    if child == 0:
        log.flush()
        os._exit(0)
    os.waitpid(child, 0)
    log.close()
    assert len(read_events(tmp_path)) == 1


def open_files() -> Iterator[Path]:
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            yield link.readlink()


def test_logs_of_servers_that_come_and_go_hold_no_descriptor_and_a_late_event_is_not_lost(tmp_path: Path) -> None:
    logs = [EventLog(tmp_path / f"joined-{n}.jsonl", f"joined-{n}") for n in range(50)]
    for log in logs:
        log.instant("left")
        log.close()
    logs[7].instant("staged", version=1)
    assert not [path for path in open_files() if path.is_relative_to(tmp_path)]
    assert sorted(e.process for e in read_events(tmp_path)) == sorted([*(log.process for log in logs), "joined-7"])


def test_threads_share_a_log(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "a.jsonl", "a")
    threads = [threading.Thread(target=lambda: [log.instant("admitted") for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    log.close()
    assert len(read_events(tmp_path)) == 800


@pytest.mark.parametrize(
    "torn", ['{"process":"a","kind":"span","na', '{"process":1}', "[1]", "\x00\x00", '{"process":"a","kind":"spin","name":"x","t_ns":1}']
)
def test_a_torn_or_strange_line_costs_only_itself(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "a.jsonl"
    first = EventLog(path, "a")
    first.instant("live", version=1)
    first.close()
    with path.open("a") as file:
        file.write(torn)
    again = EventLog(path, "a")
    again.instant("live", version=2)
    again.close()
    assert [e.fields["version"] for e in read_events(tmp_path)] == [1, 2]


# --- rows


def test_a_row_is_on_disk_when_write_returns_and_nan_becomes_null_with_a_count(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write({"step": 1, "loss": math.nan, "search": {"a": math.inf, "b": 0.5}, "list": [1.0, -math.inf]})
    row = read_jsonl(tmp_path / "m.jsonl")[0]
    assert row == {"step": 1, "loss": None, "search": {"a": None, "b": 0.5}, "list": [1.0, None], "nonfinite": 3}


def test_a_resumed_writer_does_not_lose_its_first_row_to_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step":1}\n{"step":2,"lo')
    writer = JsonlWriter(path)
    writer.write({"step": 2})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_json_files_are_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    stop = threading.Event()

    def write() -> None:
        n = 0
        while not stop.is_set():
            write_json(path, {"n": n, "pad": "x" * 20_000})
            n += 1

    write_json(path, {"n": 0, "pad": ""})
    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(200):
            assert read_json(path).keys() == {"n", "pad"}
    finally:
        stop.set()
        thread.join(30)
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


def test_status_comes_back_as_written_and_a_missing_one_is_starting(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    assert read_status(path) == Status(phase="starting")
    status = Status(phase="rl", step=3, total_steps=9, reward=0.5, staleness_max=2, bound=2, message="é <b>")
    write_status(path, status)
    assert read_status(path) == status


def test_a_phase_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="warmstart"):
        Status(phase="warm-start")


# --- metrics and their sinks


def test_scalars_flatten_nested_numbers_and_leave_out_text_and_null() -> None:
    row = {"step": 1, "time": 2.0, "phase": "rl", "loss": 0.5, "none": None, "search": {"a": 1, "step": 3}}
    assert scalars(row) == {"loss": 0.5, "search/a": 1.0, "search/step": 3.0}


def test_tensorboard_files_hold_every_finite_number(tmp_path: Path, rng: random.Random) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    paths = RunPaths.of(tmp_path / "run").create()
    with MetricsWriter(paths, LoggingConfig(tensorboard=True)) as writer:
        for step in (1, 2):
            writer.step({**rl_row(step, 2, rng), "loss": math.nan})
        writer.evaluation(evaluation_rows("final", 2, 1.0, rng, clusters=3)[0])
    found = EventAccumulator(str(paths.tensorboard))
    found.Reload()
    tags = found.Tags()["scalars"]
    assert {"rl/accuracy", "rl/staleness_hist/1", "heldout_greedy/accuracy/mean", "heldout_greedy/search/mean_nodes"} <= set(tags)
    assert "rl/loss" not in tags
    assert [e.step for e in found.Scalars("rl/accuracy")] == [1, 2]
    assert found.Scalars("rl/accuracy")[1].value == pytest.approx(read_jsonl(paths.metrics)[1]["accuracy"])


def test_wandb_logs_offline_without_an_account(tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR"):  # whoever runs the tests may have settings of his own
        monkeypatch.setenv(name, str(tmp_path / "home"))
    paths = RunPaths.of(tmp_path / "run").create()
    with MetricsWriter(paths, LoggingConfig(wandb=True), {"seed": 1}) as writer:
        writer.step(rl_row(1, 2, rng))
    files = list((paths.root / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1
    # Another process of wandb's writes the file, and may do so after ``finish`` returned.
    deadline = time.monotonic() + 240
    while b"rl/reward_mean" not in files[0].read_bytes():
        assert time.monotonic() < deadline, "wandb did not write the row within 240 s"
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_writer_that_is_not_installed_is_an_error_before_the_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module = {"tensorboard": "tensorboard.summary.writer.event_file_writer", "wandb": "wandb"}[name]
    monkeypatch.setitem(sys.modules, module, None)
    check_logging(LoggingConfig())
    with pytest.raises(ConfigError, match=f"metarl.logging.{name}: true.*pip install {name}"):
        check_logging(LoggingConfig(**{name: True}))


# --- rollouts


def test_every_nth_group_is_recorded_and_none_with_zero(tmp_path: Path) -> None:
    recorder = rollouts.RolloutRecorder(tmp_path / "r.jsonl", every=50)
    assert [t for t in range(120) if recorder.wants(t)] == [0, 50, 100]
    recorder.close()
    never = rollouts.RolloutRecorder(tmp_path / "r.jsonl", every=0)
    assert not any(never.wants(t) for t in range(100))
    never.close()


def test_a_policy_that_babbles_does_not_fill_the_disk(tmp_path: Path) -> None:
    problem = Problem("p", "countdown", "numbers 3 5 target 8 search", "", "c", {"numbers": [3, 5], "target": 8, "max_value": 60})
    row = rollout_row(problem, "5 +3 =8 low " * 5000, label="train", correct=False, versions=[(3, 0, 20000)])
    recorder = rollouts.RolloutRecorder(tmp_path / "r.jsonl", every=1)
    recorder.record(row)
    recorder.close()
    kept = read_jsonl(tmp_path / "r.jsonl")[0]
    assert len(kept["text"]) == rollouts.MAX_TEXT
    assert len(kept["lines"]) == rollouts.MAX_LINES + 1
    assert kept["lines"][-1]["text"] == "… 4600 more lines"
    assert kept["num_tokens"] == 20000


def test_the_row_of_a_rollout_counts_sampled_tokens_and_joins_spans_of_one_version() -> None:
    problem = Problem("p", "countdown", "numbers 3 5 target 8 search", "", "c")
    segments = (
        Segment((1, 2, 3), Role.PROMPT),
        Segment((4, 5), Role.THINK, (-0.1, -0.1), version=6, mask=1.0),
        Segment((6,), Role.BACK, (-0.1,), version=6, mask=1.0),
        Segment((9, 9), Role.ENV),
        Segment((7, 8), Role.SOLUTION, (-0.1, -0.1), version=7, mask=1.0),
    )
    trace = Trace("g000017/r3", "p", segments, 1.0, Finish.STOP, Verdict(True, "8", Reason.MATCH, 0.2))
    row = rollouts.rollout_row(trace, problem, "5 +3 =8 goal", [], label="train", step=7)
    assert row["num_tokens"] == 5
    assert row["versions"] == [{"version": 6, "start": 0, "end": 3}, {"version": 7, "start": 3, "end": 5}]
    assert (row["reason"], row["correct"], row["finish"]) == ("match", True, "stop")


# --- the timeline


def test_the_timeline_has_a_group_a_process_and_keeps_overlapping_spans_apart(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", rl_steps=3, sft_steps=1)
    tool = Path(__file__).parents[2] / "tools" / "timeline.py"
    environment = os.environ | {"PYTHONPATH": str(tool.parents[1])}
    subprocess.run([sys.executable, str(tool), str(paths.root)], check=True, timeout=240, env=environment, stdout=subprocess.DEVNULL)
    rows = json.loads(paths.timeline.read_text())["traceEvents"]
    assert [row["args"]["name"] for row in rows if row["ph"] == "M"] == ["orchestrator", "server-0", "trainer-0"]
    spans = [row for row in rows if row["ph"] == "X"]
    assert len(spans) == sum(e.kind == "span" for e in read_events(paths.events))
    for lane in {(row["pid"], row["tid"]) for row in spans}:
        mine = sorted((row["ts"], row["ts"] + row["dur"]) for row in spans if (row["pid"], row["tid"]) == lane)
        assert all(end <= start + 1e-6 for (_, end), (start, _) in pairwise(mine))
