"""Steps whose value nobody knows are not trained as worthless ones: neither by a run nor as labels of a reward model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from neox_rl.errors import ConfigError, NeoxRLError, ServerFailedError
from neox_rl.run.searched import books
from neox_rl.search.arithmetic_domain import ArithmeticDomain
from neox_rl.search.credit import value_labels
from neox_rl.search.demonstrations import values
from neox_rl.search.growth import Budget
from neox_rl.search.proposers import Position
from neox_rl.search.rollouts import Baseline, Remembering, advantages, all_samples, node_samples, preferences
from neox_rl.search.scorers import Discouraged
from neox_rl.search.search import Grown, Search
from neox_rl.search.strategies import STRATEGIES
from neox_rl.search.strategy import Options
from neox_rl.search.trees import read_tree, tree_line
from neox_rl.search.values import NoValue, Scores, Value, ValueFailedError
from neox_rl.types import End, Finish, SamplingParams
from tests.unit.search_worlds import TOKENIZER, policy
from tests.unit.test_search_rollouts import TASK, Sloppy, Unreliable, maker

EVERY = sorted(set(STRATEGIES) - {"best-of-n"})


class Dies:
    """Values every step 0.9, by its place 0.5, for ``rounds`` rounds; then its server is gone, or the budget cannot pay it."""

    def __init__(self, rounds: int, broke: bool = False) -> None:
        self.rounds, self.broke = rounds, broke

    async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
        self.rounds -= 1
        if self.rounds >= 0:
            return Scores([0.9 if i else 0.5 for i, _ in enumerate(positions)])
        if self.broke:
            return Scores(())
        raise NeoxRLError("the scorer is gone")


def search(value: Value, strategy: str = "bfs") -> tuple[Grown, Remembering]:
    asked = Remembering(policy(Sloppy()))
    return asyncio.run(Search(strategy, ArithmeticDomain, Options(4), every_value=True).grown(TASK, asked, value, Budget(16))), asked


@pytest.mark.parametrize("strategy", EVERY)
@pytest.mark.parametrize("broke", [False, True])
def test_steps_without_a_value_are_neither_trained_nor_labels(strategy: str, broke: bool) -> None:
    grown, asked = search(Dies(1, broke), strategy)
    tree = grown.tree
    assert isinstance(grown.error, ValueFailedError) == (tree.end is End.FAILED) == (not broke)
    unscored = {n.id for n in tree.nodes[1:] if n.value is None}
    assert unscored and all(tree.nodes[i].verdict is None for i in unscored), "an end has its verdict"
    samples = all_samples(grown, ArithmeticDomain(TASK), asked.asked)
    for some in (samples, node_samples(tree)):
        assert some and not unscored & {s.node for s in some}
        for pair in preferences(some, 0.1):
            assert not unscored & {pair.better.node, pair.worse.node}
        places = {s.parent for s in some if s.parent in unscored}
        for parent in places:
            there = [a for s, a in zip(some, advantages(tree, some, Baseline.PARENT), strict=True) if s.parent == parent]
            assert sum(there) == pytest.approx(0.0), "an unscored place is worth the mean of what was sampled there"
    assert unscored.isdisjoint(path[-1].id for path, _ in value_labels(tree))
    assert read_tree(tree_line(tree)) == tree


def test_a_tree_that_nothing_scored_is_no_demonstration_of_values() -> None:
    grown, _ = search(Dies(0))
    assert len(grown.tree.nodes) > 1 and not node_samples(grown.tree)
    with pytest.raises(ConfigError, match="step with a value"):
        values([(grown.tree, TASK)], TOKENIZER)


@pytest.mark.parametrize("value", [NoValue(), Discouraged(NoValue())])
@pytest.mark.parametrize("strategy", EVERY)
def test_what_only_guides_a_search_is_no_value_of_its_steps(strategy: str, value: Value) -> None:
    class Half:
        async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
            return Scores([0.5] * len(positions))

    grown, _ = search(value, strategy)
    tree, ends = grown.tree, {n.id for n in grown.tree.nodes if n.verdict is not None}
    assert {n.id for n in tree.nodes if n.value is not None} == {s.node for s in node_samples(tree)} == ends
    guided = search(Half() if isinstance(value, NoValue) else Discouraged(Half()), strategy)[0].tree
    assert [replace(n, value=None) for n in tree.nodes] == [replace(n, value=None) for n in guided.nodes], "it searches as it did"
    with pytest.raises(ConfigError, match=r"step with a value before its end; search with one"):
        values([(tree, TASK)], TOKENIZER)
    assert values([(guided, TASK)], TOKENIZER)


@pytest.mark.parametrize("rounds", [0, 1])
@pytest.mark.parametrize("trains", ["steps", "preferences", "traces"])
def test_a_run_whose_value_failed_makes_the_ticket_again(rounds: int, trains: str) -> None:
    """It may have failed for good: a ticket that fails three times ends the run with these words."""
    groups = replace(maker(Sloppy(), trains=trains, strategy="bfs"), value=lambda _: Dies(rounds))
    with pytest.raises(ServerFailedError, match="g000004/0: the search's value: the scorer is gone"):
        asyncio.run(groups.group(TASK, 4, SamplingParams(8), 1))


def test_a_search_that_lost_the_policy_is_counted() -> None:
    whole, part = (
        asyncio.run(maker(p, nodes=12).group(TASK, 0, SamplingParams(8), 1)) for p in (Sloppy(), Unreliable(frozenset(range(3, 99))))
    )
    assert (books([whole])["failed_frac"], books([whole, part])["failed_frac"]) == (0.0, 0.5)
    assert {t.finish for t in part.traces} == {Finish.ABORT}
