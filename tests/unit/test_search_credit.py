"""What a tree teaches: step advantages that add up, preferences between siblings, paths as the policy sampled them."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_rl.search.arithmetic_domain import ArithmeticDomain
from neox_rl.search.credit import path_trace, preferences, step_advantages, value_labels
from neox_rl.search.growth import Budget
from neox_rl.search.proposers import ExhaustiveProposer
from neox_rl.search.search import Search
from neox_rl.search.strategies import STRATEGIES
from neox_rl.search.strategy import Options
from neox_rl.search.values import HeuristicValue
from neox_rl.types import NO_NODE, NO_VERSION, Role, Tree
from tests.unit.search_worlds import TOKENIZER, RandomPlayer, countdown, policy

TASK = countdown([2, 4, 9, 1], 17)


def grown(strategy: str = "bfs", seed: int = 0, by_policy: bool = True) -> Tree:
    made = Search(strategy, ArithmeticDomain, Options(4), seed)
    proposer = policy(RandomPlayer()) if by_policy else ExhaustiveProposer()
    return asyncio.run(made.run(TASK, proposer, HeuristicValue(), Budget(40)))


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(STRATEGIES)), st.integers(0, 99))
def test_advantages_along_a_path_add_up_to_what_was_gained(strategy: str, seed: int) -> None:
    tree = grown(strategy, seed)
    advantages = step_advantages(tree)
    first = [n.value for n in tree.nodes if n.parent == 0]
    for node in tree.nodes[1:]:
        gained = sum(advantages[step.id] for step in tree.path(node.id))
        assert gained == pytest.approx(node.value - sum(first) / len(first))
    assert sum(advantages[n.id] for n in tree.nodes if n.parent == 0) == pytest.approx(0.0)


def test_preferences_are_between_siblings_and_differ_by_the_margin() -> None:
    tree = grown()
    pairs = list(preferences(tree, 0.01))
    assert pairs and all(p.better.parent == p.worse.parent and p.better.value - p.worse.value >= 0.01 for p in pairs)
    assert all((p.path[-1].id if p.path else 0) == p.better.parent for p in pairs)
    assert list(preferences(tree, 2.0)) == []
    assert len(list(value_labels(tree))) == len(tree.nodes) - 1


def test_a_path_is_trained_as_it_was_sampled() -> None:
    tree = grown()
    deepest = max(tree.nodes, key=lambda node: len(tree.path(node.id)))
    prompt = TOKENIZER.encode(TASK.prompt)
    trace = path_trace(tree, TASK, prompt, deepest.id, "g000000/r0")
    assert [i for s in trace.segments for i in s.ids] == [*prompt, *(i for n in tree.path(deepest.id) for i in n.ids)]
    assert [(s.role, s.version) for s in trace.segments] == [(Role.PROMPT, NO_VERSION), *[(Role.THINK, 3)] * (len(trace.segments) - 1)]
    assert all(len(s.logprobs) == len(s.ids) for s in trace.segments[1:])
    assert trace.reward == float(deepest.verdict is not None and deepest.verdict.correct)


def test_what_no_policy_made_is_not_trained_off_policy() -> None:
    tree = grown(by_policy=False)
    with pytest.raises(ValueError, match="no policy version"):
        path_trace(tree, TASK, (), 1, "g000000/r0")
    with pytest.raises(ValueError, match="no node"):
        path_trace(tree, TASK, (), NO_NODE, "g000000/r0")
