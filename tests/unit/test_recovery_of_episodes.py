"""The stories of ``test_recovery_stories`` with rollouts of several requests: what is written down of them is trained, or foreign."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neox_rl.ports import GroupMaker
from neox_rl.queue.answers import answer_of
from neox_rl.rollout.groups import Attempts
from neox_rl.run.episode_groups import EpisodeGroups
from neox_rl.types import Problem, Reason, Verdict
from tests.unit import test_recovery_stories as stories
from tests.unit.test_recovery_stories import STEPS, World, check, num_appends, tell

EPISODES = 3


class Episodes(World):
    """Its rollouts are of three episodes, each of up to three chunks."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        metarl = self.config.metarl
        episodes = replace(metarl.episodes, count=EPISODES, feedback="none")
        self.config = replace(self.config, metarl=replace(metarl, rollout=replace(metarl.rollout, method="episodes"), episodes=episodes))
        self.most_tokens *= EPISODES

    def groups(self, attempts: Attempts) -> GroupMaker:
        return EpisodeGroups.of(self.config, attempts, None)


class Wrong:
    """Whatever the answer: a verdict is no part of what is asked next."""

    async def check(self, problem: Problem, text: str) -> Verdict:
        return Verdict(False, text, Reason.MISMATCH, 0.0)


@pytest.fixture(autouse=True)
def _episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stories, "World", Episodes)
    monkeypatch.setattr(stories, "EveryOtherVerifier", Wrong)


@pytest.mark.parametrize("who", ["orchestrator", "ranks", "unfaithful ranks"])
def test_rollouts_of_several_episodes_are_gone_on_with_after_any_record(tmp_path: Path, who: str) -> None:
    continued = 0
    appends = num_appends(tmp_path / "whole")
    assert appends > 2 * EPISODES * STEPS
    for at in range(0, appends, 2):
        world, trainer, disk = tell(tmp_path / f"{at}", [(at, who.removeprefix("unfaithful "))], faithful=not who.startswith("un"), seed=at)
        check(world, trainer)
        groups = {group.ticket: group for step in range(1, STEPS + 1) for group in trainer.trained["rl", step]}
        discarded = {ticket for record in disk.records if record.kind == "discarded" for ticket in record.meta["tickets"]}
        for record in disk.records:
            if record.kind == "span" and (ticket := record.meta["ticket"]) not in discarded:
                trained = {i for trace in groups[ticket].traces for segment in trace.segments for i in segment.ids}
                assert all(i in trained for chunk in answer_of(record.body).chunks for i in chunk.ids), (
                    "nothing that is there is made again"
                )
                continued += 1
    assert continued
