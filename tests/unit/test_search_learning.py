"""A policy learns from its own searches, through the real parts: searches, credit, packing and loss. Its model is a table."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from neox_rl.batch.pack import pack_rl
from neox_rl.batch.packing import Layout
from neox_rl.batch.types import MicroBatch
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import ObjectiveConfig, StalenessConfig
from neox_rl.config.schema_search import SearchConfig
from neox_rl.loss.policy import make_loss_fn
from neox_rl.metacot import BACK
from neox_rl.rollout.groups import Attempts
from neox_rl.run.search_groups import search_groups
from neox_rl.search.arithmetic_domain import ArithmeticDomain
from neox_rl.search.domain import State, Stepped
from neox_rl.types import Completion, Finish, Problem, SamplingParams, Verdict, VersionSpan
from tests.unit.search_worlds import TOKENIZER, countdown

TASK = countdown([2, 3, 5, 7], 24)
PROMPT = TOKENIZER.encode(TASK.prompt)
STALENESS = StalenessConfig()


class Table:
    """Logits of every legal step and of giving up, by the tokens before it. The first token of a step has its whole log-prob."""

    def __init__(self) -> None:
        self.domain, self.rng = ArithmeticDomain(TASK), random.Random(0)
        self.logits: dict[tuple[int, ...], torch.Tensor] = {}

    def state(self, path: Sequence[int]) -> State:
        state = self.domain.root
        for i in range(0, len(path), 3):
            stepped = self.domain.step(state, TOKENIZER.decode(path[i : i + 3]), False)
            assert isinstance(stepped, Stepped)
            state = stepped.state
        return state

    def options(self, path: tuple[int, ...]) -> tuple[list[tuple[int, ...]], torch.Tensor]:
        texts = [*self.domain.legal(self.state(path)), BACK]
        logits = self.logits.setdefault(path, torch.zeros(len(texts), dtype=torch.float64, requires_grad=True))
        return [TOKENIZER.encode(text) for text in texts], logits.log_softmax(0)

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        steps, logprobs = self.options(tuple(prompt_ids[len(PROMPT) :]))
        chosen = self.rng.choices(range(len(steps)), logprobs.exp().tolist(), k=n)
        return tuple(
            Completion(steps[i], (logprobs[i].item(), *[0.0] * (len(steps[i]) - 1)), (VersionSpan(0, 0, len(steps[i])),), Finish.STOP)
            for i in chosen
        )

    def logprobs(self, micro: MicroBatch) -> torch.Tensor:
        """[T], of the targets: entry t is about the token after it."""
        found = torch.zeros(len(micro), dtype=torch.float64)
        for start, end in zip(micro.cu_seqlens[:-1], micro.cu_seqlens[1:], strict=True):
            tokens = tuple(micro.tokens[start:end].tolist())
            at = len(PROMPT)
            while tokens[: len(PROMPT)] == PROMPT and at < len(tokens):
                steps, logprobs = self.options(tokens[len(PROMPT) : at])
                index = next(i for i, step in enumerate(steps) if tokens[at : at + len(step)] == step)
                found[start + at - 1] = logprobs[index]
                at += len(steps[index])
        return found

    def solves(self, path: tuple[int, ...] = ()) -> float:
        """The exact chance that an attempt without a search comes to a right end."""
        state = self.state(path)
        if self.domain.is_end(state):
            return float(state == (24,))
        steps, logprobs = self.options(path)
        return sum(p * self.solves(path + step) for step, p in zip(steps[:-1], logprobs.exp().tolist(), strict=False))


class Unasked:
    async def check(self, problem: Problem, text: str) -> Verdict:
        raise AssertionError("an arithmetic search judges itself")


@pytest.mark.parametrize("baseline", ["parent", "siblings"])
@pytest.mark.parametrize("strategy", ["mcts", "best-first"])
def test_a_policy_learns_the_steps_that_its_searches_find_good(strategy: str, baseline: str) -> None:
    table = Table()
    attempts = Attempts(table, Unasked(), TOKENIZER, lambda problem, verdict, text, length: float(verdict.correct))
    config = RunConfig()
    block = SearchConfig(strategy=strategy, value="oracle", nodes=24, width=6, baseline=baseline, prune=False)
    maker = search_groups(replace(config, metarl=replace(config.metarl, search=block)), attempts)
    objective = ObjectiveConfig(loss="reinforce", baseline="none", aggregation="constant")
    before = table.solves()
    for ticket in range(60):
        group = asyncio.run(maker.group(TASK, ticket, SamplingParams(8), 2))
        batch = pack_rl([group], 1, staleness=STALENESS, objective=objective, max_new_tokens=1, layout=Layout(4096))
        ((micro,),) = batch.microbatches
        logprobs = table.logprobs(micro)
        sampled = (micro.loss_weight > 0) & (micro.behavior_logprobs != 0)
        assert np.allclose(logprobs.detach().numpy()[sampled], micro.behavior_logprobs[sampled], atol=1e-6), "after the same tokens"
        loss, _ = make_loss_fn(objective, 0)(logprobs, torch.zeros_like(logprobs), micro)
        parameters = list(table.logits.values())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                parameter.data -= 10.0 * gradient
    assert before < 0.1 and table.solves() > 0.9
