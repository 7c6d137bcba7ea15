"""The credit of steps where the search itself distorts it: budgets that cut a step short, and values that its own moves lower."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from neox_rl.search.arithmetic_domain import ArithmeticDomain
from neox_rl.search.credit import before, value_labels
from neox_rl.search.domain import Rejection, State
from neox_rl.search.earlier import earlier_of, told_earlier
from neox_rl.search.growth import Budget
from neox_rl.search.linearize import solution_of
from neox_rl.search.proposers import ExhaustiveProposer, Position, Proposal, derived_seed
from neox_rl.search.rollouts import Baseline, Remembering, Sample, advantages, all_samples, node_samples, preferences
from neox_rl.search.scorers import Discouraged
from neox_rl.search.search import Grown, Search
from neox_rl.search.strategies import STRATEGIES
from neox_rl.search.strategy import Options
from neox_rl.search.styles import backtrack
from neox_rl.search.trees import read_tree, tree_line
from neox_rl.search.values import HeuristicValue, OracleValue, Scores, Value
from neox_rl.types import NO_NODE, Finish, VersionSpan
from tests.unit.search_worlds import GRAPH_PROBLEM, TOKENIZER, Graph, RandomPlayer, Table, countdown, policy

TASK = countdown([2, 3, 5, 7], 24)


def sampled(
    strategy: str, budget: Budget, width: int = 4, seed: int = 3, max_step_tokens: int = 8, value: Value | None = None, max_context: int = 0
) -> tuple[Grown, list[Sample]]:
    asked = Remembering(policy(RandomPlayer(), max_step_tokens, max_context))
    search = Search(strategy, ArithmeticDomain, Options(width), seed, every_value=True)
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


@pytest.mark.parametrize("value", [OracleValue(), Discouraged(OracleValue())])
@pytest.mark.parametrize("strategy", ["mcts", "best-first"])
def test_an_exact_value_is_trained_as_it_was_given_however_the_search_went_on_below(strategy: str, value: Value) -> None:
    """Not stopped at states that are lost, MCTS lowers the mean of a state that can be won by every wrong step below it; and a search that
    turns to what it did not try yet goes by less than the value."""
    domain, lowered = ArithmeticDomain(TASK), 0
    for seed in range(6):
        grown, samples = sampled(strategy, Budget(24), seed=seed, value=value)
        truth = {node.id: domain.solved_value(state) for node, state in zip(grown.tree.nodes, grown.states, strict=True)}
        lowered += sum(0.0 < (n.value or 0.0) < 1.0 for n in grown.tree.nodes[1:])
        assert all(s.value == truth[s.node] for s in samples if s.node != NO_NODE)
        assert {path[-1].id: value for path, value in value_labels(grown.tree)} == {i: v for i, v in truth.items() if i}
        assert all((p.better.value, p.worse.value) == (1.0, 0.0) for p in preferences(samples, 0.2))
        assert all(truth.get(p.worse.node, 0.0) == 0.0 for p in preferences(samples, 0.2))
        assert read_tree(tree_line(grown.tree)) == grown.tree
    assert (lowered > 0) == (strategy == "mcts")


@pytest.mark.parametrize("value", [HeuristicValue(), Discouraged(HeuristicValue())])
def test_an_estimate_is_trained_as_the_mean_of_what_was_seen_below(value: Value) -> None:
    grown, _ = sampled("mcts", Budget(24), value=value)
    ends = [n for n in grown.tree.nodes if n.verdict is not None]
    assert ends and all(n.exact == n.value == float(n.verdict is not None and n.verdict.correct) for n in ends)
    assert all(n.exact is None for n in grown.tree.nodes if n not in ends)
    assert dict(value_labels(grown.tree)) == {grown.tree.path(n.id): n.value for n in grown.tree.nodes[1:]}


class Steps(Graph):
    """Every step of a graph as a policy would have sampled it."""

    step_tokens = 1

    async def propose(self, position: Position, n: int, max_tokens: int) -> Sequence[Proposal]:
        return [Proposal(text, 1, (ord(text),), (-1.0,), (VersionSpan(1, 0, 1),)) for text in self.legal(position.state)]


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"best-of-n"}))
@pytest.mark.parametrize("value", [Table({"r": 0.0, "w": 1.0}), Discouraged(Table({"r": 0.0, "w": 1.0}))])
def test_the_end_of_a_text_is_credited_by_its_verdict_and_chosen_without_it(strategy: str, value: Value) -> None:
    """What guides the search thinks the wrong end right and the right one wrong."""
    texts = Steps({"R": ["a"], "a": ["r", "w"]}, frozenset("r"), checkable=False)
    blind = replace(texts, goals=frozenset())
    one, other = (
        asyncio.run(Search(strategy, lambda _, graph=graph: graph, Options(2)).run(GRAPH_PROBLEM, graph, value, Budget(9)))
        for graph in (texts, blind)
    )
    ends = {n.text: n for n in one.nodes if n.verdict is not None}
    samples = [s for s in node_samples(one) if s.node in (ends["r"].id, ends["w"].id)]
    credit = advantages(one, samples, Baseline.SIBLINGS)
    assert {one.nodes[s.node].text: a for s, a in zip(samples, credit, strict=True)} == {"r": 0.5, "w": -0.5}
    assert {path[-1].text: v for path, v in value_labels(one) if path[-1].verdict} == {"r": 1.0, "w": 0.0}
    assert [(p.better.node, p.worse.node) for p in preferences(samples, 0.2)] == [(ends["r"].id, ends["w"].id)]
    assert (one.answer, ends["r"].value, ends["w"].value) == (ends["w"].id, 0.0, 1.0), "nobody told the search"
    told = [replace(tree, nodes=tuple(replace(n, verdict=None, exact=None) for n in tree.nodes)) for tree in (one, other)]
    assert told[0] == told[1]
    assert all(n.exact is None for n in before(replace(one, nodes=tuple(replace(n, seen=9) for n in one.nodes)), ends["r"], False).nodes)


class Same:
    async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
        return Scores([1.0] * len(positions))


class Discounts:
    """Of another value, in the order in which nodes were made."""

    def __init__(self, value: Value) -> None:
        self.value, self.seen = value, list[float]()

    async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
        scores = await self.value.score(positions, max_tokens)
        self.seen += scores.discounts
        return scores


def test_no_path_is_an_earlier_attempt_at_itself() -> None:
    """All attempts of best-of-n are made in one round: there is none before them. Of rounds, every one before counts."""
    value = Discounts(Discouraged(Same()))
    sampled("best-of-n", Budget(40), value=value)
    assert len(value.seen) > 6 and set(value.seen) == {1.0}
    graph = Graph({"R": ["a", "b"], "a": ["end"], "b": ["end"]}, checkable=False)
    search, value = Search("mcts", lambda _: graph, Options(2)), Discounts(Discouraged(Same(), decay=0.5))
    tree = asyncio.run(search.run(GRAPH_PROBLEM, ExhaustiveProposer(), value, Budget(9)))
    assert [n.text for n in tree.nodes[1:]] == ["a", "b", "end", "end"] and value.seen == [1.0, 1.0, 1.0, 0.5]


@pytest.mark.parametrize(("value", "order"), [(Same(), "absustue"), (Discouraged(Same(), decay=0.5), "absusteu")])
def test_a_search_turns_to_what_it_did_not_try_and_records_no_less_of_what_it_tried(value: Value, order: str) -> None:
    graph = Graph({"R": ["a", "b"], "a": ["s"], "b": ["s", "t"], "s": ["u"], "t": ["e"]}, checkable=False)
    search = Search("mcts", lambda _: graph, Options(2, exploration=0.0))
    tree = asyncio.run(search.run(GRAPH_PROBLEM, ExhaustiveProposer(), value, Budget(9)))
    assert "".join(n.text for n in tree.nodes) == order
    assert {n.value for n in tree.nodes} == {1.0}, "those above it too"


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("bfs", Options(3)), ("bfs", Options(3, batch=4)), ("beam", Options(3)), ("mcts", Options(3, batch=4)), ("best-of-n", Options(4))],
)
def test_a_meta_critic_is_trained_on_what_it_is_told_when_it_is_asked(strategy: str, options: Options) -> None:
    told: dict[int, tuple[str, ...]] = {}

    class Hears:
        async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
            told.update((p.seed, earlier_of(p).texts) for p in positions)
            return Scores([0.5] * len(positions))

    task = countdown([2, 3, 5, 7], 59)
    search = Search(strategy, ArithmeticDomain, options, seed=1, every_value=True)
    tree = asyncio.run(search.run(task, policy(RandomPlayer()), Hears(), Budget(30)))
    asked = {n.id: derived_seed(1, task.id, n.id, "value") for n in tree.nodes[1:] if n.verdict is None}
    tree = read_tree(tree_line(tree))
    trained = {seed: told_earlier(before(tree, tree.nodes[i], verdicts=True), task).texts for i, seed in asked.items()}
    assert trained == told and len(told) > 5


@pytest.mark.parametrize("strategy", ["mcts", "best-first"])
def test_a_step_that_can_be_won_is_not_told_as_a_wrong_one_where_values_are_exact(strategy: str) -> None:
    wrong = kept = 0
    for numbers in ((1, 2, 3), (1, 4, 6), (2, 3, 4), (2, 4, 6), (3, 4, 12)):
        task = countdown(numbers, 24)
        domain, search = ArithmeticDomain(task), Search(strategy, ArithmeticDomain, Options(1 << 20))
        tree = asyncio.run(search.run(task, ExhaustiveProposer(), OracleValue(), Budget(200)))
        told = backtrack(tree, random.Random(0), rate=1.0).tree
        right = {node.id for node in solution_of(told)}
        for node in told.nodes[1:]:
            state: State = domain.root
            for step in told.path(node.id):
                after = domain.step(state, step.text, False)
                assert not isinstance(after, Rejection)
                state = after.state
            assert (domain.solved_value(state) == 1.0) == (node.id in right)
            wrong += node.id not in right
        kept += sum(n.exact == 1.0 for n in tree.nodes) > len(right)
    assert wrong > 2 and kept > 2, "there were wrong ones, and others that could be won"


def test_a_right_end_is_not_told_as_a_wrong_step() -> None:
    graph = Graph({"R": ["a", "b", "c"]}, frozenset("ab"), checkable=False)
    tree = asyncio.run(Search("bfs", lambda _: graph, Options(3)).run(GRAPH_PROBLEM, ExhaustiveProposer(), Same(), Budget(9)))
    told = {node.text for seed in range(20) for node in backtrack(tree, random.Random(seed), rate=1.0).tree.nodes[1:]}
    assert told == {"a", "c"}
