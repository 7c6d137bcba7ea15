"""A small run whose groups are refused at random, killed again and again: every problem is trained or refused, once."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from neox_rl.config.run import RunConfig
from neox_rl.queue.book import Book
from neox_rl.queue.history import fold
from neox_rl.queue.records import Record
from neox_rl.run.audit import Audit, Rule
from neox_rl.types import Problem, Reason, Verdict
from tests.unit import test_recovery_stories as stories
from tests.unit.test_recovery_stories import Disk, Trainer, World, check, live_on, num_appends, tell

plain = stories.small_config


def refusing_config(*args: object, **blocks: object) -> RunConfig:
    config = plain(*args, **blocks)  # type: ignore[arg-type]
    staleness = replace(config.metarl.staleness, dynamic_sampling=True, max_refusals=2)
    return replace(config, metarl=replace(config.metarl, staleness=staleness))


class Whims:
    """Right or wrong by chance: half of the groups teach nothing."""

    def __init__(self) -> None:
        self._rng = random.Random(3)

    async def check(self, problem: Problem, text: str) -> Verdict:
        correct = self._rng.random() < 0.5
        return Verdict(correct, text, Reason.MATCH if correct else Reason.MISMATCH, 0.1)


@pytest.fixture(autouse=True)
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stories, "small_config", refusing_config)
    monkeypatch.setattr(stories, "EveryOtherVerifier", Whims)


def check_problems(world: World, records: list[Record]) -> None:
    audit = Audit(Rule.of(world.config))
    for record in records:
        audit.apply(record)
    audit.close(finished=True)
    assert audit.violations == [] and not any(record.kind == "lost" for record in records)
    assert audit.results["problems"].checked >= world.config.neox.train_iters * stories.B
    history = fold(records)
    assert history.lost() == [] and len(history.spent) == history.cursor, "all that was handed out came to an end"


@pytest.mark.parametrize(("segment_bytes", "who"), [(None, "orchestrator"), (None, "ranks"), (2000, "ranks")])
def test_no_problem_is_passed_over_or_used_twice_however_often_a_run_is_killed(tmp_path: Path, segment_bytes: int | None, who: str) -> None:
    end = num_appends(tmp_path / "whole", segment_bytes)
    for at in range(0, end, 3):
        world, trainer, disk = tell(tmp_path / f"{at}", [(at, who), (end // 2, who)], at % 2 > 0, at, segment_bytes=segment_bytes)
        check(world, trainer)
        check_problems(world, disk.records)


def test_a_problem_that_was_refused_after_the_checkpoint_does_not_come_back_with_it(tmp_path: Path) -> None:
    """Its ticket had no other yet when all died: the checkpoint says that it has this one."""
    for seed in range(12):
        world = World(tmp_path / f"{seed}", seed, True)
        trainer, disk = Trainer(world, 0, None), Disk([], None, world.rng)
        asyncio.run(live_on(world, trainer, disk))
        saved = next(i for i, record in enumerate(disk.records) if record.kind == "state")
        for at in [i + 1 for i, record in enumerate(disk.records) if record.kind == "refused" and i > saved]:
            again = Trainer(world, 1, world.saved[0])
            after = Disk(disk.records[:at], None, world.rng)
            asyncio.run(live_on(world, again, after))
            check(world, again)
            check_problems(world, after.records)


def test_a_problem_whose_end_damage_took_is_told_by_name_and_does_not_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ticket has another one since then."""
    world = World(tmp_path, 3, True)
    trainer, disk = Trainer(world, 0, None), Disk([], 60, world.rng)
    with contextlib.suppress(ExceptionGroup):
        asyncio.run(live_on(world, trainer, disk))
    records = disk.left()
    hit = next(record for record in reversed(records) if record.kind == "refused")
    assert not any(record.kind == "state" for record in records[records.index(hit) :]), "a state would know of it"
    records.remove(hit)
    monkeypatch.setattr(stories, "Book", partial(Book, has_holes=True))
    after = Disk(records, None, world.rng)
    asyncio.run(live_on(world, trainer, after))
    check(world, trainer)
    audit = Audit(Rule.of(world.config))
    audit.spent.foresee(after.records)
    for record in after.records:
        audit.apply(record)
    audit.close(finished=True)
    position = hit.meta["position"]
    assert audit.violations == [] and not audit.undecided
    assert audit.results["problems"].gaps == [f"problem {position}: no record says what became of it (records were lost)"]
    assert sum(record.kind == "lost" for record in after.records) == 1, "once is enough"


def test_a_checkpoint_before_the_newest_brings_its_refusals_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal forgot what came after it: those problems are handed out again."""
    monkeypatch.setattr(stories, "SAVE_EVERY", 1)
    for seed in range(6):
        world = World(tmp_path / f"{seed}", seed, True)
        disk = Disk([], None, world.rng)
        asyncio.run(live_on(world, Trainer(world, 0, None), disk))
        for attempt, back in enumerate((3, 1, 0), 1):
            between = Disk(disk.records, 30 if back else None, world.rng)
            trainer = Trainer(world, attempt, world.saved[back])
            with contextlib.suppress(ExceptionGroup):
                asyncio.run(live_on(world, trainer, between))
            disk = Disk(between.left(), None, world.rng)
        if not trainer.done:
            trainer = Trainer(world, 4, trainer.checkpoint)
            asyncio.run(live_on(world, trainer, disk))
        check(world, trainer)
        check_problems(world, disk.records)
