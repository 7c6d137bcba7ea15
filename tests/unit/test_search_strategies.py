"""Tree search: what each strategy expands, what a search costs, what bad steps and lost servers do to it."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_rl.errors import ConfigError, NeoxRLError
from neox_rl.search.arithmetic_domain import ArithmeticDomain
from neox_rl.search.domain import Domain
from neox_rl.search.growth import Budget
from neox_rl.search.mcts import Mcts
from neox_rl.search.proposers import ExhaustiveProposer, Position, Proposal, Proposer
from neox_rl.search.search import Search, run_all
from neox_rl.search.strategies import STRATEGIES
from neox_rl.search.strategy import Options
from neox_rl.search.values import HeuristicValue, NoValue, OracleValue, Scores, Value
from neox_rl.types import NO_NODE, End, Problem, Tree
from tests.unit.search_worlds import GRAPH_PROBLEM, Graph, RandomPlayer, Script, Table, Troubled, countdown, policy

ALL = 1 << 20
PROBLEMS = [countdown(numbers, target) for numbers, target in (([3, 5, 7], 26), ([2, 4, 9, 1], 17), ([1, 6, 8], 14), ([1, 2, 3, 4], 59))]


def search(
    strategy: str,
    domain: Domain | None = None,
    options: Options | None = None,
    proposer: Proposer | None = None,
    value: Value | None = None,
    budget: Budget | None = None,
    problem: Problem = GRAPH_PROBLEM,
    retries: int = 2,
) -> Tree:
    """One search; by default over everything legal, blind, with a budget that does not end it."""
    made = Search(strategy, (lambda _: domain) if domain else ArithmeticDomain, options or Options(width=ALL), max_retries=retries)
    return asyncio.run(made.run(problem, proposer or ExhaustiveProposer(), value or NoValue(), budget or Budget(10_000)))


def steps(tree: Tree) -> list[str]:
    return [node.text for node in tree.nodes[1:]]


def expanded(tree: Tree) -> list[str]:
    """The nodes that have children, in the order in which they got them."""
    return [tree.nodes[i].text for i in dict.fromkeys(node.parent for node in tree.nodes[1:])]


BINARY = Graph({"R": "AB", "A": ["A1", "A2"], "B": ["B1", "B2"], "A1": ["A11"], "B1": ["B11"]})
HOPES = Table({"A": 0.6, "B": 0.4, "A1": 0.2, "A2": 0.1, "B1": 0.9, "B2": 0.5, "B11": 0.1})
OPEN = Graph({**BINARY.edges, "A2": ["A21"], "B2": ["B21"], "A11": ["x"], "B11": ["y"]})


@pytest.mark.parametrize(
    ("strategy", "options", "order"),
    [
        ("bfs", {}, ["", "A", "B", "A1", "A2", "B1", "B2"]),
        ("dfs", {}, ["", "A", "A1", "A11", "A2", "B", "B1"]),
        ("best-first", {}, ["", "A", "B", "B1", "B2"]),
        ("astar", {"step_cost": 10.0}, ["", "A", "B", "B1", "B2"]),
        ("beam", {"beam": 1}, ["", "A", "A1", "A11"]),
        ("beam", {"beam": 2}, ["", "A", "B", "B1", "B2"]),
    ],
)
def test_each_strategy_expands_in_its_order(strategy: str, options: dict[str, float], order: list[str]) -> None:
    tree = search(strategy, OPEN, Options(width=ALL, **options), value=HOPES)  # type: ignore[arg-type]
    assert expanded(tree)[: len(order)] == order


def test_uct_visits_and_values_equal_a_tree_computed_by_hand() -> None:
    """Under R come A .6, B .4; under A (1.43 > 1.23) .2, 0; under B (1.58 > .95) .9, .5; under B (1.37 > 1.04) B1 (1.95 > 1.55) .1."""
    values = Table({"A": 0.6, "B": 0.4, "A1": 0.2, "A2": 0.0, "B1": 0.9, "B2": 0.5, "B11": 0.1})
    tree = search("mcts", OPEN, Options(width=2, exploration=1.0), value=values, budget=Budget(7))
    assert expanded(tree) == ["", "A", "B", "B1"]
    found = {node.text: (node.visits, round(node.value, 6)) for node in tree.nodes}
    assert found == {
        "": (7, round(2.7 / 7, 6)),
        "A": (3, round(0.8 / 3, 6)),
        "B": (4, 0.475),
        "A1": (1, 0.2),
        "A2": (1, 0.0),
        "B1": (2, 0.5),
        "B2": (1, 0.5),
        "B11": (1, 0.1),
    }


def test_exploration_goes_where_less_was_tried_and_none_follows_the_mean() -> None:
    greedy = search(
        "mcts", OPEN, Options(width=2, exploration=0.0), value=Table({"A": 0.6, "A1": 0.6, "A2": 0.6, "A11": 0.6}), budget=Budget(6)
    )
    assert expanded(greedy) == ["", "A", "A1", "A11"]
    curious = search("mcts", OPEN, Options(width=2, exploration=5.0), value=Table({"A": 0.6, "A1": 0.6, "A2": 0.6}), budget=Budget(6))
    assert expanded(curious) == ["", "A", "B"]


def test_virtual_loss_spreads_a_round_and_leaves_nothing_behind() -> None:
    values = Table({"A": 0.9, "A1": 0.9, "A2": 0.8, "B": 0.7, "B1": 0.7, "B2": 0.7})
    serial = search("mcts", OPEN, Options(width=2, exploration=0.1), value=values, budget=Budget(6))
    assert expanded(serial) == ["", "A", "A1", "A2"]
    spread = search("mcts", OPEN, Options(width=2, exploration=0.1, batch=2), value=values, budget=Budget(8))
    assert expanded(spread) == ["", "A", "B", "A1", "B1"], "A is the better by far, yet the second of a round is sent elsewhere"
    assert spread.nodes[0].visits == len(spread.nodes) - 1, "each node was backed up once, the virtual visits are gone"


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_a_chain_of_a_thousand_steps_is_no_deeper_than_the_budget(strategy: str) -> None:
    chain = Graph({"R" if i == 0 else str(i): [str(i + 1)] for i in range(1100)}, frozenset({"1100"}))
    tree = search(strategy, chain, Options(width=1, batch=2), budget=Budget(4000))
    assert tree.end is End.SOLVED and len(tree.nodes) == 1101


def test_search_of_a_whole_tree_ends() -> None:
    for strategy in STRATEGIES:
        tree = search(strategy, OPEN, Options(width=8, batch=3))
        assert (tree.end, tree.answer) == (End.EXHAUSTED, NO_NODE) and any(n.verdict is not None for n in tree.nodes)


def test_best_of_n_takes_the_attempt_of_the_highest_value() -> None:
    unsure = Graph(OPEN.edges, frozenset({"x"}), checkable=False)
    tree = search("best-of-n", unsure, Options(width=8), value=Table({"x": 0.3, "y": 0.8, "A21": 0.1, "B21": 0.2}))
    attempts = [n for n in tree.nodes if n.verdict is not None]
    assert len(attempts) == 8 and {n.parent for n in tree.nodes[1:9]} == {0}
    assert tree.nodes[tree.answer].value == max(n.value for n in attempts)


def test_where_only_the_gold_answer_tells_a_right_end_does_not_end_the_search() -> None:
    unsure = Graph({"R": "xyz"}, frozenset({"x"}), checkable=False)
    tree = search("bfs", unsure, value=Table({"x": 0.2, "y": 0.9}))
    assert tree.end is End.EXHAUSTED and tree.nodes[tree.answer].text == "y"
    assert [n.value for n in tree.nodes[1:]] == [0.2, 0.9, 0.5], "the verdict is recorded, the value is not told of it"


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_with_an_oracle_every_strategy_finds_what_can_be_found(strategy: str) -> None:
    options = Options(width=300 if strategy == "best-of-n" else ALL, prune=0.0)
    for problem in PROBLEMS:
        tree = search(strategy, options=options, value=OracleValue(), problem=problem)
        solvable = problem.meta["target"] != 59
        assert (tree.end is End.SOLVED) == solvable
        if solvable:
            assert eval_path(tree, problem) == problem.meta["target"]
        else:
            assert tree.end is End.EXHAUSTED


def eval_path(tree: Tree, problem: Problem) -> object:
    """The number that the answer's steps leave, played again."""
    domain = ArithmeticDomain(problem)
    state = domain.root
    for node in tree.path(tree.answer):
        stepped = domain.step(state, node.text, False)
        assert isinstance(stepped, tuple)
        state = stepped[1]
    (number,) = state  # type: ignore[misc]
    return number


def test_large_numbers_are_read_as_they_are_written() -> None:
    problem = countdown([10**6] * 5, 10**6, None)
    tree = search("best-first", value=OracleValue(), options=Options(width=ALL, prune=0.0), problem=problem)
    assert tree.end is End.SOLVED and "unparsable" not in tree.counts
    text = ArithmeticDomain(problem).legal((10**6, 10**24))[2]
    assert ArithmeticDomain(problem).step((10**6, 10**24), text, False) == (text, (10**30,))


def test_fractions_count_where_no_max_value_forbids_them() -> None:
    fractions = search("dfs", value=OracleValue(), options=Options(width=ALL, prune=0.0), problem=countdown([1, 3, 4, 6], 24, None))
    assert fractions.path(fractions.answer)[-1].text == "6 /1/4 =24" and fractions.end is End.SOLVED
    assert search("dfs", value=HeuristicValue(), problem=countdown([1, 3, 4, 6], 24)).end is End.EXHAUSTED


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(STRATEGIES)),
    st.integers(0, 40),
    st.one_of(st.none(), st.integers(0, 90)),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from(PROBLEMS),
)
def test_no_budget_is_exceeded_and_every_search_ends(
    strategy: str, nodes: int, tokens: int | None, width: int, batch: int, problem: Problem
) -> None:
    tree = search(
        strategy,
        options=Options(width, batch),
        proposer=policy(RandomPlayer()),
        value=HeuristicValue(),
        budget=Budget(nodes, tokens),
        problem=problem,
    )
    assert len(tree.nodes) - 1 <= nodes and (tokens is None or tree.num_tokens <= tokens)
    assert tree.num_tokens >= sum(len(node.ids) for node in tree.nodes)
    if tree.end is End.BUDGET:
        assert len(tree.nodes) - 1 == nodes or tokens is not None or tree.counts, "else nothing was cut"
    if 0 in (nodes, tokens):
        assert (tree.end, len(tree.nodes), tree.num_tokens) == (End.BUDGET, 1, 0)
    assert all(node.versions == (3, 3) and len(node.logprobs) == len(node.ids) for node in tree.nodes[1:])


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("proposer", [ExhaustiveProposer(), policy(RandomPlayer())])
def test_only_a_search_that_had_the_tokens_for_all_it_tried_is_exhausted(strategy: str, proposer: Proposer) -> None:
    problem, options = countdown([2, 2, 3], 59), Options(3)

    def tree_of(tokens: int | None) -> Tree:
        return search(strategy, options=options, proposer=proposer, value=HeuristicValue(), budget=Budget(10_000, tokens), problem=problem)

    whole = tree_of(None)
    assert whole.end is End.EXHAUSTED
    for tokens in range(whole.num_tokens + 3 * 8 + 1):
        tree = tree_of(tokens)
        assert tree.end is not End.EXHAUSTED or [n.text for n in tree.nodes] == [n.text for n in whole.nodes], tokens
    assert tree.end is End.EXHAUSTED


def test_budgets_and_options_that_make_no_sense_are_refused() -> None:
    for make in (lambda: Budget(-1), lambda: Budget(5, -1), lambda: Options(width=0), lambda: Options(exploration=math.nan)):
        with pytest.raises(ConfigError, match="at least"):
            make()
    with pytest.raises(ConfigError, match="'greedy': is none of"):
        search("greedy", OPEN)
    with pytest.raises(ConfigError, match="numbers must be"):
        search("dfs", problem=countdown([], 3))


def proposal(text: str, **other: bool) -> Proposal:
    return Proposal(text, 4, **other)


def test_every_bad_step_is_counted_by_its_kind_and_paid() -> None:
    texts = [
        proposal(""),
        proposal("3 *5", complete=False),
        proposal("back"),
        proposal("what now"),
        proposal("5 +3 =9"),
        proposal("9 +3 =12"),
        proposal("7 /3 =2"),
        proposal("1/0 +3 =3"),
        proposal("5 +3 =8"),
        proposal("3 + 5 = 8"),
    ]
    tree = search("bfs", options=Options(width=10), proposer=Script(iter(texts)), problem=PROBLEMS[0])
    assert steps(tree) == ["5 +3 =8"] and tree.end is End.EXHAUSTED and tree.num_tokens == 40
    assert tree.counts == {"empty": 1, "too_long": 1, "declined": 1, "unparsable": 2, "illegal": 3, "repeated": 1, "no_proposal": 1}


@pytest.mark.parametrize("every", [False, True])
def test_best_of_n_pays_for_the_value_of_ends_alone_unless_its_steps_are_trained(every: bool) -> None:
    @dataclass
    class Counting:
        states: list[object] = field(default_factory=list)

        async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
            self.states += [position.state for position in positions]
            return Scores([0.5] * len(positions), 10 * len(positions))

    graph, value = Graph({"R": "A", "A": "BC", "B": "x", "C": "y"}, checkable=False), Counting()
    made = Search("best-of-n", lambda _: graph, Options(6), every_value=every)
    tree = asyncio.run(made.run(GRAPH_PROBLEM, ExhaustiveProposer(), value, Budget(100)))
    ends = [node.text for node in tree.nodes if node.verdict is not None]
    assert len(ends) == 6 and tree.answer != NO_NODE, "of ends the best is the answer"
    assert Counter(value.states) == Counter(ends if not every else [node.text for node in tree.nodes[1:]])
    assert [node.value for node in tree.nodes[1:]] == [0.5 if every or node.verdict else None for node in tree.nodes[1:]]
    paid = sum(node.verdict is not None or every for node in tree.nodes[1:])
    assert tree.num_tokens == 10 * paid + len(tree.nodes) - 1


@pytest.mark.parametrize("behind", [".5", "e3", " + 7 = 22", " - wrong, it is 16", "\n7 + 15 = 22", "..", "0" * 60, ",000", " (left: x)"])
def test_a_step_whose_text_goes_on_behind_its_result_is_unparsable(behind: str) -> None:
    texts = [
        proposal(f"3 * 5 = 15{behind}"),
        *(proposal(f"{text}{end}") for text, end in (("5 + 7 = 12", ".\n"), ("7 - 3 = 4", " (left: 4 5)\n\n"), ("3 *7 =21", ", \u2713"))),
    ]
    tree = search("bfs", options=Options(width=4), proposer=Script(iter(texts)), problem=PROBLEMS[0])
    assert steps(tree) == ["7 +5 =12", "7 -3 =4", "7 *3 =21"], "such endings change nothing"
    assert tree.counts["unparsable"] == 1


def test_cycles_and_states_met_before_are_not_entered_again() -> None:
    ring = Graph({"R": ["a", "b"], "a": ["b", "R", "a"], "b": ["a", "c"], "c": ["R"]})
    tree = search("bfs", ring)
    assert steps(tree) == ["a", "b", "c"] and tree.counts == {"cycle": 3, "repeated": 2}
    assert steps(search("mcts", ring)).count("b") == 2, "as another child's child a state may occur again, never above itself"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1, 1.1])
def test_a_value_that_cannot_be_is_counted_and_taken_as_none(bad: float) -> None:
    for strategy in STRATEGIES.keys() - {"best-of-n"}:  # it asks for the values of ends alone
        tree = search(strategy, OPEN, value=Table({"A": bad, "B": 0.4}))
        assert tree.counts["bad_value"] == sum(node.text == "A" for node in tree.nodes) > 0
        assert all((node.value is None) == (node.text == "A") for node in tree.nodes[1:] if node.verdict is None)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_what_answers_first_and_what_else_runs_changes_nothing(strategy: str) -> None:
    def trees(parallel: int, dawdle_s: float) -> list[Tree]:
        made = Search(strategy, ArithmeticDomain, Options(width=3, batch=4), seed=7)

        async def story() -> list[Tree]:
            proposer = policy(Troubled(dawdle_s=dawdle_s))
            jobs = [partial(made.run, p, proposer, HeuristicValue(), Budget(30, 200)) for p in PROBLEMS * 3]
            return [tree async for tree in run_all(jobs, parallel)]

        return asyncio.run(story())

    assert trees(1, 0.0) == trees(8, 0.002)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_a_server_lost_once_changes_nothing_but_a_count(strategy: str) -> None:
    def one(generator: Troubled) -> Tree:
        budget = Budget(25)
        return search(
            strategy, options=Options(6, 2), proposer=policy(generator), value=HeuristicValue(), budget=budget, problem=PROBLEMS[3]
        )

    assert not ArithmeticDomain(PROBLEMS[3]).solved_value(ArithmeticDomain(PROBLEMS[3]).root)
    number = 1 if strategy == "best-of-n" else 4  # whose attempts are one request
    whole, lost = one(Troubled()), one(Troubled(fails=lambda call: call == number))
    assert lost.nodes == whole.nodes and lost.end is whole.end and len(lost.nodes) > 10
    assert lost.counts == {**whole.counts, "retries": 1}


@pytest.mark.parametrize("strategy", sorted(STRATEGIES.keys() - {"best-of-n"}))
def test_a_server_lost_for_good_ends_the_search_with_every_finished_node(strategy: str) -> None:
    def one(generator: Troubled) -> Tree:
        return search(
            strategy, options=Options(6, 2), proposer=policy(generator), value=HeuristicValue(), budget=Budget(25), problem=PROBLEMS[3]
        )

    whole, lost = one(Troubled()), one(Troubled(fails=lambda call: call >= 4))
    assert lost.end is End.FAILED and "is gone" in lost.error
    assert 3 < len(lost.nodes) < len(whole.nodes)
    assert [n.text for n in lost.nodes] == [n.text for n in whole.nodes[: len(lost.nodes)]]


def test_a_value_lost_for_good_keeps_the_nodes_too() -> None:
    class Gone:
        async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
            raise NeoxRLError("the scorer is gone")

    tree = search("bfs", OPEN, value=Gone())
    assert (tree.end, steps(tree), tree.counts, tree.error) == (
        End.FAILED,
        ["A", "B"],
        {"retries": 2},
        "the search's value: the scorer is gone",
    )


def test_a_path_that_fills_the_context_is_left() -> None:
    tree = search("dfs", options=Options(2), proposer=policy(RandomPlayer(), max_context=11), problem=PROBLEMS[1])
    assert tree.end is End.EXHAUSTED and tree.counts["no_proposal"] > 0


def test_uct_is_the_standard_form() -> None:
    tree = search("mcts", OPEN, Options(width=2), value=HOPES, budget=Budget(2))
    strategy = Mcts(Options(exploration=2.0))
    leaf = type("Leaf", (), {"visits": 3, "hope": 0.5})()
    assert strategy.uct(leaf, 20) == pytest.approx(0.5 + 2.0 * math.sqrt(math.log(20) / 3))
    assert strategy.uct(leaf, 20, virtual=1) == pytest.approx(0.375 + 2.0 * math.sqrt(math.log(20) / 4))
    assert tree.nodes[0].visits == 2
