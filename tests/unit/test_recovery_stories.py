"""A small run, killed after every single record that it writes down, and run on to its end: what must hold however it went.

The orchestrator is the real one, without its socket; the journal is a list, of which a crash may lose what was not awaited. The trainer is
deterministic: its weights are a hash over what it trained, so that a step that is done again with the same groups makes the same digest.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from neox_rl.codec import decode_group
from neox_rl.ports import GroupMaker
from neox_rl.problems.sources import load_problems
from neox_rl.problems.tokenizer import load_tokenizer
from neox_rl.queue.book import Book
from neox_rl.queue.journal import LEDGER_KINDS, NOT_IN_LEDGER, Journal
from neox_rl.queue.records import Record, scan, to_bytes
from neox_rl.queue.wire_messages import ONE_WAY, Phase
from neox_rl.rollout.groups import Attempts
from neox_rl.run.orchestrator import Orchestrator
from neox_rl.run.parts import Parts
from neox_rl.telemetry.events import EventLog
from neox_rl.telemetry.jsonl import read_jsonl
from neox_rl.telemetry.metrics import MetricsWriter
from neox_rl.types import NO_VERSION, Completion, Finish, Group, SamplingParams, VersionSpan
from tests.unit.small_run import EveryOtherVerifier, small_config, small_paths

B, STEPS, SFT, SAVE_EVERY, BOUND = 2, 5, 2, 3, 2


class Crash(Exception):
    """kill -9."""


class Disk:
    """A journal in memory. The process dies at the append number ``dies_at``; what was not awaited by then may be lost."""

    def __init__(self, records: Sequence[Record], dies_at: int | None, rng: random.Random, answering: bool = False) -> None:
        self._answering = answering
        self.records, self.dies_at, self._rng = list(records), dies_at, rng
        self.appended, self.safe, self.full = 0, len(self.records), ""

    def append(self, payload: bytes) -> int:
        if self.appended == self.dies_at and not self._answering:
            raise Crash
        self.appended += 1
        self.records += self._read([payload])
        return len(self.records)

    def rotate(self, payloads: Sequence[bytes]) -> None:
        ledger = [r for r in self.records if r.kind in LEDGER_KINDS]
        short = [Record(r.seq, r.kind, {k: v for k, v in r.meta.items() if k not in NOT_IN_LEDGER}) for r in ledger]
        self.records = [*short, *self._read(payloads)]
        self.safe = 0

    async def durable(self) -> None:
        if self._answering and self.dies_at is not None and self.appended >= self.dies_at:
            raise Crash  # everything is on the disk, and the answer does not leave
        self.safe = len(self.records)

    def check(self) -> None: ...

    def left(self) -> list[Record]:
        """What a successor finds."""
        if self._answering or not self.safe:
            return self.records
        return self.records[: self._rng.randint(self.safe, len(self.records))]

    @staticmethod
    def _read(payloads: Sequence[bytes]) -> list[Record]:
        found = [item for i, payload in enumerate(payloads) for item in scan("x", to_bytes("x", i, payload))]
        return [item for item in found if isinstance(item, Record)]


class World:
    """What outlives the processes: the trainer's position and checkpoint, the weights of each version, and who made each token."""

    def __init__(self, root: Path, seed: int, faithful: bool, segment_bytes: int | None = None) -> None:
        self.segment_bytes, self.most_tokens = segment_bytes, 9
        """With it no checkpoint is made, and the journal begins a segment after so many bytes."""
        config = small_config(
            root,
            train_iters=STEPS,
            rollout={"groups_per_step": B, "group_size": 2, "max_new_tokens": 9, "flush_tokens": 3, "record_every": 0},
            warmstart={"steps": SFT, "tokens_per_step": 40},
            staleness={"mode": "strict", "admission_slack": 1, "delivery_slack": 1},
            evaluation={"num_problems": 1, "samples": 0},
        )
        self.config = replace(config, metarl=replace(config.metarl, audit="stop"))
        self.paths = small_paths(self.config)
        self.rng, self.faithful = random.Random(seed), faithful
        self.maker: list[str] = []  # token id -> digest of the weights that sampled it
        self.stop_at: tuple[Phase, int] | None = None  # the user asks to stop while the trainer waits for this batch
        self.saved: list[dict[str, Any]] = []
        self.problems = load_problems(self.config.metarl.problems, 1)
        self.tokenizer = load_tokenizer(self.config.metarl.tokenizer, self.config.metarl.problems)

    def policy(self) -> Policy:
        return Policy(self)

    def groups(self, attempts: Attempts) -> GroupMaker:
        return attempts


@dataclass
class Policy:
    """The servers: a version that is promised is live a moment later. Tokens are numbers, each used once."""

    world: World
    live: int = NO_VERSION
    digest: str = ""
    offered: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._promised: asyncio.Queue[int] = asyncio.Queue()

    def promise(self, version: int) -> None:
        self._promised.put_nowait(version)

    def waiting_for(self) -> str:
        return "the story"

    async def run(self, on_live: Callable[[int], None]) -> None:
        while True:
            version = await self._promised.get()
            if version > self.live:
                self.live, self.digest = version, self.offered[version]
                on_live(version)

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        rng = self.world.rng
        return tuple([await self._complete(params, rng.randint(1, 4)) for _ in range(n)])

    async def _complete(self, params: SamplingParams, length: int) -> Completion:
        ids: list[int] = []
        spans: list[VersionSpan] = []
        for _ in range(min(length, params.max_tokens)):
            for _ in range(self.world.rng.randint(0, 2)):
                await asyncio.sleep(0)
            self.world.maker.append(self.digest)
            ids.append(100 + len(self.world.maker) - 1)
            if spans and spans[-1].version == self.live:
                spans[-1] = VersionSpan(self.live, spans[-1].start, len(ids))
            else:
                spans.append(VersionSpan(self.live, len(ids) - 1, len(ids)))
        finish = Finish.LENGTH if len(ids) == params.max_tokens else Finish.STOP
        return Completion(tuple(ids), (-0.5,) * len(ids), tuple(spans), finish)


class Words:
    """The run's tokenizer, for which a token that stands for its maker is a word too."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.eos_id, self.vocab_size = tokenizer, tokenizer.eos_id, 1 << 30

    def encode(self, text: str) -> tuple[int, ...]:
        return cast("tuple[int, ...]", self._tokenizer.encode(text))

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return "x"


class Trainer:
    """Says what a trainer says. ``trained`` is its timeline: (phase, step) -> groups."""

    def __init__(self, world: World, attempt: int, checkpoint: Mapping[str, Any] | None) -> None:
        found = checkpoint or {"sft": 0, "rl": 0, "weights": "w", "trained": {}, "digests": {}, "state": {}}
        self.world, self.attempt, self.session = world, attempt, f"session {attempt}"
        self.sft, self.rl, self.weights, self.state = found["sft"], found["rl"], found["weights"], dict(found["state"])
        self.trained: dict[tuple[str, int], list[Group]] = dict(found["trained"])
        self.digests: dict[int, str] = dict(found["digests"])
        self.checkpoint = checkpoint
        self.messages = self._messages()
        self.unacked: list[tuple[int, str, dict[str, Any]]] = []
        self.id = 0
        self.answer: Any = None
        self.done = False

    def _messages(self) -> Iterator[tuple[str, dict[str, Any]]]:
        state = self.state | {"sft_step": self.sft, "rl_step": self.rl}
        yield "hello", {"session": self.session, "world": 1, "pid": 1, "attempt": self.attempt, "state": state}
        for step in range(self.sft + 1, SFT + 1):
            yield "next", {"phase": Phase.SFT, "step": step}
            if not self.answer.groups:
                yield "done", {"reason": "stopped"}
            self._train("sft", step)
            yield "report", {"phase": Phase.SFT, "step": step, "metrics": {"loss": 1.0}}
        yield "published", self._publish()
        for step in range(self.rl + 1, STEPS + 1):
            yield "next", {"phase": Phase.RL, "step": step}
            if not self.answer.groups:
                yield "done", {"reason": "stopped"}
            self._train("rl", step)
            yield "report", {"phase": Phase.RL, "step": step, "metrics": {"loss": 1.0}}
            yield "published", self._publish()
            if step % SAVE_EVERY == 0 and self.world.segment_bytes is None:
                keys = {"sft": self.sft, "rl": self.rl, "weights": self.weights, "state": self.state}
                self.checkpoint = keys | {"trained": dict(self.trained), "digests": dict(self.digests)}
                self.world.saved.append(self.checkpoint)
                yield "checkpoint", {"sft_step": self.sft, "rl_step": self.rl}
        yield "done", {"reason": "finished"}

    def _train(self, phase: str, step: int) -> None:
        self.trained[phase, step] = [decode_group(body) for body in self.answer.groups]
        self.state = dict(self.answer.state)
        salt = "" if self.world.faithful else f"/{self.attempt}"
        self.weights = hashlib.sha256(f"{self.weights}/{self.trained[phase, step]}{salt}".encode()).hexdigest()[:12]
        self.sft, self.rl = (step, 0) if phase == "sft" else (SFT, step)

    def _publish(self) -> dict[str, Any]:
        self.digests[self.rl] = self.weights
        return {"version": self.rl, "digest": self.weights}

    async def talk(self, orchestrator: Orchestrator, policy: Policy) -> None:
        """To the end of the run; what an earlier orchestrator did not acknowledge is said again first."""
        last = orchestrator._book.history.last if orchestrator._book.history.session == self.session else 0
        for message in list(self.unacked):
            await self._say(orchestrator, policy, message, last)
        while not self.done:
            kind, body = next(self.messages)
            self.id += 1
            self.unacked.append((self.id, kind, body))
            await self._say(orchestrator, policy, self.unacked[-1], 0)

    async def _say(self, orchestrator: Orchestrator, policy: Policy, message: tuple[int, str, dict[str, Any]], last: int) -> None:
        id, kind, body = message
        if kind == "published":
            policy.offered[body["version"]] = body["digest"]
        if kind in ONE_WAY and id <= last:
            return
        if kind == "next" and (body["phase"], body["step"]) == self.world.stop_at:
            orchestrator.stop()
        handler = {"next": "next_groups", "hello": "hello", "done": "done"}.get(kind, kind)
        numbered = () if kind in ("hello", "done") else (id,)
        answer = await getattr(orchestrator, handler)(*numbered, **body)
        if kind not in ONE_WAY:
            await orchestrator.durable()
            self.unacked = [m for m in self.unacked if m[0] > id]
            self.answer, self.done = answer, kind == "done"


class Server:
    """What ``_take_over`` tells the socket."""

    def take_over(self, session: str, attempt: int, last: int, lost: str = "") -> None: ...


async def live_on(world: World, trainer: Trainer, disk: Disk) -> None:
    """One life of an orchestrator, to the end of the run or to a Crash."""
    policy = world.policy()
    policy.offered = dict(trainer.digests)
    events = EventLog(world.paths.event_log("orchestrator"), "orchestrator")
    verifier, tokenizer = EveryOtherVerifier(), Words(world.tokenizer)
    attempts = Attempts(policy, verifier, tokenizer, lambda problem, verdict, text, length: float(verdict.correct))
    made = {"attempts": attempts, "maker": world.groups(attempts), "evaluated": attempts}
    watching = {"keeper": policy, "activity": None, "hits": SimpleNamespace(rate=None), "events": events}
    parts = cast(Parts, SimpleNamespace(problems=world.problems, **made, **watching))
    writer = MetricsWriter(world.paths, world.config.metarl.logging)
    book = Book(cast(Journal, disk), tuple(disk.records), [], segment_bytes=world.segment_bytes or 1 << 30)
    orchestrator = Orchestrator(world.config, world.paths, parts, writer, book, trainer.attempt)
    try:
        async with asyncio.timeout(60.0), asyncio.TaskGroup() as orchestrator._tasks:
            orchestrator._take_over(cast(Any, Server()))
            orchestrator._start("versions", policy.run(orchestrator._on_live))
            await trainer.talk(orchestrator, policy)
            for task in orchestrator._background.values():
                task.cancel()
    finally:
        orchestrator.close()
        events.close()


def tell(
    root: Path,
    crashes: Sequence[tuple[int | None, str]],
    faithful: bool = True,
    seed: int = 1,
    stop_at: tuple[Phase, int] | None = None,
    segment_bytes: int | None = None,
) -> tuple[World, Trainer, Disk]:
    """A run whose n-th orchestrator dies at ``crashes[n]``: (append, who dies with it)."""
    world = World(root, seed, faithful, segment_bytes)
    world.stop_at = stop_at
    trainer, disk = Trainer(world, 0, None), Disk([], crashes[0][0], world.rng, crashes[0][1].startswith("answering"))
    for (_, who), following in itertools.pairwise([*crashes, (None, "")]):
        try:
            asyncio.run(live_on(world, trainer, disk))
            return world, trainer, disk
        except* Crash:
            disk = Disk(disk.left(), following[0], world.rng)
            if who.endswith("ranks"):
                trainer = Trainer(world, trainer.attempt + 1, trainer.checkpoint)
    with contextlib.suppress(Crash):
        asyncio.run(live_on(world, trainer, disk))
    return world, trainer, disk


def check(world: World, trainer: Trainer) -> None:
    assert trainer.done
    rl = [group for step in range(1, STEPS + 1) for group in trainer.trained["rl", step]]
    assert sorted(group.ticket for group in rl) == list(range(B * STEPS)), "every ticket once"
    for step in range(1, STEPS + 1):
        for segment in (s for g in trainer.trained["rl", step] for t in g.traces for s in t.segments if s.logprobs):
            assert step - 1 - BOUND <= segment.version <= step - 1, "no token beyond the bound"
            made_by = {world.maker[token - 100] for token in segment.ids}
            assert made_by == {trainer.digests[segment.version]}, "every token was made by the policy of this timeline that it names"
    for group in rl:
        for trace in group.traces:
            versions = [s.version for s in trace.segments if s.logprobs]
            assert versions == sorted(versions) and 1 <= sum(len(s.ids) for s in trace.segments if s.logprobs) <= world.most_tokens
    demonstrations = [group.ticket for step in range(1, SFT + 1) for group in trainer.trained["sft", step]]
    assert demonstrations == list(range(len(demonstrations))), "no demonstration is left out or shown twice"
    rows = [(row["phase"], row["step"]) for row in read_jsonl(world.paths.metrics)]
    assert rows == [*(("sft", s) for s in range(1, SFT + 1)), *(("rl", s) for s in range(1, STEPS + 1))], "each step's row once"
    last = read_jsonl(world.paths.metrics)[-1]
    assert (last["rollouts_dropped"], last["rollouts_trained_twice"]) == (0, 0)


def num_appends(root: Path, segment_bytes: int | None = None) -> int:
    world, trainer, disk = tell(root, [(None, "")], segment_bytes=segment_bytes)
    check(world, trainer)
    return disk.appended


@pytest.mark.parametrize("who", ["orchestrator", "answering orchestrator", "ranks", "unfaithful ranks"])
def test_a_run_killed_after_any_record_trains_every_ticket_once_and_within_the_bound(tmp_path: Path, who: str) -> None:
    for at in range(num_appends(tmp_path / "whole")):
        world, trainer, _ = tell(tmp_path / f"{at}", [(at, who.removeprefix("unfaithful "))], faithful=not who.startswith("un"), seed=at)
        check(world, trainer)


def test_a_run_killed_again_and_again_ends_all_the_same(tmp_path: Path) -> None:
    rng = random.Random(5)
    for story in range(12):
        crashes = [(rng.randint(1, 60), rng.choice(["orchestrator", "ranks"])) for _ in range(rng.randint(2, 6))]
        world, trainer, _ = tell(tmp_path / f"{story}", crashes, faithful=rng.random() < 0.7, seed=story)
        check(world, trainer)


def test_a_step_that_is_done_again_takes_the_groups_it_took_and_makes_the_same_weights(tmp_path: Path) -> None:
    """The ranks die at the very end, two steps after their checkpoint."""
    at = num_appends(tmp_path / "whole") - 1
    world = World(tmp_path / "again", 1, True)
    trainer, disk = Trainer(world, 0, None), Disk([], at, world.rng)
    with contextlib.suppress(ExceptionGroup):
        asyncio.run(live_on(world, trainer, disk))
    assert trainer.rl == STEPS and trainer.checkpoint is not None
    made = len(world.maker)
    again = Trainer(world, 1, trainer.checkpoint)
    asyncio.run(live_on(world, again, Disk(disk.left(), None, world.rng)))
    check(world, again)
    assert again.digests == trainer.digests and len(world.maker) == made, "nothing was generated anew"


@pytest.mark.parametrize(("phase", "step"), [(Phase.SFT, 1), (Phase.SFT, 2), (Phase.RL, 2)])
def test_a_stop_that_was_answered_is_answered_again(tmp_path: Path, phase: Phase, step: int) -> None:
    """The orchestrator dies with its answer: its successor must neither hand out a batch nor miss one."""
    world = World(tmp_path, 1, True)
    world.stop_at = phase, step
    trainer, disk = Trainer(world, 0, None), Disk([], None, world.rng)
    asyncio.run(live_on(world, trainer, disk))
    at = next(i for i, record in enumerate(disk.records) if record.kind == "stopped")
    told, again, _ = tell(tmp_path / "again", [(at + 1, "answering orchestrator")], stop_at=(phase, step))
    assert again.done and list(again.trained) == list(trainer.trained) and told.stop_at == world.stop_at


def the_end_of_a_run(root: Path, seed: int) -> tuple[World, Trainer, list[Record]]:
    """Everything is trained, the checkpoint is two steps old, and all but the journal is gone."""
    world = World(root, seed, True)
    trainer, disk = Trainer(world, 0, None), Disk([], None, world.rng)
    asyncio.run(live_on(world, trainer, disk))
    world.config = replace(world.config, metarl=replace(world.config.metarl, audit="off"))  # a journal as the tests make it is none
    return world, Trainer(world, 1, trainer.checkpoint), disk.records


@pytest.mark.parametrize("slacks", [(0, 0), (1, 0), (0, 1)])
def test_a_run_goes_on_with_smaller_slacks_and_without_what_is_beyond_them(tmp_path: Path, slacks: tuple[int, int]) -> None:
    for seed in range(4):
        world, again, records = the_end_of_a_run(tmp_path / f"{seed}", seed)
        strict = replace(world.config.metarl.staleness, admission_slack=slacks[0], delivery_slack=slacks[1])
        world.config = replace(world.config, metarl=replace(world.config.metarl, staleness=strict))
        asyncio.run(live_on(world, again, Disk(records, None, world.rng)))
        check(world, again)
        for step in range(SAVE_EVERY + 1, STEPS + 1):
            versions = [s.version for g in again.trained["rl", step] for t in g.traces for s in t.segments if s.logprobs]
            assert min(versions) >= step - 1 - sum(slacks), "no token beyond the new bound"
