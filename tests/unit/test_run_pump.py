"""Tickets become groups: as many at once as the rule admits, refused and failed ones are handed on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from neox_rl.config.run import RunConfig
from neox_rl.errors import NeoxRLError, ServerFailedError
from neox_rl.problems.sources import ProblemCursor
from neox_rl.queue.book import Book
from neox_rl.queue.state import TicketQueue
from neox_rl.rollout.groups import Attempts
from neox_rl.rollout.vllm_client import NobodyServesError
from neox_rl.run.pump import MAX_FAILURES, RolloutPump
from neox_rl.telemetry.events import EventLog, read_events
from neox_rl.types import Completion, Finish, Group, Problem, SamplingParams, VersionSpan
from tests.unit.small_run import EveryOtherVerifier, small_config, small_paths

BAD = 33
PROBLEMS = [Problem(f"p{i}", "math", f"{i}", "1", f"{i}") for i in range(5)]


class Words:
    """A tokenizer of single characters."""

    eos_id, vocab_size = 1, 256

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


class Generator:
    """Three tokens of the version that is live; ``fail`` requests fail first. Waits while ``gate`` is closed. For ``alone`` requests
    there is no server. The first ``bad`` answers are such that no server goes on behind them."""

    def __init__(self, queue: TicketQueue, fail: int = 0) -> None:
        self.queue, self.fail, self.most, self.running = queue, fail, 0, 0
        self.alone = self.bad = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        self.running += 1
        self.most = max(self.most, self.running)
        version = self.queue.live_version
        await asyncio.sleep(0)
        await self.gate.wait()
        self.running -= 1
        if self.alone:
            self.alone -= 1
            raise NobodyServesError(f"rollout {rollout_id} from a server that serves", 120.0)
        if self.fail:
            self.fail -= 1
            raise ServerFailedError(f"{rollout_id}: connection refused")
        if BAD in prompt_ids:
            raise ServerFailedError(f"{rollout_id}: the server died of it")
        if self.bad:
            self.bad -= 1
            return (Completion((BAD,), (-0.5,), (VersionSpan(version, 0, 1),), Finish.LENGTH),) * n
        return tuple(Completion((65, 66, 67), (-0.5,) * 3, (VersionSpan(version, 0, 3),), Finish.STOP) for _ in range(n))


class Story:
    """A pump with everything around it, and what came out of it."""

    def __init__(self, root: Path, fail: int = 0, verifier: EveryOtherVerifier | None = None, **blocks: Any) -> None:
        self.config: RunConfig = small_config(root, **blocks)
        self.queue = TicketQueue(2, 1, 1, "token", 3)
        self.generator = Generator(self.queue, fail)
        self.groups: list[Group] = []
        self.paths = small_paths(self.config)
        self.events = EventLog(self.paths.event_log("orchestrator"), "orchestrator")
        attempts = Attempts(
            self.generator, verifier or EveryOtherVerifier(), Words(), lambda problem, verdict, text, length: float(verdict.correct)
        )
        cursor = ProblemCursor(PROBLEMS, 0)
        params = SamplingParams(8)
        self.book = Book.open(self.paths.journal, 0, 0.01, 1.0)
        self.pump = RolloutPump(
            self.config, self.book, self.queue, cursor, attempts, params, self.events, lambda g, p: self.groups.append(g), retry_s=0.0
        )

    async def until(self, num_ready: int) -> None:
        async with asyncio.timeout(60.0):
            task = asyncio.create_task(self.pump.run())
            try:
                while self.queue.num_ready < num_ready and not task.done():
                    await asyncio.wait({task, asyncio.ensure_future(self.pump.changed.wait())}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                task.cancel()
                await asyncio.gather(task)

    def go(self, num_ready: int) -> None:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(self.until(num_ready))


def test_as_many_at_once_as_the_rule_admits(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.queue.set_live(0)
    story.go(4)
    assert story.generator.most == 4 and [g.ticket for g in story.groups] == [0, 1, 2, 3], "B (eta + 1) tickets at v0"
    assert (story.book.history.tally.rollouts, story.book.history.tally.tokens_generated, story.book.history.tally.rollouts_refused) == (
        8,
        24,
        0,
    )
    assert story.queue.groups_dropped == 0
    story.events.close()
    assert [e.name for e in read_events(story.paths.events)].count("generate") == 4


def test_no_more_at_once_than_the_config_says(tmp_path: Path) -> None:
    story = Story(tmp_path, rollout={"max_inflight_groups": 1})
    story.queue.set_live(0)
    story.go(4)
    assert story.generator.most == 1


def test_nothing_before_a_version_is_live_and_the_pulse_starts_it(tmp_path: Path) -> None:
    story = Story(tmp_path)

    async def later() -> None:
        task = asyncio.create_task(story.until(4))
        await asyncio.sleep(0.05)
        assert story.queue.counts.issued == 0
        story.queue.set_live(0)
        story.pump.changed.fire()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(later())
    assert story.queue.num_ready == 4


def test_a_failed_generation_is_tried_again_under_the_same_ticket(tmp_path: Path) -> None:
    story = Story(tmp_path, fail=3)
    story.queue.set_live(0)
    story.go(4)
    assert sorted(g.ticket for g in story.groups) == [0, 1, 2, 3] and story.queue.counts.failed == 3


def test_a_ticket_that_always_fails_ends_the_run_with_its_name(tmp_path: Path) -> None:
    story = Story(tmp_path, fail=100)
    story.queue.set_live(0)
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(story.until(4))
    found = caught.group_contains(NeoxRLError, match=rf"ticket g00000\d failed {MAX_FAILURES} times, .*connection refused")
    assert found


def test_a_ticket_that_fails_of_what_it_was_answered_is_at_last_made_anew(tmp_path: Path) -> None:
    """What was answered is given again to the second attempt; a third would be the last, with the same end."""
    story = Story(tmp_path)
    story.book.add("published", id=1, version=0, digest="d0")
    story.generator.bad = 1
    story.queue.set_live(0)
    story.go(4)
    assert sorted(g.ticket for g in story.groups) == [0, 1, 2, 3] and story.queue.counts.failed == MAX_FAILURES - 1
    assert not any(BAD in s.ids for g in story.groups for trace in g.traces for s in trace.segments) and not story.book.history.spans


def test_a_ticket_has_not_failed_while_there_is_no_server_to_make_it(tmp_path: Path) -> None:
    """A large model starts again for longer than its requests may take; how long that may be is the keeper's to say."""
    story = Story(tmp_path)
    story.generator.alone = 40 * MAX_FAILURES
    story.queue.set_live(0)
    story.go(4)
    assert story.generator.alone == 0 and story.queue.counts.failed == 0


class NeverRight(EveryOtherVerifier):
    async def check(self, problem: Problem, text: str) -> Any:
        self.checked = 1
        return await super().check(problem, text)


def test_what_is_imitated_is_not_refused_for_being_equal(tmp_path: Path) -> None:
    story = Story(tmp_path, verifier=NeverRight(), staleness={"dynamic_sampling": True}, objective={"loss": "sft"})
    story.queue.set_live(0)
    story.go(4)
    assert story.queue.counts.refused == 0 and len(story.groups) == 4


def test_groups_that_teach_nothing_are_refused_so_often_and_no_oftener(tmp_path: Path) -> None:
    story = Story(tmp_path, verifier=NeverRight(), staleness={"dynamic_sampling": True, "max_refusals": 2})
    story.queue.set_live(0)
    story.go(4)
    assert story.queue.counts.refused == 4 * 2 and story.book.history.tally.rollouts_refused == 16
    assert story.book.history.tally.rollouts == 24 and len(story.groups) == 4
