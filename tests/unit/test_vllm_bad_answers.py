"""Servers that refuse requests, or answer without end: whose fault it is, and what becomes of the request."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest
from aiohttp import web

from neox_rl.bounded import most_bytes
from neox_rl.errors import GIVES_UP, RefusedError, ServerFailedError, WeightError, WireError, exit_status
from neox_rl.rollout.vllm_client import VllmGenerator
from neox_rl.rollout.vllm_completions import CompletionsGenerator
from neox_rl.rollout.vllm_control import VllmControl
from neox_rl.rollout.vllm_requests import request_body
from tests.unit.test_vllm_client import PARAMS, Handler, broken, good, serve


async def refuses(_: web.Request) -> web.Response:
    return web.Response(status=400, text="max_tokens is too large")


def test_a_request_that_every_server_refuses_is_asked_of_each_and_ends_with_their_words() -> None:
    async def story() -> None:
        addresses, close = await serve([refuses, refuses])
        async with VllmGenerator(addresses, 60.0) as generator:
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
        async with VllmGenerator(addresses, 60.0) as generator:
            generator.on_failure = lambda address, _: told.append(address)
            assert len(await generator.sample([1], PARAMS, 2, "g0")) == 2
        assert asked == ["/inference/v1/generate"] and told == addresses[:-1]
        await close()

    asyncio.run(story())


def test_a_request_that_the_only_serving_server_refuses_waits_for_another() -> None:
    async def story() -> None:
        addresses, close = await serve([refuses, good])
        async with VllmGenerator(addresses, 60.0) as generator:
            generator.suspend(addresses[1])
            generator.on_failure = lambda *_: generator.serve(addresses[1])
            assert len(await generator.sample([1], PARAMS, 2, "g0")) == 2
        await close()

    asyncio.run(story())


async def refuses_long(request: web.Request) -> web.Response:
    return await (refuses if (await request.json())["sampling_params"]["max_tokens"] > PARAMS.max_tokens else good)(request)


LONG = replace(PARAMS, max_tokens=PARAMS.max_tokens + 1)


def test_a_request_that_a_server_refuses_which_answers_others_ends_at_once_though_another_is_away() -> None:
    async def story() -> None:
        addresses, close = await serve([refuses_long, good])
        async with VllmGenerator(addresses, 60.0) as generator:
            generator.suspend(addresses[1])
            await generator.sample([1], PARAMS, 2, "g0")
            with pytest.raises(RefusedError, match=r"rollout g000017: .*max_tokens is too large.*raise seq_length or lower") as caught:
                await asyncio.wait_for(generator.sample([1], LONG, 2, "g000017"), 20.0)
            assert exit_status(caught.value) == GIVES_UP
            generator.serve(addresses[1])
            assert len(await generator.sample([1], LONG, 2, "g000017")) == 2, "one that serves is asked"
        await close()

    asyncio.run(story())


def test_a_request_that_waits_after_a_refusal_ends_once_that_server_answers_another() -> None:
    async def story() -> None:
        addresses, close = await serve([refuses_long, good])
        refused = asyncio.Event()
        async with VllmGenerator(addresses, 60.0) as generator:
            generator.on_failure = lambda *_: refused.set()
            generator.suspend(addresses[1])
            await generator.sample([1], PARAMS, 2, "g0")
            generator.move(addresses[0])
            generator.serve(addresses[0])  # started again: what answered there was another
            waiting = asyncio.create_task(generator.sample([1], LONG, 2, "g1"))
            await asyncio.wait_for(refused.wait(), 20.0)
            assert not waiting.done()
            await generator.sample([1], PARAMS, 2, "g2")
            with pytest.raises(RefusedError):
                await asyncio.wait_for(waiting, 20.0)
        await close()

    asyncio.run(story())


def test_a_request_whose_other_server_leaves_does_not_wait_for_it() -> None:
    async def story() -> None:
        addresses, close = await serve([refuses, good])
        refused = asyncio.Event()
        async with VllmGenerator(addresses, 60.0) as generator:
            generator.on_failure = lambda *_: refused.set()
            generator.suspend(addresses[1])
            waiting = asyncio.create_task(generator.sample([1], PARAMS, 2, "g0"))
            await asyncio.wait_for(refused.wait(), 20.0)
            generator.forget(addresses[1])
            with pytest.raises(WireError, match="max_tokens is too large") as caught:
                await asyncio.wait_for(waiting, 20.0)
            assert exit_status(caught.value) != GIVES_UP, "nobody knows whether it is the server"
        await close()

    asyncio.run(story())


def in_turn(*answers: Handler) -> Handler:
    """Each answers one request, the last all others."""
    left = list(answers)

    async def handler(request: web.Request) -> web.StreamResponse:
        return await (left.pop(0) if len(left) > 1 else left[0])(request)

    return handler


async def busy(_: web.Request) -> web.Response:
    return web.Response(status=429, text="too many requests")


def test_a_server_that_refuses_for_a_moment_fails_the_request_whose_ticket_is_tried_again() -> None:
    async def story() -> None:
        addresses, close = await serve([in_turn(good, busy, busy, good), good])
        async with VllmGenerator(addresses[:1], 60.0) as generator:
            await generator.sample([1], PARAMS, 2, "g0")
            with pytest.raises(ServerFailedError, match=r"429.*too many requests"):
                await generator.sample([1], PARAMS, 2, "g1")
            generator.suspend(addresses[1])
            generator.on_failure = lambda *_: generator.serve(addresses[1])
            assert len(await generator.sample([1], PARAMS, 2, "g2")) == 2, "one that is suspended is waited for"
        await close()

    asyncio.run(story())


def test_where_one_of_all_refuses_for_a_moment_only_the_ticket_is_tried_again() -> None:
    async def story() -> None:
        addresses, close = await serve([refuses, busy])
        async with VllmGenerator(addresses, 60.0) as generator:
            with pytest.raises(ServerFailedError, match="too many requests"):
                await generator.sample([1], PARAMS, 2, "g0")
        await close()

    asyncio.run(story())


def test_what_a_server_refused_before_it_was_started_again_does_not_count() -> None:
    async def story() -> None:
        addresses, close = await serve([in_turn(good, refuses, refuses, good), busy])
        async with VllmGenerator(addresses, 60.0) as generator:

            def again(address: str, _: str = "") -> None:
                generator.move(address)
                generator.serve(address)

            generator.suspend(addresses[1])
            await generator.sample([1], PARAMS, 2, "g0")
            again(addresses[0])
            generator.on_failure = again
            assert len(await asyncio.wait_for(generator.sample([1], PARAMS, 2, "g1"), 20.0)) == 2
        await close()

    asyncio.run(story())


def test_a_request_that_a_server_refuses_once_and_then_answers_is_no_failure() -> None:
    async def story() -> None:
        addresses, close = await serve([in_turn(good, refuses, good)])
        told: list[str] = []
        async with VllmGenerator(addresses, 60.0) as generator:
            generator.on_failure = lambda _, why: told.append(why)
            await generator.sample([1], PARAMS, 2, "g0")
            assert len(await generator.sample([1], PARAMS, 2, "g1")) == 2 and told == []
        await close()

    asyncio.run(story())


async def endless(request: web.Request) -> web.StreamResponse:
    """As JSON, so that nobody could take it for the end."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        await response.write(b'{"x": "')
        while True:
            await response.write(b"x" * (1 << 16))
    return response


def test_an_answer_without_end_is_its_servers_failure_and_read_no_further_than_the_request_can_take() -> None:
    most = most_bytes(request_body([1], PARAMS, 2), 2 * PARAMS.max_tokens)
    words = f"/inference/v1/generate answered with more than {most} bytes"

    async def story() -> None:
        addresses, close = await serve([endless, good])
        told: list[str] = []
        async with VllmGenerator(addresses, 60.0) as generator:
            generator.on_failure = lambda _, why: told.append(why)
            assert len(await generator.sample([1], PARAMS, 2, "g0")) == 2
        assert told == [f"{addresses[0]}{words}, which nothing that it was asked takes"]
        await close()

    asyncio.run(story())


@pytest.mark.parametrize("kind", [VllmControl, CompletionsGenerator])
def test_control_and_completions_read_no_answer_without_end(kind: type[VllmControl] | type[CompletionsGenerator]) -> None:
    async def story() -> None:
        app = web.Application()
        app.router.add_get("/weight_info", endless)
        app.router.add_get("/v1/models", endless)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        failure = WeightError if kind is VllmControl else ServerFailedError
        with pytest.raises(failure, match=r"answered with more than [0-9]+ bytes"):
            async with kind(f"http://127.0.0.1:{runner.addresses[0][1]}") as peer:
                assert isinstance(peer, VllmControl)
                await peer.live_version(60.0)
        await runner.cleanup()

    asyncio.run(story())
