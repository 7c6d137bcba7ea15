"""The credit of steps where the search itself distorts it: budgets that cut a step short, and values that its own moves lower."""

from __future__ import annotations

import asyncio

import pytest

from neox_rl.search.arithmetic_domain import ArithmeticDomain
from neox_rl.search.growth import Budget
from neox_rl.search.rollouts import Remembering, Sample, all_samples
from neox_rl.search.search import Grown, Search
from neox_rl.search.strategy import Options
from neox_rl.search.values import OracleValue, Value
from neox_rl.types import NO_NODE, Finish
from tests.unit.search_worlds import TOKENIZER, RandomPlayer, countdown, policy

TASK = countdown([2, 3, 5, 7], 24)


def sampled(
    strategy: str, budget: Budget, width: int = 4, seed: int = 3, max_step_tokens: int = 8, value: Value | None = None, max_context: int = 0
) -> tuple[Grown, list[Sample]]:
    asked = Remembering(policy(RandomPlayer(), max_step_tokens, max_context))
    search = Search(strategy, ArithmeticDomain, Options(width), seed)
    grown = asyncio.run(search.grown(TASK, asked, value or OracleValue(), budget))
    return grown, all_samples(grown, ArithmeticDomain(TASK), asked.asked)


def unfinished(samples: list[Sample]) -> list[Sample]:
    return [s for s in samples if s.finish is Finish.LENGTH]


@pytest.mark.parametrize(
    ("strategy", "width", "budget"), [("best-first", 4, Budget(40, 23)), ("best-of-n", 4, Budget(40, 20)), ("best-of-n", 8, Budget(40, 32))]
)
def test_a_step_that_the_budget_cut_short_is_not_trained_as_worthless(strategy: str, width: int, budget: Budget) -> None:
    grown, samples = sampled(strategy, budget, width)
    assert grown.tree.counts["too_long"] > 0 and samples and not unfinished(samples)


@pytest.mark.parametrize("strategy", ["best-first", "best-of-n"])
def test_a_step_too_long_for_its_own_bound_or_the_context_is_worth_nothing(strategy: str) -> None:
    prompt = len(TOKENIZER.encode(TASK.prompt))
    for bounds in ({"max_step_tokens": 2}, {"max_context": prompt + 2}):
        _, samples = sampled(strategy, Budget(40, 100), **bounds)  # type: ignore[arg-type]
        assert unfinished(samples) and all((s.value, s.node) == (0.0, NO_NODE) for s in unfinished(samples))
