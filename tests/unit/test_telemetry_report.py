"""What a person reads of a run: the summary and the report."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import START_NS, rollout_row, write_run

from neox_rl.telemetry.charts import charts
from neox_rl.telemetry.events import Event, EventLog, parts_of, read_events
from neox_rl.telemetry.faults import faults
from neox_rl.telemetry.jsonl import JsonlWriter, read_jsonl
from neox_rl.telemetry.layout import choose_pairs, lay_out
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.report import main, write_report
from neox_rl.telemetry.rundata import load_run
from neox_rl.telemetry.shares import time_shares
from neox_rl.telemetry.status import Status, write_status
from neox_rl.telemetry.summary import build_summary, write_summary
from neox_rl.telemetry.table import before_after
from neox_rl.types import Problem

REQUIRED = (
    "heldout_accuracy_warmstart",
    "heldout_accuracy_final",
    "steps",
    "max_staleness_bound",
    "max_staleness_seen",
    "rollouts_dropped",
    "rollouts_trained_twice",
    "tokens_generated",
    "tokens_trained",
    "tokens_masked_stale",
    "mismatch_kl_max",
    "wall_s",
    "trainer_idle_frac",
    "weight_updates",
    "weight_pause_s_median",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    paths = write_run(tmp_path_factory.mktemp("runs") / "finished")
    write_summary(paths.root)
    return paths


# --- the summary


def test_the_summary_of_a_finished_run_knows_every_number(finished: RunPaths) -> None:
    summary: Any = json.loads(finished.summary.read_text())
    assert [key for key in REQUIRED if summary[key] is None] == []
    assert summary["heldout_accuracy_final"].keys() == {"mean", "ci95_low", "ci95_high", "n"}
    assert summary["heldout_accuracy_final"] == summary["heldout_accuracy_final_greedy"] != summary["heldout_accuracy_final_sampled"]
    rl = [row for row in read_jsonl(finished.metrics) if row["phase"] == "rl"]
    assert summary["steps"] == len(rl) == 120
    assert summary["tokens_trained"] == sum(row["tokens_trained"] for row in rl)
    assert summary["tokens_generated"] == rl[-1]["tokens_generated"]
    assert (summary["max_staleness_seen"], summary["max_staleness_bound"]) == (2, 2)
    assert summary["weight_updates"] == 120
    assert 0.018 <= summary["weight_pause_s_median"] <= 0.027
    waited = sum(row["wait_s"] for row in rl)
    assert summary["trainer_idle_frac"] == pytest.approx(waited / (waited + 120 * 2.75))
    gain = summary["heldout_accuracy_gain_greedy"]
    assert gain["mean"] == pytest.approx(summary["heldout_accuracy_final"]["mean"] - summary["heldout_accuracy_warmstart"]["mean"])


def test_what_was_not_measured_is_null_and_not_zero(tmp_path: Path) -> None:
    summary = build_summary(load_run(write_run(tmp_path / "early", rl_steps=0, sft_steps=3, finished=False).root))
    assert summary["steps"] == 0
    unknown = (
        "heldout_accuracy_final",
        "max_staleness_seen",
        "rollouts_dropped",
        "tokens_generated",
        "mismatch_kl_max",
        "weight_pause_s_median",
    )
    assert [summary[key] for key in unknown] == [None] * len(unknown)


def test_a_step_trained_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", rl_steps=4, sft_steps=1)
    again = {**read_jsonl(paths.metrics)[-1], "tokens_trained": 1}
    writer = JsonlWriter(paths.metrics)
    writer.write(again)
    assert build_summary(load_run(paths.root))["tokens_trained"] == 3 * 7000 + 1


# --- where the time went


def test_every_moment_of_a_process_counts_once(finished: RunPaths) -> None:
    run = load_run(finished.root)
    shares = time_shares(run.events)
    assert shares.keys() == {"trainer-0", "server-0", "orchestrator"}
    for found in shares.values():
        assert sum(found.values()) == pytest.approx(run.wall_s)


def test_of_overlapping_spans_the_rarer_one_counts() -> None:
    def span(name: str, start: float, seconds: float) -> Event:
        return Event("p", "span", name, START_NS + int(start * 1e9), int(seconds * 1e9))

    found = time_shares([span("generating", 0, 10), span("generating", 2, 6), span("paused", 4, 1), span("generating", 12, 1)])
    assert found == {"p": {"generating": 10.0, "paused": 1.0, "idle": 2.0}}


def started(paths: RunPaths, hour: int, launched: bool = True) -> None:
    """Ten seconds of a run, ``hour`` hours in."""
    t = START_NS + hour * 3600 * 10**9
    rows = [("launcher", "start_ranks", 0, 4), ("orchestrator", "start_servers", 1, 3)]
    rows += [("trainer-0", "build", 2, 2), ("trainer-0", "train_step", 5, 5)]
    for process, name, start, seconds in rows[0 if launched else 1 :]:
        log = EventLog(paths.event_log(process), process)
        log.add_span(name, t + start * 10**9, seconds * 10**9)
        log.close()


@pytest.mark.parametrize("killed_early", [0, 1, 2])
def test_the_time_between_a_stop_and_a_resume_is_not_time_of_the_run(tmp_path: Path, killed_early: int) -> None:
    paths = RunPaths.of(tmp_path).create()
    for hour in range(4):
        started(paths, hour, launched=hour != killed_early)
    run = load_run(paths.root)
    assert run.wall_s == 39.0, "a part whose launcher left no event begins a second later"
    shares = time_shares(run.events)["trainer-0"]
    assert shares == {"build": 8.0, "train_step": 20.0, "idle": 11.0}


# --- rollouts for a reader


def line(depth: int, text: str, kind: str, wrong: bool = False) -> dict[str, Any]:
    return {"depth": depth, "text": text, "kind": kind, "wrong": wrong}


def test_the_path_to_the_goal_stands_out_from_dead_ends_and_wrong_steps() -> None:
    search = [
        line(0, "3 *5 =15", "step"),
        line(1, "15 +7 =22 low", "dead_end"),
        line(1, "15 -7 =9 low", "dead_end", wrong=True),
        line(1, "back", "back"),
        line(0, "7 *3 =21", "step"),
        line(1, "21 -5 =16 low", "dead_end"),
        line(1, "21 +5 =26 goal", "goal"),
        line(1, "( 7 * 3 ) + 5", "solution"),
    ]
    looks = [shown.look for shown in lay_out(search, correct=True)]
    assert looks == ["dead", "dead", "wrong", "dead", "path", "dead", "goal", "solution"]
    assert lay_out(search, correct=False)[-1].look == "wrong"


def test_a_goal_below_a_wrong_step_is_no_goal() -> None:
    looks = [shown.look for shown in lay_out([line(0, "7 *3 =26", "step", wrong=True), line(1, "26 +0 =26 goal", "goal")], correct=False)]
    assert looks == ["wrong", "dead"]


def test_an_unsolved_problem_is_shown_beside_the_improved_ones(finished: RunPaths) -> None:
    pairs = choose_pairs(read_jsonl(finished.rollouts))
    assert pairs[0].heading == "Solved only after RL"
    assert pairs[-1].heading in ("Not solved", "Solved only before RL")
    assert len(pairs) == 3


# --- the report


class Tags(HTMLParser):
    """Collects tags and the resources they would load."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "br", "hr"):
            self.open.append(tag)
        self.loads += [v for k, v in attrs if v and k in ("src", "href", "xlink:href", "data") and not v.startswith("#")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def test_the_report_is_one_small_file_that_loads_nothing(finished: RunPaths) -> None:
    page = write_report(finished.root).read_text(encoding="utf-8")
    tags = parse(page)
    assert tags.loads == []
    assert "script" not in tags.seen
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert tags.seen.count("svg") == 8
    assert len(page) < 1_000_000


def test_the_report_shows_the_run_from_gain_to_configuration(finished: RunPaths) -> None:
    page = write_report(finished.root).read_text(encoding="utf-8")
    summary = json.loads(finished.summary.read_text())
    for text in (
        f"{100 * summary['heldout_accuracy_final']['mean']:.1f}",
        "2 of 2", "7 min 18 s", "Wrong steps", "Solved only after RL", "numbers 3 5 7 target 26 search", "trainer-0", "num_layers: 3",
        "torch", "by v40",
    ):  # fmt: skip
        assert text in page, text
    assert "not finished" not in page
    assert "failed" not in page


def test_a_reward_that_nobody_verified_is_in_nats(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", sft_steps=3, rl_steps=5)
    assert charts(load_run(paths.root))[0].title == "Reward and training accuracy"
    rows = [{name: value for name, value in row.items() if name != "accuracy"} for row in read_jsonl(paths.metrics)]
    paths.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = charts(load_run(paths.root))[0]
    assert reward.title == "Reward" and "reward (nats)" in reward.svg and "correct" not in reward.svg


def test_what_a_model_writes_stays_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}\x00</div>"
    paths = write_run(tmp_path / "<b>run", rl_steps=2, sft_steps=2)
    problem = Problem("evil", "countdown", evil, "", "c", {"numbers": [3, 5], "target": 8, "max_value": 60})
    writer = JsonlWriter(paths.rollouts)
    for label in ("warmstart", "final"):
        row = rollout_row(problem, evil, label=label, correct=label == "final", versions=[(0, 0, 3)])
        writer.write({**row, "reason": evil, "lines": [] if label == "final" else [{**line(-5, evil, evil), "note": evil}]})
    write_status(paths.status, Status(phase="failed", message=evil))
    paths.config.write_text(f"name: {evil}")
    page = write_report(paths.root).read_text(encoding="utf-8")
    tags = parse(page)
    assert not {"script", "img"} & set(tags.seen)
    assert tags.loads == []
    assert page.count("&lt;script&gt;alert(1)") >= 6
    assert "{{ 7*7 }}" in page


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"rl_steps": 0, "sft_steps": 0}, "after 0 warm-start steps"),
        ({"rl_steps": 0, "sft_steps": 5}, "after 5 warm-start"),
        ({"rl_steps": 1}, "and 1 RL steps"),
    ],
)
def test_a_run_that_failed_early_says_so_and_shows_what_there_is(tmp_path: Path, shape: dict[str, int], says: str) -> None:
    paths = write_run(tmp_path / "run", finished=False, **shape)
    page = write_report(paths.root).read_text(encoding="utf-8")
    parse(page)
    assert "This run failed" in page
    assert says in page
    assert "server-0 ended with status -9" in page


def test_an_empty_run_directory_still_makes_a_page_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    parse(write_report(tmp_path).read_text(encoding="utf-8"))
    with pytest.raises(FileNotFoundError, match="no run directory"):
        write_report(tmp_path / "nowhere")


def test_numbers_that_were_not_finite_do_not_break_the_page(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", rl_steps=30, sft_steps=2)
    rows = [
        {**row, **dict.fromkeys(("reward_mean", "mismatch_kl", "ess", "loss"))} if row["step"] % 2 else row
        for row in read_jsonl(paths.metrics)
    ]
    paths.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert parse(write_report(paths.root).read_text(encoding="utf-8")).seen.count("svg") == 8


def test_the_report_can_be_made_again_from_the_command_line(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", rl_steps=2, sft_steps=2)
    done = subprocess.run(
        [sys.executable, "-m", "neox_rl.telemetry.report", str(paths.root)],
        check=True, timeout=240, capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.strip() == str(paths.report)
    assert paths.report.exists()


def test_a_report_of_a_run_that_is_not_there_says_so_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'nowhere'} is no run directory; give the directory that holds metrics.jsonl\n"


def test_faults_are_listed_with_what_was_lost_and_when_it_was_back(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", rl_steps=2, sft_steps=2)
    launcher, server = EventLog(paths.event_log("launcher"), "launcher"), EventLog(paths.event_log("server-0"), "server-0")
    launcher.instant("died", process="server-0", why="was killed by SIGKILL", doing="generating <b>")
    launcher.instant("restarted", process="server-0", restarts=1)
    server.instant("suspended", why="silent")
    server.instant("serving", version=3)
    launcher.instant("died", process="trainer", why="lost trainer-1", doing="")
    launcher.add_span("heal", time.time_ns(), 4_200_000_000, process="trainer")
    launcher.instant("restarted", process="trainer", restarts=1)
    launcher.close()
    server.close()
    summary = build_summary(load_run(paths.root))
    assert summary["restarts"] == {"server": 1, "orchestrator": 0, "trainer": 1}
    events = read_events(paths.events)
    assert [(f.process, f.what, f.healed_s is not None) for f in faults(events)] == [
        ("server-0", "was killed by SIGKILL, at generating <b>", True),
        ("server-0", "suspended: silent", False),
        ("trainer", "lost trainer-1", True),
    ]
    page = write_report(paths.root).read_text(encoding="utf-8")
    parse(page)
    assert "What failed on the way" in page and "generating &lt;b&gt;" in page and "4.2 s" in page


def test_a_process_that_is_started_again_begins_no_new_part_of_the_run() -> None:
    def at(second: int, process: str, name: str) -> Event:
        return Event(process, "instant" if name == "restarted" else "span", name, second * 10**9, 10**9)

    healed = [at(0, "launcher", "start_ranks"), at(1, "trainer-0", "build"), at(5, "launcher", "restarted"), at(6, "trainer-0", "build")]
    assert len(parts_of(healed)) == 1
    assert len(parts_of([*healed[:2], healed[3]])) == 2


def test_a_run_without_a_warm_start_is_told_as_one_before_rl_and_after_it(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "cold", sft_steps=0, rl_steps=20)
    page = write_report(paths.root).read_text()
    assert "The model practiced on its own attempts for 20 steps" in page and "greedy before RL" in re.sub(
        r"<[^>]+>|\s+", " ", page
    ).replace("  ", " ")
    assert "Before RL" in page and "fter the warm start" not in page
    assert [str(column.header) for column in before_after(build_summary(load_run(paths.root))).columns] == [
        "",
        "before RL",
        "after RL",
        "difference",
    ]


def test_a_run_that_stepped_nothing_trained_nothing(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "rollouts", sft_steps=0, rl_steps=20)
    rows = [json.loads(line) | {"grad_norm": 0.0, "loss": 0.0, "lr": 0.0} for line in paths.metrics.read_text().splitlines()]
    paths.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(paths.root).read_text()
    assert "The rollouts of 20 steps were made, and no weights were changed." in page and "none trained" in page


def test_given_solutions_that_are_trained_too_are_named(tmp_path: Path) -> None:
    """More tokens are trained than the policies wrote."""
    paths = write_run(tmp_path / "given", sft_steps=0, rl_steps=20)
    rows = [json.loads(line) | {"tokens_generated": 10} for line in paths.metrics.read_text().splitlines()]
    paths.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "trained by RL, given solutions among them" in write_report(paths.root).read_text()


def test_a_run_of_searches_shows_what_they_found(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "searches", rl_steps=20)
    rows = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    for row in rows:
        if row["phase"] == "rl":
            row["searched"] = {"solved_frac": 0.5, "traces": 9, "steps": 9, "tokens_paid": 90 * (row["step"] > 1), "tokens_trained": 45}
            row["searched"] |= {"prefix_cache_hit_rate": row["step"] / 25} if row["step"] < 20 else {}
            row["preferred_frac"] = 0.75
    paths.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(paths.root).read_text()
    assert "practiced on searches under its own steps" in page and "What searches found" in page
    assert build_summary(load_run(paths.root))["prefix_cache_hit_rate"] == 19 / 25 and "Prefix cache" in page and "76.0 %" in page
    assert {">solved<", ">trained<", ">preferred<"} <= set(re.findall(r">(?:solved|trained|preferred)<", page))
