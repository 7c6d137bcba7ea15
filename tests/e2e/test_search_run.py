"""Whole runs whose rollouts are searches, with the scripted generator: steps with credit of their own or in pairs, and searches told."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from neox_rl.queue.answers import Answer, answer_of
from neox_rl.queue.journal import read_journal
from neox_rl.telemetry.jsonl import read_jsonl
from tests.e2e.runs import ROOT, Run

SHORT = ("metarl.warmstart.steps=2", "metarl.evaluation.num_problems=4", "metarl.rollout.record_every=1")
PAIRS = ("metarl.search.trains=preferences", "metarl.objective.loss=dpo", "metarl.objective.aggregation=sequence_mean")
TOLD = ("metarl.search.trains=traces", "metarl.objective.loss=sft", "metarl.search.strategy=dfs", "metarl.search.nodes=30")


def audited(run: Run) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "audit.py", run.paths.root], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("settings", [(), TOLD, PAIRS], ids=["steps", "told", "preferences"])
def test_searches_are_generated_queued_and_trained_and_the_books_are_right(tmp_path: Path, settings: tuple[str, ...]) -> None:
    run = Run(tmp_path, "whole", "train_iters=6", *SHORT, *settings, config="search")
    assert run.wait() == 0, run.said()
    rows = [row for row in run.metrics() if row["phase"] == "rl"]
    assert [row["step"] for row in rows] == list(range(1, 7)) and run.gone()
    assert all(row["searched"]["tokens_trained"] == row["tokens_trained"] + row["tokens_masked_stale"] for row in rows)
    assert sum(row["tokens_trained"] for row in rows) > 0 and max(row["staleness_max"] for row in rows) <= 2
    assert any(row["searched"]["solved_frac"] > 0 for row in rows)
    assert all(("accuracy" in row) == ("reward_mean" in row) == (settings == TOLD) for row in rows), "only a told search is one trace"
    if settings == PAIRS:  # a step whose trees have no two steps of unlike credit has no pair
        assert sum(row["pairs"] for row in rows) > 0 and all(0 <= row["preferred_frac"] <= 1 for row in rows if row["pairs"] > 0)
    trained = [row for row in read_jsonl(run.paths.rollouts) if row["label"] == "train"]
    assert trained and max(line["depth"] for row in trained for line in row["lines"]) >= 1
    assert "VIOLATED" not in audited(run)


@pytest.mark.parametrize(("kind", "baseline"), [("solution", "mean"), ("gain", "none")])
def test_a_solution_s_likelihood_is_a_reward_and_its_tokens_are_in_the_books(tmp_path: Path, kind: str, baseline: str) -> None:
    """The scripted policy finds every token as likely as not, so a reward is the solution's tokens times log 1/2, whatever the search:
    nothing is gained by it."""
    settings = (f"metarl.reward.kind={kind}", f"metarl.objective.baseline={baseline}")
    run = Run(tmp_path, "likely", "train_iters=3", *SHORT, *settings)
    assert run.wait() == 0, run.said()
    rows = [row for row in run.metrics() if row["phase"] == "rl"]
    assert [row["step"] for row in rows] == [1, 2, 3] and sum(row["tokens_trained"] for row in rows) > 0
    assert all((row["reward_mean"] < 5 * math.log(0.5)) if kind == "solution" else row["reward_mean"] == 0 for row in rows)
    trained = [row for row in read_jsonl(run.paths.rollouts) if row["label"] == "train"]
    assert trained and all("solution" in row["text"] and not row["correct"] for row in trained)
    assert "VIOLATED" not in audited(run)


def answers_of(run: Run) -> tuple[dict[int, list[Answer]], dict[int, list[Answer]], set[int]]:
    """Ticket -> what was written down for its unfinished group by the first orchestrator and by those after it, of the tickets that the
    first one left open; and which of them the others finished."""
    lives: list[dict[int, list[Answer]]] = [{}, {}]
    done: list[set[int]] = [set(), set()]
    life = -1
    for record in read_journal(run.paths.journal).records:
        life += record.kind == "opened"
        ticket = record.meta.get("ticket", -1)
        if record.kind == "span":
            lives[min(life, 1)].setdefault(ticket, []).append(answer_of(record.body))
        elif record.kind in ("group", "refused"):
            done[min(life, 1)].add(ticket)
    left = {ticket: answers for ticket, answers in lives[0].items() if ticket not in done[0]}
    return left, lives[1], done[1] & left.keys()


def written(answers: dict[int, list[Answer]]) -> int:
    return sum(map(len, answers.values()))


def kill_within_searches(run: Run) -> None:
    """``kill -9`` of the orchestrator at a moment when its journal holds a few answers of open searches.

    It stands still while the journal is read: a search takes less than a second, so that one found open in a running process may be over
    by the time of the kill.
    """
    orchestrator = run.one("neox_rl.run.orchestrator")

    def searching() -> bool:
        orchestrator.suspend()
        if written(answers_of(run)[0]) > 3:
            orchestrator.kill()
            return True
        orchestrator.resume()
        return False

    run.until(searching, "a few answers of open searches were written down")


def test_an_orchestrator_that_dies_searches_its_open_tickets_again_and_asks_for_nothing_that_is_written_down(tmp_path: Path) -> None:
    run = Run(tmp_path, "killed", "train_iters=20", "checkpoint_factor=100", "metarl.scripted.token_s=0.01", *SHORT, config="search")
    run.until_step("rl", 3)
    kill_within_searches(run)
    run.until(lambda: (found := answers_of(run))[0].keys() <= found[2], "the open tickets were searched")
    before, after, _ = answers_of(run)
    assert written(before) > 3, "it died in the middle of searches"
    for ticket, answers in before.items():
        places = [{(a.asked, a.first, a.start) for a in some} for some in (answers, after.get(ticket, []))]
        assert not places[0] & places[1], "the first step of each search among them"
    assert run.wait() == 0, run.said()
    assert [row["step"] for row in run.metrics() if row["phase"] == "rl"] == list(range(1, 21))
    assert "VIOLATED" not in audited(run)
