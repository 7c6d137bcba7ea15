"""A user who goes back to a checkpoint before the newest one: the steps in between are undone, and their problems are trained again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from neox_rl.problems.sources import ProblemCursor
from neox_rl.queue.records import Record
from neox_rl.run.audit import Audit, Rule
from tests.unit import test_recovery_stories as stories
from tests.unit.test_recovery_stories import STEPS, B, Disk, Trainer, World, check, live_on


def check_problems(world: World, trainer: Trainer, records: Sequence[Record]) -> Audit:
    trained = sorted(group.problem_id for step in range(1, STEPS + 1) for group in trainer.trained["rl", step])
    first = ProblemCursor(world.problems.train, world.config.metarl.seed)
    assert trained == sorted(first.next().id for _ in range(B * STEPS)), "none is passed over, none is taken twice"
    audit = Audit(Rule.of(world.config))
    for record in records:
        audit.apply(record)
    audit.close(finished=True)
    assert audit.violations == []
    return audit


@pytest.mark.parametrize("faithful", [True, False])
def test_who_goes_back_before_the_newest_checkpoint_passes_no_problem_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faithful: bool
) -> None:
    monkeypatch.setattr(stories, "SAVE_EVERY", 1)
    for back in range(1, STEPS):
        world = World(tmp_path / f"{back}", back, faithful)
        trainer, disk = Trainer(world, 0, None), Disk([], None, world.rng)
        asyncio.run(live_on(world, trainer, disk))
        again, after = Trainer(world, 1, world.saved[back - 1]), Disk(disk.records, None, world.rng)
        asyncio.run(live_on(world, again, after))
        check(world, again)
        check_problems(world, again, after.records)


@pytest.mark.parametrize("saved_between", [True, False])
def test_who_goes_back_twice_passes_no_problem_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_between: bool) -> None:
    """The second time behind where the first had begun anew, before or after a checkpoint there."""
    monkeypatch.setattr(stories, "SAVE_EVERY", 1)
    for seed in range(4):
        world = World(tmp_path / f"{seed}", seed, True)
        trainer, disk = Trainer(world, 0, None), Disk([], None, world.rng)
        asyncio.run(live_on(world, trainer, disk))
        first, third = world.saved[0], world.saved[2]
        if not saved_between:
            monkeypatch.setattr(stories, "SAVE_EVERY", STEPS + 1)
        between = Disk(disk.records, 9 + seed, world.rng)
        with contextlib.suppress(ExceptionGroup):
            asyncio.run(live_on(world, Trainer(world, 1, third), between))
        monkeypatch.setattr(stories, "SAVE_EVERY", 1)
        again, after = Trainer(world, 2, first), Disk(between.left(), None, world.rng)
        asyncio.run(live_on(world, again, after))
        check(world, again)
        check_problems(world, again, after.records)


@pytest.mark.parametrize("back", [0, 1, 2])
@pytest.mark.parametrize("saved_after", [True, False])
def test_who_goes_back_behind_where_the_journal_was_moved_away_passes_no_problem_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: int, saved_after: bool
) -> None:
    """The new journal begins at the third checkpoint, and the ranks go back before that: no record says which problems came between."""
    for seed, dies_at in itertools.product(range(3), (4, 12, 20)):
        monkeypatch.setattr(stories, "SAVE_EVERY", 1)
        world = World(tmp_path / f"{seed}-{dies_at}", seed, True)
        trainer = Trainer(world, 0, None)
        asyncio.run(live_on(world, trainer, Disk([], None, world.rng)))
        third, earlier = world.saved[2], world.saved[back - 1] if back else None
        monkeypatch.setattr(stories, "SAVE_EVERY", 1 if saved_after else STEPS + 1)
        between = Disk([], dies_at, world.rng)
        with contextlib.suppress(ExceptionGroup):
            asyncio.run(live_on(world, Trainer(world, 1, third), between))
        again, after = Trainer(world, 2, earlier), Disk(between.left(), None, world.rng)
        asyncio.run(live_on(world, again, after))
        check(world, again)
        audit = check_problems(world, again, after.records)
        assert audit.undecided and (saved_after or not audit.damaged)
