"""A server that refuses requests, beside others and alone: whose fault it is."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from neox_rl.errors import WireError
from neox_rl.rollout.vllm_client import VllmGenerator
from tests.unit.test_vllm_client import PARAMS, Handler, broken, good, serve


async def refuses(_: web.Request) -> web.Response:
    return web.Response(status=400, text="max_tokens is too large")


def test_a_request_that_every_server_refuses_is_asked_of_each_once_and_ends_with_their_words() -> None:
    async def story() -> None:
        addresses, close = await serve([refuses, refuses])
        async with VllmGenerator(addresses, 5.0) as generator:
            with pytest.raises(WireError, match=r"400.*max_tokens is too large"):
                await generator.sample([1], PARAMS, 2, "g0")
        await close()

    asyncio.run(story())


@pytest.mark.parametrize("others", [[good], [broken, good]])
def test_a_request_that_one_server_refuses_goes_to_others_and_not_there_again(others: list[Handler]) -> None:
    asked: list[str] = []

    async def has_no_route(request: web.Request) -> web.Response:
        asked.append(request.path)
        raise web.HTTPNotFound

    async def story() -> None:
        addresses, close = await serve([has_no_route, *others])
        told: list[str] = []
        async with VllmGenerator(addresses, 5.0) as generator:
            generator.on_failure = lambda address, _: told.append(address)
            assert len(await generator.sample([1], PARAMS, 2, "g0")) == 2
        assert asked == ["/inference/v1/generate"] and told == addresses[:-1]
        await close()

    asyncio.run(story())


def test_a_request_that_the_only_serving_server_refuses_waits_for_another() -> None:
    async def story() -> None:
        addresses, close = await serve([refuses, good])
        async with VllmGenerator(addresses, 5.0) as generator:
            generator.suspend(addresses[1])
            generator.on_failure = lambda *_: generator.serve(addresses[1])
            assert len(await generator.sample([1], PARAMS, 2, "g0")) == 2
        await close()

    asyncio.run(story())
