"""Damage in the midst of a journal: whichever record it takes, what is written for people stays, and every ticket is trained once.

The small run of ``test_recovery_stories``, whose trainer says here all that the real loop says, and hears what the socket would tell it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from neox_rl.ages import count_ages, token_ages
from neox_rl.errors import JournalError
from neox_rl.queue.book import Book
from neox_rl.queue.records import Record
from neox_rl.queue.wire_messages import Phase
from neox_rl.run.audit import Audit, Rule
from neox_rl.run.comeback import lost_batch
from neox_rl.run.orchestrator import Orchestrator
from neox_rl.telemetry.jsonl import read_jsonl
from tests.unit import test_recovery_stories as stories
from tests.unit.test_recovery_stories import SAVE_EVERY, SFT, STEPS, B, Disk, Policy, Trainer, World, check, live_on

LABELS = ["warmstart", "final"]


@pytest.fixture(autouse=True)
def damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stories, "Book", partial(Book, has_holes=True))


class Recorded(World):
    """Every rollout is recorded, and servers hold what the trainer publishes also where the orchestrator's journal does not say so."""

    def __init__(self, root: Path, seed: int, faithful: bool = True) -> None:
        super().__init__(root, seed, faithful)
        rollout = replace(self.config.metarl.rollout, record_every=1)
        self.config = replace(self.config, metarl=replace(self.config.metarl, rollout=rollout))
        self.follows = False
        """An orchestrator takes over from another, while trainer and servers live."""

    def policy(self) -> Policy:
        return Served(self)


class Served(Policy):
    async def run(self, on_live: Any) -> None:
        assert isinstance(self.world, Recorded)
        if self.world.follows and self.offered:
            self.promise(max(self.offered))
        await super().run(on_live)


class Loop(Trainer):
    """``neox_rl/step/loop.py`` without an engine."""

    world: Recorded

    def _messages(self) -> Iterator[tuple[str, dict[str, Any]]]:
        state = self.state | {"sft_step": self.sft, "rl_step": self.rl}
        yield "hello", {"session": self.session, "world": 1, "pid": 1, "attempt": self.attempt, "state": state}
        for step in range(self.sft + 1, SFT + 1):
            yield from self._step(Phase.SFT, step)
        yield "published", self._publish()
        if self.rl == 0:
            yield "evaluate", {"label": "warmstart", "version": 0}
        for step in range(self.rl + 1, STEPS + 1):
            yield from self._step(Phase.RL, step)
            yield "published", self._publish()
            if step % SAVE_EVERY == 0:
                yield self._save()
        yield "evaluate", {"label": "final", "version": STEPS}
        yield self._save()
        yield "done", {"reason": "finished"}

    def _step(self, phase: Phase, step: int) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "next", {"phase": phase, "step": step}
        self._train(phase.value, step)
        metrics: dict[str, Any] = {"loss": 1.0}
        if phase is Phase.RL:
            traces = [trace for group in self.trained["rl", step] for trace in group.traces]
            ages = count_ages(token_ages(trace, step) for trace in traces)
            metrics |= {"staleness_hist": {str(age): tokens for age, tokens in ages.items()}, "staleness_max": max(ages)}
            metrics |= {"tokens_trained": sum(ages.values()), "tokens_masked_stale": 0}
        yield "report", {"phase": phase, "step": step, "metrics": metrics}

    def _save(self) -> tuple[str, dict[str, Any]]:
        keys = {"sft": self.sft, "rl": self.rl, "weights": self.weights, "state": self.state}
        self.checkpoint = keys | {"trained": dict(self.trained), "digests": dict(self.digests)}
        self.world.saved.append(self.checkpoint)
        return "checkpoint", {"sft_step": self.sft, "rl_step": self.rl}

    async def talk(self, orchestrator: Orchestrator, policy: Policy) -> None:
        """Raises JournalError where ``ExperienceServer`` refuses: a session that it does not know, or a message that nobody can repeat."""
        history = orchestrator._book.history
        known = history.session == self.session
        since = self.unacked[0][0] if self.unacked else self.id + 1
        if (known and lost_batch(history)) or since > (history.last if known else 0) + 1:
            while self.world.follows and policy.live < max(policy.offered, default=policy.live):
                await asyncio.sleep(0)  # the servers may be faster than the trainer's next word
            raise JournalError(lost_batch(history) or "the trainer cannot repeat what the journal lost")
        await super().talk(orchestrator, policy)


def interrupted(world: Recorded, at: int | None) -> tuple[Loop, list[Record]]:
    """The first orchestrator dies at its ``at``-th record, or at the end with its last answer; and what its successor finds."""
    trainer, disk = Loop(world, 0, None), Disk([], at, world.rng)
    world.follows = False
    with contextlib.suppress(ExceptionGroup):
        asyncio.run(live_on(world, trainer, disk))
    return trainer, disk.records


def follow(world: Recorded, trainer: Loop, records: Sequence[Record]) -> list[Record]:
    """The next orchestrator takes over, to the end of the run."""
    world.follows = True
    disk = Disk(records, None, world.rng)
    asyncio.run(live_on(world, trainer, disk))
    return disk.records


def check_rows(world: World, whole: bool = True) -> None:
    assert [row["label"] for row in read_jsonl(world.paths.evaluations)] == LABELS
    rollouts = [(row["label"], row["id"]) for row in read_jsonl(world.paths.rollouts)]
    assert [label for label, _ in rollouts if label != "train"] == LABELS
    if whole:
        assert {id for label, id in rollouts if label == "train"} == {f"g{ticket:06d}/r0" for ticket in range(B * STEPS)}


@pytest.mark.parametrize("kind", ["reported", "evaluated"])
def test_what_was_written_for_people_outlives_the_record_that_says_so(tmp_path: Path, kind: str) -> None:
    """Each but the last: of that one the trainer's next word is the same as if it had never been."""
    at = 30
    while True:
        world = Recorded(tmp_path / f"{at}", at)
        trainer, records = interrupted(world, at)
        told = [i for i, record in enumerate(records) if record.kind == kind and any("id" in r.meta for r in records[i + 1 :])]
        for hit in told:
            world = Recorded(tmp_path / f"{at}-{hit}", at)
            trainer, records = interrupted(world, at)
            assert records[hit].kind == kind
            follow(world, trainer, records[:hit] + records[hit + 1 :])
            check(world, trainer)
            check_rows(world)
        if trainer.done:
            break
        at += 9
    assert told


@pytest.mark.parametrize("at", [12, 27])
def test_rows_of_the_warm_start_outlive_all_records_of_its_last_step(tmp_path: Path, at: int) -> None:
    """They and the publication of v0 lie side by side: one bad block takes them all. What came after says that the warm start is over."""
    world = Recorded(tmp_path, 1)
    trainer, records = interrupted(world, at)
    gone = [record for record in records if (record.meta.get("phase"), record.meta.get("step")) == ("sft", SFT)]
    gone += [record for record in records if record.kind == "published"][:1]
    kept = [record for record in records if record not in gone]
    assert len(gone) == 3 and kept[-1].kind != "taken" and any(record.kind == "evaluated" for record in kept)
    follow(world, trainer, kept)
    check(world, trainer)
    check_rows(world)


def healed(world: Recorded, trainer: Loop, records: Sequence[Record]) -> tuple[Loop, list[Record]]:
    """To the end of the run, the ranks from their checkpoint where the orchestrator says so, as ``--restarts`` has it."""
    for _ in range(3):
        disk = Disk(records, None, world.rng)
        try:
            asyncio.run(live_on(world, trainer, disk))
            return trainer, disk.records
        except* JournalError:
            records, world.follows = disk.records, False
            trainer = Loop(world, trainer.attempt + 1, trainer.checkpoint)
    raise AssertionError("it is told again and again that it must resume")


def judge(world: World, records: Sequence[Record], damaged: bool = True) -> Audit:
    """All that a run left. ``damaged``: of its journal it is known."""
    audit = Audit(Rule.of(world.config), damaged)
    audit.spent.foresee(records)
    for record in records:
        audit.apply(record)
    for row in read_jsonl(world.paths.metrics):
        if row["phase"] == "rl":
            audit.reported(row["step"], row)
    audit.saved("the last", world.saved[-1]["rl"], world.saved[-1]["state"]["queue"])
    audit.close(finished=True)
    return audit


@pytest.mark.parametrize("who", ["orchestrator", "ranks"])
@pytest.mark.parametrize("at", [None, 3, 5, 24, 37, 46, 55, 68])
def test_a_run_whose_journal_lost_any_one_record_goes_on_and_loses_and_doubles_nothing(tmp_path: Path, at: int | None, who: str) -> None:
    """Interrupted somewhere, or finished and asked to go on; whichever record, but the last, is gone by then."""
    end = len(interrupted(Recorded(tmp_path / "whole", 3), at)[1]) - 1
    for hit in range(end):
        world = Recorded(tmp_path / f"{hit}", 3)
        trainer, records = interrupted(world, at)
        again = who == "ranks" or trainer.done
        world.follows = not again
        last = Loop(world, 1, trainer.checkpoint) if again else trainer
        last, records = healed(world, last, records[:hit] + records[hit + 1 :])
        check(world, last)
        check_rows(world, whole=last is trainer)
        assert judge(world, records).violations == [], records[hit]


def test_the_audit_of_a_run_whose_journal_lost_any_one_record_says_no_violation(tmp_path: Path) -> None:
    world = Recorded(tmp_path, 5)
    trainer, records = interrupted(world, 60)
    trainer, records = healed(world, Loop(world, 1, trainer.checkpoint), records)
    check(world, trainer)
    assert judge(world, records).undecided == 0
    found = [(record.kind, judge(world, [*records[:hit], *records[hit + 1 :]])) for hit, record in enumerate(records)]
    assert [(kind, audit.violations) for kind, audit in found if audit.violations] == []
    assert {kind for kind, audit in found if audit.undecided} >= {"taken", "session"}


@pytest.mark.parametrize("at", [57, 68])
def test_a_run_whose_journal_was_moved_away_or_lost_its_end_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """No byte tells of it but the checkpoint: of steps that no record has the audit says that it cannot know."""
    monkeypatch.setattr(stories, "Book", Book)
    world = Recorded(tmp_path / "whole", 3)
    _, records = interrupted(world, at)
    assert world.config.metarl.audit == "stop" and world.saved
    for left in range(len(records)):
        world = Recorded(tmp_path / f"{left}", 3)
        trainer, records = interrupted(world, at)
        last, records = healed(world, Loop(world, 1, trainer.checkpoint), records[:left])
        check(world, last)
        check_rows(world, whole=False)
        audit = judge(world, records, damaged=False)
        assert audit.violations == [] and (left > 0 or audit.undecided), left
