"""The client against HTTP servers that answer as vLLM does, badly, or not at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from neox_rl.errors import DeadlineError, ServerFailedError, WeightError, WireError
from neox_rl.rollout import vllm_client
from neox_rl.rollout.vllm_client import (
    NobodyServesError,
    VllmGenerator,
    parse_response,
    parse_score,
)
from neox_rl.rollout.vllm_requests import request_body, score_body
from neox_rl.types import Completion, Finish, SamplingParams, VersionSpan

PARAMS = SamplingParams(max_tokens=8, temperature=0.7, stop_token_ids=(2,))
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def choice(index: int = 0, ids: tuple[int, ...] = (5, 6, 2), **changed: Any) -> dict[str, Any]:
    content = [{"token_id": token, "logprob": -0.5 * token, "rank": 1, "top_logprobs": []} for token in ids]
    versions = [{"version": "3", "start": 0, "end": len(ids)}]
    return {
        "index": index,
        "token_ids": list(ids),
        "logprobs": {"content": content},
        "finish_reason": "stop",
        "stop_reason": 2,
        "weight_versions": versions,
    } | changed


def answer(*choices: dict[str, Any]) -> bytes:
    return json.dumps({"request_id": "x", "choices": choices, "usage": {}}).encode()


def test_a_completion_carries_tokens_logprobs_versions_and_the_reason_it_ended() -> None:
    spans = [{"version": "3", "start": 0, "end": 2}, {"version": "5", "start": 2, "end": 3}]
    second = choice(1, (7,), finish_reason="length")
    got = parse_response(answer(second, choice(0, weight_versions=spans)), 2, "s")
    assert got == (
        Completion((5, 6, 2), (-2.5, -3.0, -1.0), (VersionSpan(3, 0, 2), VersionSpan(5, 2, 3)), Finish.STOP),
        Completion((7,), (-3.5,), (VersionSpan(3, 0, 1),), Finish.LENGTH),
    )


def test_an_aborted_request_is_the_failure_of_a_server_that_is_being_ended() -> None:
    with pytest.raises(ServerFailedError, match="s aborted the request"):
        parse_response(answer(choice(0, (), finish_reason="abort", weight_versions=None)), 1, "s")


def scored(chances: list[dict[str, Any] | None], **changed: Any) -> bytes:
    return json.dumps({"choices": [choice(0, (9,), **changed)], "prompt_logprobs": chances}).encode()


GIVEN = [None, {"5": {"logprob": -1.0, "rank": 2, "decoded_token": None}}, {"6": {"logprob": -0.25}}, {"7": {"logprob": -0.5}}]


def test_given_tokens_are_scored_by_the_version_of_the_token_that_was_sampled_in_the_same_pass() -> None:
    assert parse_score(scored([*GIVEN]), (6, 7), "s") == Completion((6, 7), (-0.25, -0.5), (VersionSpan(3, 0, 2),), Finish.STOP)
    body = json.loads(score_body([4, 5], (6, 7)))
    assert body["token_ids"] == [4, 5, 6, 7]
    sampling = body["sampling_params"]
    assert (sampling["prompt_logprobs"], sampling["max_tokens"], sampling["temperature"]) == (0, 1, 1.0)


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (answer(choice(0, (9,))), "prompt_logprobs"),
        (scored([None, {"7": {"logprob": -0.5}}]), "1 log-probs that belong to the 2 tokens"),
        (scored([*GIVEN[:3], {"8": {"logprob": -0.5}}]), "1 log-probs that belong to the 2 tokens"),
        (scored([*GIVEN[:3], {"7": {"logprob": -9999.0}}]), "scored token with a log-prob that is not finite"),
        (scored([*GIVEN], token_ids=[], logprobs={"content": []}, weight_versions=None), "does not say by which version"),
    ],
)
def test_a_score_that_cannot_be_is_refused(raw: bytes, complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        parse_score(raw, (6, 7), "s")


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"<html>", "not JSON"),
        (b"{}", "choices"),
        (answer(choice(0, finish_reason="tired")), "tired"),
        (answer(choice(0), choice(0)), "2 choices where 1"),
        (answer(choice(1)), "1 choices where 1"),
        (answer(choice(0, logprobs=None)), "logprobs"),
        (answer(choice(0, token_ids=[5, 6])), "do not belong"),
        (answer(choice(0, token_ids=[5, 6, 7])), "do not belong"),
        (answer(choice(0, logprobs={"content": [{"token_id": t, "logprob": -9999.0} for t in (5, 6, 2)]})), "not finite"),
        (answer(choice(0, weight_versions=None)), "do not cover 3 tokens"),
        (answer(choice(0, weight_versions=[{"version": "3", "start": 0, "end": 2}])), "do not cover 3 tokens"),
        (answer(choice(0, weight_versions=[{"version": "3", "start": 1, "end": 3}])), "do not cover 3 tokens"),
        (
            answer(choice(0, weight_versions=[{"version": "3", "start": 0, "end": 3}, {"version": "3", "start": 3, "end": 3}])),
            "do not cover",
        ),
        (
            answer(choice(0, weight_versions=[{"version": "3", "start": 0, "end": 3}, {"version": "3", "start": 0, "end": 3}])),
            "do not cover",
        ),
        (answer(choice(0, logprobs={"content": [{"token_id": t, "logprob": -9999.0 * (t == 6)} for t in (5, 6, 2)]})), "not finite"),
        (
            answer(choice(0, weight_versions=[{"version": "3", "start": 0, "end": 2}, {"version": "2", "start": 2, "end": 3}])),
            "versions fall",
        ),
    ],
)
def test_an_answer_that_cannot_be_is_refused_with_the_server_and_the_reason(raw: bytes, complaint: str) -> None:
    with pytest.raises(WireError, match=complaint) as caught:
        parse_response(raw, 1, "http://s:1")
    assert "http://s:1" in str(caught.value)


def test_what_dummy_weights_made_is_the_failure_of_a_server_that_was_started_again() -> None:
    with pytest.raises(ServerFailedError, match="http://s:1 generated with dummy weights"):
        parse_response(answer(choice(0, weight_versions=[{"version": "default", "start": 0, "end": 3}])), 1, "http://s:1")


def test_a_label_that_is_no_version_is_refused() -> None:
    with pytest.raises(WeightError, match="'mine'"):
        parse_response(answer(choice(0, weight_versions=[{"version": "mine", "start": 0, "end": 3}])), 1, "s")


def test_the_request_asks_for_n_completions_of_one_prompt_with_the_logprob_of_the_sampled_token() -> None:
    body = json.loads(request_body([1, 2], PARAMS, 4))
    assert body["token_ids"] == [1, 2]
    sampling = body["sampling_params"]
    assert (sampling["n"], sampling["logprobs"], sampling["max_tokens"], sampling["temperature"]) == (4, 0, 8, 0.7)
    assert sampling["stop_token_ids"] == [2] and "seed" not in sampling


async def serve(handlers: list[Handler]) -> tuple[list[str], Callable[[], Awaitable[None]]]:
    runners, addresses = [], []
    for handler in handlers:
        app = web.Application()
        app.router.add_post("/inference/v1/generate", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        runners.append(runner)
        addresses.append(f"http://127.0.0.1:{runner.addresses[0][1]}")

    async def close() -> None:
        for runner in runners:
            await runner.cleanup()

    return addresses, close


async def good(request: web.Request) -> web.Response:
    body = await request.json()
    return web.Response(body=answer(*(choice(i) for i in range(body["sampling_params"]["n"]))))


async def broken(_: web.Request) -> web.Response:
    return web.Response(status=500, text="EngineDeadError")


async def hangs_up(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def silent(_: web.Request) -> web.Response:
    await asyncio.sleep(600)
    return web.Response()


async def aborts(request: web.Request) -> web.Response:
    body = await request.json()
    found = [choice(i, (), finish_reason="abort", weight_versions=None) for i in range(body["sampling_params"]["n"])]
    return web.Response(body=answer(*found))


async def no_number(_: web.Request) -> web.Response:
    return web.Response(body=answer(choice(0, logprobs={"content": [{"token_id": t, "logprob": -9999.0} for t in (5, 6, 2)]})))


async def of_somebody_else(_: web.Request) -> web.Response:
    return web.Response(body=answer(choice(0, weight_versions=[{"version": "mine", "start": 0, "end": 3}]), choice(1)))


async def too_deep(_: web.Request) -> web.Response:
    return web.Response(body=b'{"x":' + b"[" * 200_000)


@pytest.mark.parametrize("bad", [broken, hangs_up, aborts, no_number, of_somebody_else, too_deep])
def test_a_request_that_a_server_failed_goes_to_another(bad: Handler) -> None:
    async def story() -> None:
        addresses, close = await serve([bad, good])
        told: list[tuple[str, str]] = []
        async with VllmGenerator(addresses, 60.0) as generator:
            generator.on_failure = lambda address, why: told.append((address, why))
            assert len(await generator.sample([1], PARAMS, 2, "g0")) == 2
            assert generator.num_inflight == 0
        assert [address for address, _ in told] == addresses[:1] and told[0][1].startswith(addresses[0])
        await close()

    asyncio.run(story())


def test_retries_are_bounded_and_every_failure_is_told() -> None:
    async def story() -> None:
        addresses, close = await serve([broken, broken])
        async with VllmGenerator([*addresses, "http://127.0.0.1:1"], 60.0, max_attempts=3) as generator:
            with pytest.raises(ServerFailedError, match="g000017: 3 attempts failed") as caught:
                await generator.sample([1], PARAMS, 2, "g000017")
            assert all(address in str(caught.value) for address in [*addresses, "http://127.0.0.1:1"])
        await close()

    asyncio.run(story())


def test_a_deadline_names_the_rollout_and_the_server() -> None:
    async def story() -> None:
        addresses, close = await serve([silent])
        async with VllmGenerator(addresses, 0.1) as generator:
            for _ in range(2):  # alone, it is asked again
                with pytest.raises(DeadlineError, match=f"rollout g000017 from {addresses[0]}"):
                    await generator.sample([1], PARAMS, 2, "g000017")
                assert generator.num_inflight == 0
        await close()

    asyncio.run(story())


def test_what_a_server_did_not_make_in_time_goes_to_another_though_that_has_more_in_flight() -> None:
    async def story() -> None:
        release = asyncio.Event()

        async def busy(request: web.Request) -> web.Response:
            await release.wait()
            return await good(request)

        addresses, close = await serve([silent, busy])
        async with VllmGenerator(addresses, 0.5) as generator:
            with pytest.raises(DeadlineError, match=addresses[0]):
                await generator.sample([1], PARAMS, 2, "g0")
            generator._timeout_s = 60.0
            tasks = [asyncio.create_task(generator.sample([1], PARAMS, n, "g0")) for n in (8, 2)]
            await asyncio.sleep(0)
            assert generator.inflight == dict(zip(addresses, (0, 10), strict=True))
            release.set()
            assert [len(completions) for completions in await asyncio.gather(*tasks)] == [8, 2]
        await close()

    asyncio.run(story())


@pytest.mark.parametrize(("spared_s", "asked"), [(60.0, 1), (0.0, 2)])
def test_a_server_that_failed_once_comes_last_for_a_while_and_not_for_good(
    spared_s: float, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_client, "SPARED_S", spared_s)
    seen: list[str] = []

    async def fails_once(request: web.Request) -> web.Response:
        seen.append(request.path)
        return await (broken if len(seen) == 1 else good)(request)

    async def story() -> None:
        addresses, close = await serve([fails_once, good])
        async with VllmGenerator(addresses, 60.0) as generator:
            for _ in range(2):
                assert len(await generator.sample([1], PARAMS, 2, "g0")) == 2
        assert len(seen) == asked
        await close()

    asyncio.run(story())


def test_a_failure_late_in_the_time_that_a_server_is_spared_makes_that_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(vllm_client.time, "monotonic", lambda: now[0])
    generator = VllmGenerator(["http://a"], 1.0)
    for at, until in ((100.0, 110.0), (101.0, 111.0), (110.9, 120.9), (121.0, 141.0)):
        now[0] = at
        generator._spare("http://a")
        assert generator._servers["http://a"].spared_until == until
    generator.serve("http://a")
    assert generator._servers["http://a"].spared_until == 141.0
    generator.move("http://a")
    generator.serve("http://a")
    assert generator._servers["http://a"].spared_until == 0.0, "it was started anew"


def test_requests_go_to_the_server_with_the_fewest_completions_in_flight() -> None:
    async def story() -> None:
        release = asyncio.Event()
        seen: list[list[int]] = [[], []]

        def holds(server: int) -> Handler:
            async def handle(request: web.Request) -> web.Response:
                seen[server].append((await request.json())["sampling_params"]["n"])
                await release.wait()
                return await good(request)

            return handle

        addresses, close = await serve([holds(0), holds(1)])
        async with VllmGenerator(addresses, 60.0) as generator:
            tasks = []
            for n in (8, 2, 2, 2, 4):
                tasks.append(asyncio.create_task(generator.sample([1], PARAMS, n, "g0")))
                while sum(map(len, seen)) < len(tasks):
                    await asyncio.sleep(0.01)
            assert generator.num_inflight == 18
            release.set()
            assert [len(completions) for completions in await asyncio.gather(*tasks)] == [8, 2, 2, 2, 4]
        assert seen == [[8], [2, 2, 2, 4]]
        await close()

    asyncio.run(story())


def test_a_request_waits_for_a_server_that_serves_and_names_that_when_none_comes() -> None:
    async def story() -> None:
        addresses, close = await serve([good])
        async with VllmGenerator((), 60.0) as generator:
            waiting = asyncio.create_task(generator.sample([1], PARAMS, 2, "g0"))
            await asyncio.sleep(0.02)
            generator.suspend(addresses[0])
            await asyncio.sleep(0.02)
            assert not waiting.done()
            generator.serve(addresses[0])
            assert len(await waiting) == 2
        async with VllmGenerator((), 0.1) as generator:
            generator.suspend("http://h:1")
            with pytest.raises(NobodyServesError, match=r"rollout g000017 from a server that serves.*no requests go to http://h:1"):
                await generator.sample([1], PARAMS, 2, "g000017")
        await close()

    asyncio.run(story())


def test_what_is_in_flight_on_a_server_that_is_taken_out_begins_again_elsewhere_without_counting_as_a_failure() -> None:
    async def story() -> None:
        addresses, close = await serve([silent, good])
        async with VllmGenerator(addresses[:1], 60.0, max_attempts=1) as generator:
            moved = asyncio.create_task(generator.sample([1], PARAMS, 4, "g0"))
            await asyncio.sleep(0.05)
            generator.move(addresses[0])
            await asyncio.sleep(0.05)
            assert generator.inflight == {addresses[0]: 4}, "nobody else could make it: it stays, should the server come back"
            generator.serve(addresses[1])
            assert len(await moved) == 4 and generator.num_inflight == 0
            generator.forget(addresses[0])
            assert generator.inflight == {addresses[1]: 0}
        await close()

    asyncio.run(story())


def test_a_cancelled_request_leaves_nothing_in_flight() -> None:
    async def story() -> None:
        addresses, close = await serve([silent])
        async with VllmGenerator(addresses, 60.0) as generator:
            task = asyncio.create_task(generator.sample([1], PARAMS, 4, "g0"))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert generator.num_inflight == 0
        await close()

    asyncio.run(story())
