"""Values by models: what each is told, and what it does when the model fails or cannot read a path."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from neox_rl.errors import DeadlineError, NeoxRLError, ServerFailedError, WireError
from neox_rl.rollout.vllm_completions import CompletionsGenerator
from neox_rl.search.arithmetic_domain import ArithmeticDomain
from neox_rl.search.earlier import MAX_EARLIER_CHARS, told_before_path, told_earlier
from neox_rl.search.growth import Budget
from neox_rl.search.reward_model import WordValue, value_context, value_trace
from neox_rl.search.scorers import JUDGE_PROMPT, JudgeValue, PrmValue, ScorerFailedError, ServedScorer, TextsRefusedError, path_text
from neox_rl.search.search import Search
from neox_rl.search.strategy import Options
from neox_rl.search.values import Scores
from neox_rl.types import Completion, End, Finish, Node, Reason, SamplingParams, Tree, Verdict
from tests.unit.search_worlds import TOKENIZER, RandomPlayer, countdown, policy
from tests.unit.test_search_values import GOOD, TASK, position, score


def test_a_process_reward_model_sees_the_path_and_the_meta_critic_earlier_attempts_too() -> None:
    seen: list[str] = []

    class Scorer:
        async def score(self, texts: Sequence[str]) -> Sequence[float]:
            seen.extend(texts)
            return [0.25] * len(texts)

    tried = replace(position("7 *3 =21"), visited=lambda: BEFORE)
    assert score(PrmValue(Scorer()), tried).values == [0.25]
    assert score(PrmValue(Scorer(), sees_earlier=True), tried).values == [0.25]
    assert seen[0] == f"{TASK.prompt}\n7 *3 =21\n"
    assert seen[1] == f"{TASK.prompt}\nThe search so far:\n7 +5 =12 12 +3 =15 low back 7 -5 =2\n\nNow:\n7 *3 =21\n"


WRONG = Verdict(False, "15", Reason.MISMATCH, 0.0)
BEFORE = Tree(TASK.id, (Node(0, -1, "", 0), Node(1, 0, "7 +5 =12", 1), Node(2, 1, "12 +3 =15", 2, verdict=WRONG), Node(3, 0, "7 -5 =2", 3)))
"""Two steps down to a wrong end, and another one from the root."""


def test_a_meta_critic_is_told_the_search_so_far_and_the_way_back_as_far_as_it_fits() -> None:
    here = replace(position("7 *3 =21"), visited=lambda: BEFORE)
    told = told_earlier(BEFORE, TASK)
    assert told.texts == ("7 +5 =12", "12 +3 =15 low", "back", "7 -5 =2") and told.depth == 1
    assert told_earlier(BEFORE, TASK, 25).texts == ("back", "7 -5 =2") and told_earlier(BEFORE, TASK, 0).texts == ()
    asked: list[str] = []

    class Model:
        async def next_token(self, prompts: Sequence[Sequence[int]], ids: Sequence[int]) -> Sequence[Sequence[float]]:
            asked.extend(map(TOKENIZER.decode, prompts))
            return [(-1.0, -1.0)] * len(prompts)

    for room in (0, 19, 100):
        assert score(WordValue(Model(), TOKENIZER, sees_earlier=True, max_context=room), here).values == [0.5]
    whole = f"{TASK.prompt} 7 +5 =12 12 +3 =15 low back 7 -5 =2 back 7 *3 =21"
    assert asked == [whole, f"{TASK.prompt} back 7 -5 =2 back 7 *3 =21", whole]
    trained = value_trace(TASK, ["7 *3 =21"], True, TOKENIZER, "", told_before_path(told, TASK))
    assert TOKENIZER.decode(trained.segments[0].ids) == whole, "in training as when it is asked"
    judge = Says("sure", "sure", "sure")
    assert score(JudgeValue(judge, judge, sees_earlier=True), here).values == [1.0] and "12 +3 =15 low" in judge.asked
    room = len(judge.encode(JUDGE_PROMPT.replace("{path}", path_text(here)))) + JudgeValue(judge, judge).max_tokens
    assert score(JudgeValue(judge, judge, sees_earlier=True, max_context=room), here).values == [1.0] and "12 +3" not in judge.asked


class Says:
    """A tokenizer and a generator of votes: what each says is its own index."""

    eos_id, vocab_size = 0, 10

    def __init__(self, *votes: str) -> None:
        self.votes = votes

    def encode(self, text: str) -> tuple[int, ...]:
        self.asked = text
        return tuple(text.encode())

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.votes[ids[0]]

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        return tuple(Completion((i,), (-1.0,), (), Finish.STOP) for i in range(n))


def test_the_judge_is_the_mean_of_the_votes_that_can_be_read() -> None:
    for votes, expected in (
        (("Sure.", "likely", "impossible"), 0.5),
        (("sure", "what?", "sure"), 1.0),
        (("Unlikely.", "impossible!", "unsure"), 0.0),
        (("?", "!", ""), math.nan),
    ):
        judge = Says(*votes)
        assert score(JudgeValue(judge, judge, votes=3), GOOD) == Scores([expected], 3)
        assert "7 *3 =21" in judge.asked
    assert score(JudgeValue(judge, judge, votes=3), GOOD, max_tokens=2) == Scores(())


@asynccontextmanager
async def server(**routes: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    app = web.Application()
    for route, handler in routes.items():
        app.router.add_route("*", "/" + route.replace("_", "/"), handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def answers(body: Any, status: int = 200, wait_s: float = 0.0) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handler(request: web.Request) -> web.Response:
        await asyncio.sleep(wait_s)
        return web.json_response(body, status=status)

    return handler


@pytest.mark.parametrize(
    ("handler", "error", "message"),
    [
        (answers({"data": [{"index": 0, "probs": [0.5]}]}), WireError, "1 scores for 2 texts"),
        (answers({"data": [{"index": 0, "probs": []}, {"index": 1, "probs": [1.0]}]}), WireError, "not as expected"),
        (answers({"what": 1}), WireError, "not as expected"),
        (answers({"what": "x" * (2 << 20)}), WireError, "more than 1179648 bytes"),
        (answers({"error": "x"}, status=500), ScorerFailedError, "answered 500"),
        (answers({}, wait_s=1.0), DeadlineError, "2 scores"),
    ],
)
def test_a_served_scorer_that_fails_is_named(handler: Any, error: type[NeoxRLError], message: str) -> None:
    async def story() -> None:
        async with server(classify=handler) as address:
            with pytest.raises(error, match=message):
                await ServedScorer(address, "prm", deadline_s=0.3 if error is DeadlineError else 30.0).score(["a", "b"])

    asyncio.run(story())


def test_a_served_scorer_gives_the_chance_of_its_last_class_in_the_order_of_the_texts() -> None:
    async def story() -> None:
        body = {"data": [{"index": 1, "probs": [0.9, 0.1]}, {"index": 0, "probs": [0.2, 0.8]}]}
        async with server(classify=answers(body)) as address:
            assert await ServedScorer(address, "prm").score(["a", "b"]) == [0.8, 0.1]
        with pytest.raises(ScorerFailedError):
            await ServedScorer(address, "prm").score(["a"])

    asyncio.run(story())


def test_a_classifier_is_told_as_much_of_the_search_as_it_can_read() -> None:
    here, asked = replace(position("7 *3 =21"), visited=lambda: BEFORE), list[str]()

    async def reads(limit: int) -> Scores:
        async def handler(request: web.Request) -> web.Response:
            asked.extend((await request.json())["input"])
            if len(asked[-1]) > limit:
                return web.json_response({"error": "This model's maximum context length is"}, status=400)
            return web.json_response({"data": [{"index": 0, "probs": [0.25, 0.75]}]})

        async with server(classify=handler) as address:
            return await PrmValue(ServedScorer(address, "prm"), sees_earlier=True).score([here], None)

    told, bare = len(path_text(here, MAX_EARLIER_CHARS)), len(path_text(here))
    for limit in (told, told - 1, bare):
        assert asyncio.run(reads(limit)) == Scores([0.75]) and len(asked[-1]) <= limit
    assert "12 +3 =15 low" in asked[0] and asked[-1] == path_text(here)


def test_a_path_that_a_classifier_cannot_read_has_no_value_and_takes_none_from_the_others() -> None:
    short, long, limit = GOOD, position("7 *3 =21", "21 +5 =26"), len(path_text(GOOD))

    async def scores(limit: int) -> Scores:
        async def handler(request: web.Request) -> web.Response:
            texts = (await request.json())["input"]
            if max(map(len, texts)) > limit:
                return web.json_response({"error": "This model's maximum context length is"}, status=400)
            return web.json_response({"data": [{"index": i, "probs": [0.25, 0.75]} for i, _ in enumerate(texts)]})

        async with server(classify=handler) as address:
            return await PrmValue(ServedScorer(address, "prm")).score([long, short], None)

    assert list(map(str, asyncio.run(scores(limit)).values)) == ["nan", "0.75"]
    assert list(map(str, asyncio.run(scores(limit - 1)).values)) == ["nan", "nan"]
    with pytest.raises(TextsRefusedError, match="maximum context"):
        asyncio.run(scores(0))


def test_beside_a_path_that_is_too_long_the_others_are_still_told_the_search() -> None:
    here, long = replace(position("7 *3 =21"), visited=lambda: BEFORE), replace(GOOD, texts=("x" * 9000,))
    limit = len(path_text(here, MAX_EARLIER_CHARS))

    class Reads:
        async def score(self, texts: Sequence[str]) -> Sequence[float]:
            if max(map(len, texts)) > limit:
                raise TextsRefusedError("too long")
            return [0.75 if "12 +3 =15 low" in text else 0.25 for text in texts]

    values = asyncio.run(PrmValue(Reads(), sees_earlier=True).score([here, long], None)).values
    assert list(map(str, values)) == ["0.75", "nan"]


@pytest.mark.parametrize("judged", [False, True])
def test_a_path_too_long_for_the_model_is_not_asked_about_and_ends_no_search(judged: bool) -> None:
    """A server refuses what is longer than its context, and a ticket that fails of that fails again when it is made again."""
    task, limit = countdown([2, 3, 5, 7], 59), 0

    class Model(Says):
        def encode(self, text: str) -> tuple[int, ...]:
            return TOKENIZER.encode(text) if not judged else super().encode(text)

        def _read(self, prompt: Sequence[int], answer: int) -> None:
            if len(prompt) + answer > limit:
                raise WireError("refused: it is longer than the maximum model length")

        async def next_token(self, prompts: Sequence[Sequence[int]], ids: Sequence[int]) -> Sequence[Sequence[float]]:
            for prompt in prompts:
                self._read(prompt, 1)
            return [(-1.0, -1.0)] * len(prompts)

        async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
            self._read(prompt_ids, params.max_tokens)
            return await super().sample(prompt_ids, params, n, rollout_id)

    model = Model("likely")
    one, two = position("7 *3 =21", problem=task), position("7 *3 =21", "21 -5 =16", problem=task)
    if judged:
        limit = len(model.encode(JUDGE_PROMPT.replace("{path}", path_text(one)))) + JudgeValue(model, model).max_tokens
    else:
        limit = len(value_context(task, one.texts, TOKENIZER)) + 1
    value = JudgeValue(model, model, 1, max_context=limit) if judged else WordValue(model, model, max_context=limit)
    found = score(value, two, one)
    assert (str(found.values[0]), found.values[1], found.num_tokens) == ("nan", 0.5, 1)
    assert math.isnan(score(value, two).values[0])
    search = Search("bfs", ArithmeticDomain, Options(4))
    tree = asyncio.run(search.run(task, policy(RandomPlayer()), value, Budget(30)))
    values = {len(tree.path(n.id)): n.value for n in tree.nodes[1:] if n.verdict is None}
    assert tree.end is End.BUDGET and values[1] == 0.5 and values[2] is None and tree.counts["bad_value"] > 0, tree.error


MODELS = {"data": [{"id": "tiny", "max_model_len": 64}]}
CHOICE = {"index": 0, "token_ids": [4, 5], "logprobs": {"token_logprobs": [-0.5, -1.5]}, "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ({"choices": [CHOICE]}, 200, "1 choices where 2"),
        ({"choices": [CHOICE, {**CHOICE, "index": 1, "token_ids": [4]}]}, 200, "2 finite log-probs for 1 tokens"),
        ({"choices": "no"}, 200, "not as expected"),
        ({}, 503, "answered 503"),
        ({"error": "too long"}, 400, "refused"),
    ],
)
def test_a_completions_server_that_answers_badly_is_named(body: Any, status: int, error: str) -> None:
    async def story() -> None:
        async with (
            server(v1_models=answers(MODELS), v1_completions=answers(body, status)) as address,
            CompletionsGenerator(address) as generator,
        ):
            with pytest.raises(NeoxRLError, match=error):
                await generator.sample((1, 2), SamplingParams(4), 2, "p")

    asyncio.run(story())


def test_a_completions_server_gives_tokens_without_versions() -> None:
    async def story() -> None:
        body = {"choices": [{**CHOICE, "index": 1}, CHOICE]}
        routes = {"v1_models": answers(MODELS), "v1_completions": answers(body)}
        async with server(**routes) as address, CompletionsGenerator(address) as generator:
            found = await generator.sample((1, 2), SamplingParams(4, seed=3), 2, "p")
            assert found == (Completion((4, 5), (-0.5, -1.5), (), Finish.STOP),) * 2
            assert (generator.model, generator.max_model_len) == ("tiny", 64)
        with pytest.raises(ServerFailedError):
            await CompletionsGenerator(address).__aenter__()
        async with server(v1_models=answers({"data": []})) as address:
            with pytest.raises(WireError, match="is this a vLLM server"):
                await CompletionsGenerator(address).__aenter__()

    asyncio.run(story())
