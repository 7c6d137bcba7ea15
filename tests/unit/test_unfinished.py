"""What servers answered for an unfinished group is given again to who makes it anew: however it is made, it goes on where it was."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from neox_rl.config.derived import words_around
from neox_rl.config.run import RunConfig
from neox_rl.config.schema_search import SearchConfig
from neox_rl.episodes.tools import Tool
from neox_rl.errors import ConfigError, ServerFailedError, WireError
from neox_rl.ports import Generator, GroupMaker
from neox_rl.problems.sources import load_problems
from neox_rl.problems.tokenizer import SymbolicTokenizer, load_tokenizer
from neox_rl.queue.answers import Answer, Asked, answer_of
from neox_rl.queue.book import Book
from neox_rl.queue.journal import Journal
from neox_rl.queue.records import Record, scan, to_bytes
from neox_rl.rollout.chunks import ChunkedGenerator
from neox_rl.rollout.groups import Attempts
from neox_rl.run.makers import make_maker
from neox_rl.run.search_groups import search_groups
from neox_rl.run.unfinished import Unfinished
from neox_rl.types import Completion, Finish, Group, Problem, Reason, SamplingParams, Verdict, VersionSpan
from tests.unit.search_worlds import TOKENIZER, RandomPlayer, countdown
from tests.unit.small_run import small_config

TICKET, SIZE, VERSIONS = 7, 2, 40
TASK, PARAMS = countdown([2, 3, 5, 7], 24), SamplingParams(8)


class Memory:
    """A journal that a crash leaves whole."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []

    def append(self, payload: bytes) -> int:
        self.payloads.append(payload)
        return len(self.payloads)

    def records(self) -> list[Record]:
        items = [item for i, payload in enumerate(self.payloads) for item in scan("x", to_bytes("x", i, payload))]
        return [item for item in items if isinstance(item, Record)]

    def book(self) -> Book:
        """As who takes over finds it."""
        return Book(cast(Journal, self), self.records(), [])


class Babble:
    """Random words of ``texts``; EOS, and what else the request stops at, ends them."""

    def __init__(self, tokenizer: SymbolicTokenizer, texts: Sequence[str]) -> None:
        self.eos = tokenizer.eos_id
        self.words = [i for text in texts for i in tokenizer.encode(text)]

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        rng = random.Random(f"{prompt_ids}/{params.seed}/{rollout_id}")
        return tuple(self._written(rng, params) for _ in range(n))

    def _written(self, rng: random.Random, params: SamplingParams) -> Completion:
        ids: list[int] = []
        while len(ids) < params.max_tokens and not (ids and ids[-1] in (self.eos, *params.stop_token_ids)):
            ids.append(self.eos if rng.random() < 0.05 else rng.choice(self.words))
        finish = Finish.STOP if ids[-1] in (self.eos, *params.stop_token_ids) else Finish.LENGTH
        return Completion(tuple(ids), tuple(-rng.randrange(8) / 8 for _ in ids), (), finish)


class Policy:
    """Writes something else each time that it answers the same, so that nothing can be made twice unseen. A request is in flight for a time
    of its own; one of ``flaky`` fails, once. After ``lives`` answers none comes any more."""

    def __init__(self, inner: Generator, flaky: int = 0) -> None:
        self.inner, self.flaky, self.lives = inner, flaky, 1 << 30
        self.answers: Counter[str] = Counter()
        self.failed: set[str] = set()
        self.made: list[Completion] = []
        self.crashed = asyncio.Event()

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        request = f"{rollout_id}/{list(prompt_ids)}/{params}/{n}"
        rng = random.Random(request)
        for _ in range(rng.randrange(6)):
            await asyncio.sleep(0)
        if self.flaky and rng.randrange(self.flaky) == 0 and request not in self.failed:
            self.failed.add(request)
            raise ServerFailedError(f"{rollout_id}: connection refused")
        await self._alive()
        self.answers[request] += 1
        written = await self.inner.sample(prompt_ids, replace(params, seed=self.answers[request]), n, rollout_id)
        # Rising along every path, and the same whatever else is in flight.
        spans = [(VersionSpan(len(prompt_ids) // 5, 0, len(c.ids)),) * bool(c.ids) for c in written]
        found = tuple(replace(c, spans=own) for c, own in zip(written, spans, strict=True))
        self.made += found
        return found

    async def score(self, prompt_ids: Sequence[int], ids: Sequence[int], rollout_id: str) -> Completion:
        await self._alive()
        return Completion(tuple(ids), (-1.0,) * len(ids), (VersionSpan(VERSIONS - 1, 0, len(ids)),), Finish.STOP)

    async def _alive(self) -> None:
        if self.answers.total() >= self.lives:
            self.crashed.set()
            await asyncio.Event().wait()


class Even:
    """Right is a text of an even number of characters."""

    async def check(self, problem: Problem, text: str) -> Verdict:
        right = len(text) % 2 == 0
        return Verdict(right, text[-5:], Reason.MATCH if right else Reason.MISMATCH, 0.0)


@dataclass
class World:
    """A group to make, and what outlives who makes it: the journal and the policy."""

    maker: Callable[[Policy], GroupMaker]
    inner: Generator
    problem: Problem = TASK
    params: SamplingParams = PARAMS
    flush: int = 512
    flaky: int = 0
    size: int = SIZE

    def __post_init__(self) -> None:
        self.journal, self.policy = Memory(), Policy(self.inner, self.flaky)
        book = self.journal.book()
        book.add("issued", ticket=TICKET, position=0, live=0)
        for version in range(VERSIONS):
            book.add("published", id=version, version=version, digest=f"d{version}")

    def live(self, lives: int = 1 << 30, anew: bool = False) -> Group | None:
        """One orchestrator's life, of so many answers. None: it died before the group was there."""
        return asyncio.run(self._live(lives, anew))

    async def _live(self, lives: int, anew: bool) -> Group | None:
        policy = self.policy
        policy.lives, policy.crashed = policy.answers.total() + lives, asyncio.Event()
        book = self.journal.book()
        unfinished = Unfinished(book)
        maker = self.maker(policy).chunked(partial(ChunkedGenerator, flush_tokens=self.flush, record=unfinished))

        async def make() -> Group:
            with unfinished.attempt(TICKET, anew):
                return await maker.group(self.problem, TICKET, self.params, self.size)

        making, crashed = asyncio.ensure_future(make()), asyncio.ensure_future(policy.crashed.wait())
        await asyncio.wait({making, crashed}, return_when=asyncio.FIRST_COMPLETED)
        ended = making.done()
        for task in (making, crashed):
            task.cancel()
        await asyncio.gather(making, crashed, return_exceptions=True)
        if not ended:
            return None
        book.group(making.result())
        assert not book.history.spans and not unfinished._attempts, "nothing is kept of a group that is there"
        book.answer(TICKET, Answer(Asked(0, 1, 0), 0, 0, tuple(policy.made[:1])))
        assert not book.history.spans, "whoever comes late"
        return making.result()

    @property
    def kept(self) -> list[Completion]:
        """What the journal has of the open ticket."""
        return [chunk for made in self.journal.book().history.spans.get(TICKET, ()) for chunk in answer_of(made.body).chunks]


def searches(**block: object) -> World:
    config = RunConfig()
    search = replace(SearchConfig(nodes=24, width=3, prune=False, playouts=2, playout_tokens=40, samples="all"), **block)  # type: ignore[arg-type]
    config = replace(config, metarl=replace(config.metarl, search=search))

    def maker(policy: Policy) -> GroupMaker:
        return search_groups(config, Attempts(policy, Even(), TOKENIZER, lambda problem, verdict, text, length: float(verdict.correct)))

    return World(maker, RandomPlayer(), flaky=7)


def of_run(root: Path, tool: Tool | None = None, **blocks: dict[str, Any]) -> World:
    """Completions of up to 24 tokens, in chunks of 5."""
    config = small_config(root, **blocks)
    tokenizer = load_tokenizer(config.metarl.tokenizer, config.metarl.problems, words_around(config))
    assert isinstance(tokenizer, SymbolicTokenizer)
    problem = load_problems(config.metarl.problems, 1).train[0]

    def maker(policy: Policy) -> GroupMaker:
        attempts = Attempts(policy, Even(), tokenizer, lambda problem, verdict, text, length: float(verdict.correct))
        return make_maker(config, attempts, tool, scorer=policy)

    return World(maker, Babble(tokenizer, ["1", "2", "3", "+2", "=4"]), problem, SamplingParams(24, stop_token_ids=(tokenizer.eos_id,)), 5)


def told(group: Group | None) -> tuple[int, Counter[str]]:
    """Without the order of its traces: what is sampled in one place at a time is remembered in the order of the answers."""
    assert group is not None
    rows = [
        [(s.ids, s.role, s.logprobs, s.version, s.mask, None if s.advantage is None else round(s.advantage, 9)) for s in trace.segments]
        for trace in group.traces
    ]
    return group.unshown, Counter(f"{row}/{t.reward}/{t.finish}/{t.verdict}" for row, t in zip(rows, group.traces, strict=True))


def goes_on(make: Callable[[], World]) -> None:
    """Whenever it is interrupted, twice: the group is that of one that lives, and nothing that is written down is made again."""
    whole = make()
    expected, total = whole.live(), whole.policy.answers.total()
    assert expected is not None and total > 6
    for lives in range(1, total):
        world = make()
        assert world.live(lives) is None and world.kept == world.policy.made, "every answer"
        found = world.live(1)
        if found is None:
            assert world.kept == world.policy.made
            found = world.live()
        assert told(found) == told(expected) and world.policy.answers == whole.policy.answers


SEARCHES: Mapping[str, dict[str, object]] = {
    "mcts": {"strategy": "mcts", "batch": 3},
    "mcts, playouts": {"strategy": "mcts", "batch": 3, "value": "monte-carlo", "nodes": 12},
    "dfs": {"strategy": "dfs"},
    "beam, playouts": {"strategy": "beam", "beam": 2, "value": "monte-carlo", "nodes": 12},
    "attempts": {"strategy": "best-of-n", "width": 6},
}


@pytest.mark.parametrize("block", SEARCHES.values(), ids=SEARCHES.keys())
def test_a_search_grows_as_it_did_before_and_asks_only_for_what_is_not_written_down(block: dict[str, object]) -> None:
    goes_on(lambda: searches(**block))


async def calculator(text: str) -> str | None:
    return "= 3" if len(text) % 3 == 0 else None


@pytest.mark.parametrize(("feedback", "tool"), [("text", None), ("binary", calculator), ("none", calculator)])
def test_a_rollout_of_several_episodes_walks_as_it_did_before(tmp_path: Path, feedback: str, tool: Tool | None) -> None:
    rollout, episodes = {"method": "episodes", "max_new_tokens": 24}, {"count": 3, "feedback": feedback, "gammas": (0.9, 1.0)}
    goes_on(lambda: of_run(tmp_path, tool, rollout=rollout, episodes=episodes))


class Behind:
    """Some of its servers serve v4 yet, others v5."""

    def __init__(self, inner: Generator) -> None:
        self.inner, self.rng = inner, random.Random(2)

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        found = await self.inner.sample(prompt_ids, params, n, rollout_id)
        return tuple(replace(c, spans=(VersionSpan(self.rng.choice((4, 5)), 0, len(c.ids)),)) for c in found)


def test_versions_do_not_fall_between_the_episodes_of_a_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where a successor goes on with what is written down."""
    monkeypatch.setattr("neox_rl.rollout.chunks.BEHIND_S", 0.0)
    world = of_run(tmp_path, calculator, rollout={"method": "episodes", "max_new_tokens": 24}, episodes={"count": 3, "feedback": "none"})
    make = world.maker
    world.maker = lambda policy: make(cast(Policy, Behind(policy)))
    assert world.live(5) is None
    group = world.live()
    assert group is not None
    for trace in group.traces:
        versions = [segment.version for segment in trace.segments if segment.logprobs]
        assert versions == sorted(versions) and set(versions) == {4, 5}


@pytest.mark.parametrize("kind", ["verdict", "solution", "gain"])
def test_attempts_go_on_in_the_middle_of_a_completion(tmp_path: Path, kind: str) -> None:
    goes_on(lambda: replace(of_run(tmp_path, reward={"kind": kind}), size=4))


@pytest.mark.parametrize("kind", ["solution", "gain"])
def test_searches_that_are_finished_are_not_made_again_because_nobody_scored_them(tmp_path: Path, kind: str) -> None:
    world = replace(of_run(tmp_path, reward={"kind": kind}), flush=512)
    assert world.live(1) is None and world.kept == world.policy.made, "it died while they were scored"
    assert world.live() is not None and world.policy.answers.total() == 1


def test_a_failed_attempt_is_gone_on_with_too_unless_it_is_to_be_made_anew() -> None:
    world = searches()
    assert world.live(9) is None and world.kept == world.policy.made
    before = len(world.kept)
    assert world.live(1, anew=True) is None and world.kept == world.policy.made[before:]


def test_answers_of_a_timeline_that_was_undone_are_not_given_again() -> None:
    world = searches()
    assert world.live(9) is None
    undone = max(span.version for chunk in world.kept for span in chunk.spans)
    world.journal.book().add("published", id=0, version=undone, digest="another")
    group = world.live()
    assert group is not None and world.policy.answers.most_common(1)[0][1] == 2, "the first step was asked for twice"
    kinds = [record.kind for record in world.journal.records()]
    assert kinds.count("discarded") == 1 and kinds.index("discarded") > kinds.index("span")


@pytest.mark.parametrize(
    ("error", "kept"), [(ServerFailedError("gone"), 1), (ConfigError("start it"), 1), (WireError("refused"), 0), (KeyError("x"), 0)]
)
def test_what_another_attempt_would_run_into_again_is_not_kept(error: Exception, kept: int) -> None:
    world = searches()
    book = world.journal.book()
    unfinished = Unfinished(book)
    with pytest.raises(type(error)), unfinished.attempt(TICKET):
        with unfinished.request((1, 2), PARAMS, 1, f"g{TICKET:06d}/r0") as request:
            request.keep(0, 0, [Completion((5,), (-1.0,), (VersionSpan(0, 0, 1),), Finish.STOP)])
        raise error
    assert len(world.kept) == kept == len(book.history.spans.get(TICKET, ()))


def test_equal_requests_of_a_rollout_each_get_their_own_answer_again_and_one_that_failed_has_none() -> None:
    book = searches().journal.book()
    asked = ((1, 2), PARAMS, 1, f"g{TICKET:06d}/r0")
    made = [Completion((5 + i,), (-1.0,), (VersionSpan(0, 0, 1),), Finish.LENGTH) for i in range(3)]
    unfinished = Unfinished(book)
    with unfinished.attempt(TICKET), ExitStack() as together:
        with pytest.raises(ServerFailedError), unfinished.request(*asked) as first:
            second = together.enter_context(unfinished.request(*asked))
            second.keep(0, 0, made[1:2])
            first.keep(0, 0, made[:1])
            raise ServerFailedError("its second chunk does not come")
        again = together.enter_context(unfinished.request(*asked))
        assert again.earlier() == {0: made[:1]}, "it goes on where it was"
        again.keep(0, 1, made[2:])
    found = []
    with unfinished.attempt(TICKET):
        for _ in range(3):
            with unfinished.request(*asked) as request:
                found.append(request.earlier())
        with unfinished.request(*asked[:3], f"g{TICKET:06d}/r1") as other:
            assert not other.earlier(), "another search of the group asks the same at its root"
    assert found == [{0: [made[0], made[2]]}, {0: [made[1]]}, {}]
