"""When a request leaves a server that decodes slowly."""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from neox_rl.rollout.pace import FEWEST, Paces
from neox_rl.rollout.vllm_client import VllmGenerator
from tests.unit.test_vllm_client import GIVEN, PARAMS, good, scored, serve


@pytest.mark.parametrize(
    ("budget", "switches", "moves"),
    [(8, False, True), (10**9, False, False), (8, True, False)],
    ids=["far slower than another", "no longer than another may take", "at a switch of its version"],
)
def test_a_request_leaves_a_server_that_is_far_slower_than_another_once(budget: int, switches: bool, moves: bool) -> None:
    """A server is slow by what another would need for the whole budget: a long rollout is not moved for its length."""

    async def story() -> None:
        release, asked, told = asyncio.Event(), list[str](), list[str]()

        async def slow(request: web.Request) -> web.Response:
            asked.append("slow")
            await release.wait()
            return await good(request)

        async def quick(request: web.Request) -> web.Response:
            asked.append("quick")
            return await good(request)

        addresses, close = await serve([slow, quick])
        async with VllmGenerator(addresses[1:], 60.0, patience_s=0.05) as generator:
            generator.on_failure = lambda _, why: told.append(why)
            for _ in range(FEWEST):
                await generator.sample([1], PARAMS, 2, "g0")
            generator.suspend(addresses[1])
            generator.serve(addresses[0])
            one = asyncio.create_task(generator.sample([1], replace(PARAMS, max_tokens=budget), 2, "g1"))
            while asked[-1] != "slow":
                await asyncio.sleep(0.01)
            with generator.standing(addresses[0]) if switches else nullcontext():
                generator.serve(addresses[1])
                while not moves and len(looked) < 3:
                    await asyncio.sleep(0.01)
                if not moves:
                    release.set()
                assert len(await one) == 2 and generator.num_inflight == 0
            assert (generator._servers[addresses[0]].spared_until > 0) == moves and not told, "it answers, and is not suspended"
        assert asked[FEWEST:] == ["slow", "quick"][: 2 if moves else 1]
        await close()

    looked: list[float] = []
    due_s = Paces.due_s

    def seen(*args: Any) -> float:
        looked.append(due_s(*args))
        return looked[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Paces, "due_s", seen)
        asyncio.run(story())


def test_what_is_scored_leaves_a_server_that_is_far_slower_than_another_at_it() -> None:
    async def story() -> None:
        asked = asyncio.Event()

        async def stuck(_: web.Request) -> web.Response:
            asked.set()
            await asyncio.Event().wait()
            return web.Response()

        async def quick(request: web.Request) -> web.Response:
            scores = "prompt_logprobs" in (await request.json())["sampling_params"]
            return web.Response(body=scored([*GIVEN])) if scores else await good(request)

        addresses, close = await serve([stuck, quick])
        async with VllmGenerator(addresses[1:], 60.0, patience_s=0.05) as generator:
            for _ in range(FEWEST):
                await generator.score([4, 5], (6, 7), "g0")
            generator.suspend(addresses[1])
            generator.serve(addresses[0])
            one = asyncio.create_task(generator.score([4, 5], (6, 7), "g1"))
            await asyncio.wait_for(asked.wait(), 20.0)
            generator.serve(addresses[1])
            assert (await asyncio.wait_for(one, 20.0)).logprobs == (-0.25, -0.5)
        await close()

    asyncio.run(story())


def test_a_server_has_a_pace_for_what_it_samples_and_one_for_what_it_scores() -> None:
    paces = Paces()
    for _ in range(FEWEST):
        paces.answered("b", 1.0, 10)
        paces.answered("b", 1.0, 1000, scored=True)
    assert paces.due_s("a", ["a", "b"], 100, 0.0) == pytest.approx(3 * 100 * 0.1)
    assert paces.due_s("a", ["a", "b"], 1000, 0.0, scored=True) == pytest.approx(3 * 1.0)
    paces.forget("b")
    assert paces.due_s("a", ["a", "b"], 1000, 0.0, scored=True) == math.inf


def test_no_request_leaves_a_server_for_one_whose_pace_nobody_knows() -> None:
    paces = Paces()
    for _ in range(FEWEST - 1):
        paces.answered("b", 1.0, 10)
    assert paces.due_s("a", ["a", "b"], 100, 5.0) == math.inf
    paces.answered("b", 9.0, 10)
    assert paces.due_s("a", ["a", "b"], 100, 5.0) == pytest.approx(3 * 100 * 0.1)
    assert paces.due_s("a", ["a", "b"], 1, 5.0) == 5.0, "never before the heartbeat"
    assert paces.due_s("b", ["a", "b"], 1, 5.0) == math.inf
    paces.forget("b")
    assert paces.due_s("a", ["a", "b"], 1, 5.0) == math.inf
    paces.answered("b", 1.0, 10)
    assert paces.due_s("a", ["a", "b"], 1, 5.0) == math.inf, "what answers there now is another"


def test_a_pace_is_reckoned_when_a_server_answers_and_not_for_each_request_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    paces, reckoned = Paces(), list[int]()

    def median(answers: Collection[float]) -> float:
        reckoned.append(len(answers))
        return min(answers)

    monkeypatch.setattr(statistics, "median", median)
    for server in ("b", "c"):
        for _ in range(FEWEST + 1):
            paces.answered(server, 1.0, 10)
    for _ in range(100):
        assert paces.due_s("a", ["a", "b", "c"], 100, 5.0) == pytest.approx(3 * 100 * 0.1)
    assert reckoned == [FEWEST, FEWEST + 1] * 2
