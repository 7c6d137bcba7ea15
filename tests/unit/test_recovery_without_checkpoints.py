"""A small run that makes no checkpoint: its journal forgets what was trained, and must lose nothing but the generation of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox_rl.problems.sources import ProblemCursor
from neox_rl.queue.history import fold
from tests.unit.test_recovery_stories import STEPS, B, check, num_appends, tell


@pytest.mark.parametrize("who", ["orchestrator", "answering orchestrator", "ranks", "unfaithful ranks"])
def test_a_run_killed_after_any_record_begins_anew_where_it_must_and_trains_every_ticket_once(tmp_path: Path, who: str) -> None:
    """The ranks begin anew each time, with the problems that they had the first time."""
    appends = num_appends(tmp_path / "whole", 2000)
    for at in range(appends):
        world, trainer, disk = tell(
            tmp_path / f"{at}", [(at, who.removeprefix("unfaithful "))], faithful=not who.startswith("un"), seed=at, segment_bytes=2000
        )
        check(world, trainer)
        problems = {g.problem_id for step in range(1, STEPS + 1) for g in trainer.trained["rl", step]}
        first = ProblemCursor(world.problems.train, world.config.metarl.seed)
        assert problems == {first.next().id for _ in range(B * STEPS)}, "none is passed over, none is taken twice"
        history = fold(disk.records)
        assert max(len(history.taken), len(history.positions)) < B * STEPS, "what was trained is not kept"


def test_a_journal_without_checkpoints_stays_small_and_says_which_tickets_were_trained(tmp_path: Path) -> None:
    world, trainer, disk = tell(tmp_path, [(None, "")], segment_bytes=2000)
    check(world, trainer)
    trained = [record.meta["tickets"] for record in disk.records if record.kind == "taken" and record.meta["phase"] == "rl"]
    assert sorted(ticket for tickets in trained for ticket in tickets) == list(range(B * STEPS)), "the ledger has them all"
    assert sum(len(record.body) for record in disk.records) < 3 * 2000
