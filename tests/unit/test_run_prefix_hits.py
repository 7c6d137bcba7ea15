"""The prefix caches of a run's servers, as their engines count: over restarts, and over servers that do not answer or do not count."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from aiohttp import web

from neox_rl.run.prefix_hits import PrefixHits
from tests.unit.test_search_scorers import server


class Engine:
    """A server's counters, which begin anew with it."""

    def __init__(self) -> None:
        self.queries = self.hits = 0

    async def metrics(self, request: web.Request) -> web.Response:
        text = f'vllm:prefix_cache_queries_total{{engine="0"}} {self.queries}\nvllm:prefix_cache_hits_total{{engine="0"}} {self.hits}\n'
        return web.Response(text=text)


async def nothing(request: web.Request) -> web.Response:
    return web.Response(text="python_info 1.0\n")


def test_hits_are_summed_over_servers_and_their_restarts() -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            one, other = Engine(), Engine()
            one.queries, one.hits = 1000, 1000  # of whoever asked it before
            addresses = [await stack.enter_async_context(server(metrics=engine.metrics)) for engine in (one, other)]
            addresses += [await stack.enter_async_context(server(metrics=nothing)), "http://127.0.0.1:1"]
            caches = PrefixHits(lambda: addresses)
            await caches.look()
            assert caches.rate is None, "nobody was asked for anything"
            one.queries, one.hits, other.queries, other.hits = 1100, 1050, 100, 90
            await caches.look()
            await caches.look()
            assert caches.rate == 140 / 200, "what was seen counts once"
            one.queries, one.hits, other.queries = 40, 40, 160  # one was started again
            await caches.look()
            assert caches.rate == 140 / 260, "what it counted before this look is the base again"
            one.queries, one.hits = 80, 80
            await caches.look()
            assert caches.rate == 180 / 300

    asyncio.run(story())


def test_a_server_that_left_is_forgotten_and_counted_anew_when_it_comes_back() -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            engine = Engine()
            here = {await stack.enter_async_context(server(metrics=engine.metrics))}
            addresses = set(here)
            caches = PrefixHits(lambda: addresses)
            await caches.look()
            engine.queries, engine.hits = 10, 10
            await caches.look()
            addresses.clear()
            await caches.look()
            engine.queries = 500  # another server at its address, whose counters have passed those
            addresses |= here
            await caches.look()
            assert caches.rate == 1.0

    asyncio.run(story())
