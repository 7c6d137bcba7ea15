"""A reward model whose server is started again while searches ask it: they wait, and end only where it does not come back."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from neox_rl.errors import ConfigError, DeadlineError, NeoxRLError, ServerFailedError, WireError
from neox_rl.run.endpoints import free_port
from neox_rl.run.search_groups import reward_model
from neox_rl.run.served_value import ServedValue
from neox_rl.search.reward_model import WordValue, value_ids
from neox_rl.search.scorers import PrmValue, ServedScorer, TextsRefusedError
from neox_rl.types import SamplingParams
from tests.unit.search_worlds import TOKENIZER
from tests.unit.small_run import small_config
from tests.unit.test_search_rollouts import TASK, Sloppy, maker
from tests.unit.test_search_values import position


class Classifier:
    """A served classifier at one port: ``start``, ``stop``; ``last``: after so many requests it answers 500 and must be started again."""

    def __init__(self) -> None:
        self.port, self.asked, self.last = free_port("127.0.0.1"), 0, 10**9
        self._runner: web.AppRunner | None = None

    async def _classify(self, request: web.Request) -> web.Response:
        self.asked += 1
        if self.asked > self.last:
            return web.json_response({"error": "the engine is dead"}, status=500)
        texts = (await request.json())["input"]
        return web.json_response({"data": [{"index": i, "probs": [0.5, 0.5]} for i, _ in enumerate(texts)]})

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/classify", self._classify)]

    async def start(self) -> None:
        app = web.Application()
        app.add_routes(self.routes())
        self._runner, self.last = web.AppRunner(app), 10**9
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def test_a_search_waits_for_a_reward_model_that_is_started_again(tmp_path: Path) -> None:
    """It dies in the middle of a group, answering 500 as vLLM does while it ends, and is away for longer than any request's retries."""

    async def story(prm: Classifier) -> None:
        config = small_config(
            tmp_path, rollout={"method": "search"}, search={"value": "prm", "prm_server": prm.address, "prm_model": "prm"}
        )
        async with AsyncExitStack() as stack:
            value = await reward_model(config, stack)
            assert isinstance(value, ServedValue) and value.deadline_s == config.metarl.servers.start_timeout_s
            await prm.start()
            prm.last = 3
            served = replace(value, retry_s=0.05)
            groups = replace(maker(Sloppy(), nodes=30, strategy="bfs"), value=lambda _: served)
            making = asyncio.create_task(groups.group(TASK, 4, SamplingParams(8), 1))
            while prm.asked <= prm.last:
                assert not making.done(), making
                await asyncio.sleep(0.01)
            await prm.stop()
            asked = prm.asked
            await asyncio.sleep(0.5)
            assert not making.done()
            await prm.start()
            group = await asyncio.wait_for(making, 60.0)
            await prm.stop()
            assert prm.asked > asked and all(trace.finish.value != "abort" for trace in group.traces)

    asyncio.run(story(Classifier()))


class WordServer(Classifier):
    """A reward model of this project, as ``vllm serve`` has it."""

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "prm", "max_model_len": 64}]})

    async def _complete(self, request: web.Request) -> web.Response:
        self.asked += 1
        tops = {f"token_id:{i}": -1.0 for i in value_ids(TOKENIZER)}
        prompts = (await request.json())["prompt"]
        return web.json_response({"choices": [{"index": i, "logprobs": {"top_logprobs": [tops]}} for i, _ in enumerate(prompts)]})

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/v1/models", self._models), web.post("/v1/completions", self._complete)]


def test_a_run_that_begins_while_its_reward_model_is_away_has_its_searches_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who trains hears nothing of a run that does not begin."""
    TOKENIZER.save(tmp_path / "prm")

    async def story(prm: WordServer) -> None:
        search = {"value": "prm", "prm_server": prm.address, "prm_model": str(tmp_path / "prm")}
        async with AsyncExitStack() as stack:
            value = await reward_model(small_config(tmp_path, rollout={"method": "search"}, search=search), stack)
            assert isinstance(value, ServedValue) and f"reward model at {prm.address} does not answer yet" in caplog.text
            served = replace(value, retry_s=0.05)
            asking = [asyncio.create_task(served.score([position("7 *3 =21")], None)) for _ in range(3)]
            while "waits for the reward model" not in caplog.text:
                await asyncio.sleep(0.01)
            assert not any(task.done() for task in asking)
            await prm.start()
            assert [scores.values for scores in await asyncio.wait_for(asyncio.gather(*asking), 60.0)] == [[0.5]] * 3
        await prm.stop()

    asyncio.run(story(WordServer()))


def test_a_run_whose_reward_model_is_no_vllm_server_ends_at_once(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "prm")

    async def story(prm: Classifier) -> None:
        await prm.start()
        search = {"value": "prm", "prm_server": prm.address, "prm_model": str(tmp_path / "prm")}
        async with AsyncExitStack() as stack:
            with pytest.raises(WireError, match="/v1/models with 404"):
                await reward_model(small_config(tmp_path, rollout={"method": "search"}, search=search), stack)
        await prm.stop()

    asyncio.run(story(Classifier()))


def test_one_that_does_not_come_back_ends_the_search_and_says_the_fix() -> None:
    async def story(prm: Classifier) -> None:
        value = ServedValue(PrmValue(ServedScorer(prm.address, "prm")), prm.address, 0.2, retry_s=0.05)
        with pytest.raises(
            ConfigError, match=rf"prm_server = {prm.address}: no value for 0.2 s .servers.start_timeout_s.*start that server"
        ):
            await replace(maker(Sloppy(), strategy="bfs"), value=lambda _: value).group(TASK, 4, SamplingParams(8), 1)

    asyncio.run(story(Classifier()))


@pytest.mark.parametrize(
    ("failure", "asked"),
    [
        (ServerFailedError("its connection broke"), 2),
        (DeadlineError("its answer", 120.0), 2),
        (WireError("it refused with 404"), 1),
        (TextsRefusedError("too long"), 1),
    ],
)
def test_only_what_a_new_start_can_mend_is_waited_for(failure: NeoxRLError, asked: int) -> None:
    class Model:
        """Of this project, as ``vllm serve`` has it: it fails once."""

        asked = 0

        async def next_token(self, prompts: Sequence[Sequence[int]], ids: Sequence[int]) -> Sequence[Sequence[float]]:
            self.asked += 1
            if self.asked == 1:
                raise failure
            return [(-1.0, -1.0)] * len(prompts)

    model = Model()
    value = ServedValue(WordValue(model, TOKENIZER), "http://there", 60.0, retry_s=0.01)
    if asked == 1:
        with pytest.raises(type(failure)):
            asyncio.run(value.score([position("7 *3 =21")], None))
    else:
        assert asyncio.run(value.score([position("7 *3 =21")], None)).values == [0.5]
    assert model.asked == asked


def test_one_whose_machine_drops_what_comes_is_asked_until_the_deadline_and_twice_at_least() -> None:
    async def story(prm: Classifier) -> None:
        with socket.create_server(("127.0.0.1", prm.port)):  # it takes connections, and nobody reads what comes
            value = ServedValue(PrmValue(ServedScorer(prm.address, "prm", deadline_s=0.1)), prm.address, 0.05, retry_s=0.01)
            with pytest.raises(ConfigError, match=r"no value for 0.05 s .*1 scores from .*start that server"):
                await value.score([position("7 *3 =21")], None)

    began = time.monotonic()
    asyncio.run(story(Classifier()))
    assert time.monotonic() - began >= 0.2, "a single late answer takes longer than the deadline"
