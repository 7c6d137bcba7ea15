"""Equal requests of one turn of the event loop are one request: who gets what, errors, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import wraps
from typing import ParamSpec

import pytest

from neox_rl.errors import ServerFailedError
from neox_rl.rollout.gathered import MAX_COMPLETIONS, Gathered
from neox_rl.rollout.vllm_client import NobodyServesError
from neox_rl.types import Completion, Finish, SamplingParams, VersionSpan

PARAMS = SamplingParams(2)
P = ParamSpec("P")


def in_loop(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """The test in an event loop of its own, with a deadline."""

    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(60):
                await test(*args, **kwargs)

        asyncio.run(bounded())

    return run


class Engine:
    """Numbers the completions that it makes; each has a version of its own. Held back until ``open`` is set."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], SamplingParams, int, str]] = []
        self.open = asyncio.Event()
        self.made = 0
        self.cancelled = 0
        self.errors: list[Exception] = []

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        self.asked.append((tuple(prompt_ids), params, n, rollout_id))
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.errors:
            raise self.errors.pop()
        start, self.made = self.made, self.made + n
        return tuple(Completion((i,), (-0.5,), (VersionSpan(i, 0, 1),), Finish.STOP) for i in range(start, start + n))


def ask(gathered: Gathered, prompt: Sequence[int], n: int, name: str, params: SamplingParams = PARAMS) -> asyncio.Task[tuple[int, ...]]:
    async def ids() -> tuple[int, ...]:
        completions = await gathered.sample(prompt, params, n, name)
        assert [c.spans for c in completions] == [(VersionSpan(c.ids[0], 0, 1),) for c in completions]
        return tuple(c.ids[0] for c in completions)

    return asyncio.create_task(ids())


async def until_asked(engine: Engine, count: int) -> None:
    while len(engine.asked) < count:
        await asyncio.sleep(0)


@in_loop
async def test_equal_requests_are_one_and_each_caller_gets_its_own() -> None:
    engine = Engine()
    engine.open.set()
    gathered = Gathered(engine)
    calls = [ask(gathered, [7, 8], 1, "a"), ask(gathered, (7, 8), 3, "b"), ask(gathered, [7, 9], 1, "c"), ask(gathered, [7, 8], 2, "d")]
    calls.append(ask(gathered, [7, 8], 1, "e", SamplingParams(3)))
    assert await asyncio.gather(*calls) == [(0,), (1, 2, 3), (6,), (4, 5), (7,)]
    assert [(prompt, n) for prompt, _, n, _ in engine.asked] == [((7, 8), 6), ((7, 9), 1), ((7, 8), 1)]
    assert await ask(gathered, [7, 8], 1, "later") == (8,)


@in_loop
async def test_a_seed_goes_through_alone() -> None:
    engine = Engine()
    engine.open.set()
    seeded = SamplingParams(2, seed=5)
    gathered = Gathered(engine)
    await asyncio.gather(ask(gathered, [1], 1, "a", seeded), ask(gathered, [1], 1, "b", seeded))
    assert engine.asked == [((1,), seeded, 1, "a"), ((1,), seeded, 1, "b")]


@in_loop
async def test_greedy_requests_are_one_completion_that_all_of_them_get() -> None:
    engine = Engine()
    engine.open.set()
    greedy = SamplingParams(2, temperature=0.0)
    gathered = Gathered(engine)
    calls = [ask(gathered, [1], 1, str(i), greedy) for i in range(2 * MAX_COMPLETIONS)]
    found = await asyncio.gather(*calls, ask(gathered, [2], 1, "other", greedy), ask(gathered, [1], 1, "sampled"))
    assert found == [*[(0,)] * (2 * MAX_COMPLETIONS), (1,), (2,)]
    assert [(prompt, params, n) for prompt, params, n, _ in engine.asked] == [((1,), greedy, 1), ((2,), greedy, 1), ((1,), PARAMS, 1)]


@in_loop
async def test_portions_leave_something_for_other_servers() -> None:
    engine = Engine()
    engine.open.set()
    gathered = Gathered(engine)
    found = await asyncio.gather(*(ask(gathered, [1], 1, str(i)) for i in range(2 * MAX_COMPLETIONS + 1)), ask(gathered, [2], 200, "many"))
    assert [n for _, _, n, _ in engine.asked] == [MAX_COMPLETIONS, MAX_COMPLETIONS, 1, 200]
    assert sorted(i for ids in found for i in ids) == list(range(2 * MAX_COMPLETIONS + 201))


@pytest.mark.parametrize("error", [ServerFailedError("s died"), NobodyServesError("rollout a", 1.0, "wait")])
@in_loop
async def test_an_error_reaches_every_caller_and_the_next_request_is_a_new_one(error: Exception) -> None:
    engine = Engine()
    engine.open.set()
    engine.errors = [error]
    gathered = Gathered(engine)
    found = await asyncio.gather(ask(gathered, [1], 1, "a"), ask(gathered, [1], 1, "b"), return_exceptions=True)
    assert list(found) == [error, error]
    assert list(await asyncio.gather(ask(gathered, [1], 1, "a"), ask(gathered, [1], 1, "b"))) == [(0,), (1,)]


@in_loop
async def test_a_request_that_fails_costs_no_other_one_that_was_asked_for_in_the_same_turn() -> None:
    engine = Engine()
    engine.open.set()
    engine.errors = [ServerFailedError("s died")]
    gathered = Gathered(engine)
    first, second = await asyncio.gather(ask(gathered, [1], 1, "a"), ask(gathered, [2], 2, "b"), return_exceptions=True)
    assert isinstance(first, ServerFailedError) and second == (0, 1)


@in_loop
async def test_one_that_is_cancelled_takes_nobody_along_and_the_last_ends_the_request() -> None:
    engine = Engine()
    gathered = Gathered(engine)
    first, second = ask(gathered, [1], 1, "a"), ask(gathered, [1], 2, "b")
    await until_asked(engine, 1)
    first.cancel()
    await asyncio.wait({first})
    engine.open.set()
    assert await second == (1, 2)
    engine.open.clear()
    calls = [ask(gathered, [1], 1, "c"), ask(gathered, [1], 1, "d")]
    await until_asked(engine, 2)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    while not engine.cancelled:
        await asyncio.sleep(0)
    assert engine.made == 3


@in_loop
async def test_a_caller_that_is_cancelled_before_the_request_is_sent_is_not_asked_for() -> None:
    engine = Engine()
    gathered = Gathered(engine)
    engine.open.set()
    call = ask(gathered, [1], 1, "a")
    await asyncio.sleep(0)  # it has asked; what it asks for is sent a turn later
    call.cancel()
    await asyncio.wait({call})
    assert await ask(gathered, [1], 1, "b") == (0,)
    assert [(n, name) for _, _, n, name in engine.asked] == [(1, "b")]
