"""Depth-first search, its linearization and back, and the demonstrations made of both."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neox_rl import metacot
from neox_rl.arithmetic import reachable, state_of
from neox_rl.errors import ConfigError
from neox_rl.metacot import Step, prompt_text, step_text
from neox_rl.search.demonstrations import Demonstrations, TraceStyle, searches
from neox_rl.search.dfs import MIXED, ORDERS, Strategy, dfs, expected_nodes, rules, solution_path, tree_size
from neox_rl.search.linearize import demonstration, linearize, text_of, tree_of
from neox_rl.types import NO_VERSION, Node, Problem, Role, Tree
from tests.unit.small_run import traces_of

MAX_VALUE = 60


class Words:
    """A tokenizer that gives every new word the next id."""

    eos_id = 0

    def __init__(self) -> None:
        self.words = [metacot.EOS]

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> tuple[int, ...]:
        new = dict.fromkeys(word for word in text.split() if word not in self.words)
        self.words.extend(new)
        return tuple(self.words.index(word) for word in text.split())

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        return self.encode(text)

    def decode(self, ids: object) -> str:
        return " ".join(self.words[i] for i in ids)  # type: ignore[attr-defined]


def problem(numbers: list[int], target: int) -> Problem:
    name = ",".join(map(str, numbers))
    return Problem(
        f"countdown/{name}->{target}",
        "countdown",
        prompt_text(numbers, target),
        str(target),
        name,
        {"numbers": list(numbers), "target": target, "max_value": MAX_VALUE},
    )


@st.composite
def problems(draw: st.DrawFn, max_size: int = 4) -> Problem:
    numbers = sorted(draw(st.lists(st.integers(1, 9), min_size=2, max_size=max_size)))
    return problem(numbers, draw(st.sampled_from(sorted(reachable(state_of(numbers), MAX_VALUE)))))


@given(problems(), st.integers(0, 1000), st.sampled_from(sorted(ORDERS)))
def test_search_ends_at_its_only_goal_and_depends_on_the_seed_alone(task: Problem, seed: int, order: str) -> None:
    tree = dfs(task, random.Random(seed), Strategy(ORDERS[order], ORDERS[order]))
    assert tree == dfs(task, random.Random(seed), Strategy(ORDERS[order], ORDERS[order]))
    goals = [n.id for n in tree.nodes if n.verdict is not None and n.verdict.correct]
    assert goals == [len(tree.nodes) - 1]
    assert [n.id for n in tree.nodes] == [n.order for n in tree.nodes] == list(range(len(tree.nodes)))
    assert all(n.parent < n.id for n in tree.nodes)


@given(problems(), st.integers(0, 1000), st.one_of(st.none(), st.integers(0, 30)))
def test_linearized_tree_reads_back_as_the_same_tree(task: Problem, seed: int, max_nodes: int | None) -> None:
    for tree in (dfs(task, random.Random(seed), max_nodes=max_nodes), solution_path(task, random.Random(seed))):
        assert tree_of(task, text_of(linearize(tree, task))) == tree


def test_unsolvable_problem_is_searched_whole() -> None:
    task = problem([2, 2, 2], 59)
    tree = dfs(task, random.Random(0))
    assert len(tree.nodes) - 1 == tree_size(*(rules(task)[i] for i in (0, 2)))
    assert metacot.SOLUTION not in text_of(linearize(tree, task))
    with pytest.raises(ValueError, match="no solution"):
        solution_path(task, random.Random(0))


def test_node_budget_bounds_the_search() -> None:
    task = problem([3, 5, 7], 26)
    assert [len(dfs(task, random.Random(0), max_nodes=n).nodes) - 1 for n in (0, 1, 5)] == [0, 1, 5]


def test_text_of_a_search_shows_dead_ends_backtracking_and_the_solution() -> None:
    task = problem([3, 5, 7], 26)
    tree = next(t for seed in itertools.count() if 8 < len((t := dfs(task, random.Random(seed))).nodes) < 15)
    words = text_of(linearize(tree, task)).split()
    leaves = [n for n in tree.nodes if n.verdict is not None]
    assert words.count(metacot.GOAL) == 1
    assert words.count(metacot.LOW) + words.count(metacot.HIGH) == len(leaves) - 1
    left = {n.parent for n in tree.nodes} - {-1, 0, tree.nodes[-1].parent}
    assert words.count(metacot.BACK) == len(left) > 0
    assert text_of(linearize(tree, task)).endswith(f"{metacot.SOLUTION} ( 7 * 3 ) + 5")


def test_only_the_operands_of_a_step_are_choices() -> None:
    task = problem([3, 5, 7], 26)
    tree = dfs(task, random.Random(0))
    chosen = [span.text for span in linearize(tree, task) if span.choice]
    assert chosen == [n.text.rpartition(" ")[0] for n in tree.nodes[1:]]


def test_random_search_takes_as_many_steps_on_average_as_the_formula_says() -> None:
    task = problem([3, 5, 7], 26)
    counts = [len(dfs(task, random.Random(seed)).nodes) - 1 for seed in range(1500)]
    error = statistics.stdev(counts) / len(counts) ** 0.5
    assert abs(statistics.mean(counts) - expected_nodes(*rules(task))) < 4 * error


def test_solution_paths_are_drawn_evenly() -> None:
    task = problem([1, 2, 9], 18)
    drawn = [solution_path(task, random.Random(seed)) for seed in range(300)]
    texts = {text_of(linearize(tree, task)) for tree in drawn}
    assert len(texts) == len({t.partition(metacot.SOLUTION)[0] for t in texts}) > 1
    assert all(len(tree.nodes) == 3 for tree in drawn)


def test_trees_that_no_text_can_hold_and_texts_of_no_tree_are_refused() -> None:
    task = problem([3, 5, 7], 26)
    steps = ["", *map(step_text, (Step(5, "+", 3, 8), Step(5, "-", 3, 2), Step(8, "+", 7, 15)))]
    with pytest.raises(ValueError, match="in their order"):
        linearize(Tree(task.id, (Node(0, -1, "", 0), Node(1, 0, steps[1], 7))), task)
    with pytest.raises(ValueError, match="merge them"):
        linearize(Tree(task.id, (Node(0, -1, "", 0), Node(1, 0, steps[1], 1), Node(2, 0, steps[1], 2))), task)
    for text in ("hello", "back", f"{steps[1]} back back", f"{steps[1]} {metacot.LOW}", f"{steps[1]} {steps[3]} {metacot.GOAL}", "5 +3"):
        with pytest.raises(ValueError, match="linearized tree"):
            tree_of(task, text)


@given(problems(), st.integers(0, 1000), st.sampled_from([0.0, 0.25, 1.0]))
def test_demonstration_masks_the_prompt_and_weighs_choices(task: Problem, seed: int, weight: float) -> None:
    tokenizer = Words()
    spans = linearize(dfs(task, random.Random(seed)), task)
    trace = demonstration(task, spans, tokenizer, weight, "g000000/r0")
    prompt, *rest = trace.segments
    assert (prompt.role, prompt.mask, tokenizer.decode(prompt.ids)) == (Role.PROMPT, 0.0, task.prompt)
    text = tokenizer.decode([i for segment in rest for i in segment.ids])
    assert text == f"{text_of(spans)} {metacot.EOS}"
    words = [(word, s.role, s.mask) for s in rest for word in tokenizer.decode(s.ids).split()]
    expected = [(word, span.role, weight if span.choice else 1.0) for span in spans for word in span.text.split()]
    assert words == [*expected, (metacot.EOS, Role.SOLUTION, 1.0)]
    assert {word for word, role, _ in words if role is Role.VERIFY} <= {metacot.LOW, metacot.HIGH, metacot.GOAL}
    assert rest[-1].role is Role.SOLUTION and rest[-1].ids[-1] == tokenizer.eos_id
    assert all(s.version == NO_VERSION and not s.logprobs for s in trace.segments) and trace.reward == 1.0


def test_demonstrations_are_seeded_endless_and_resumable() -> None:
    source = searches([problem([3, 5, 7], t) for t in (22, 26, 28)], "dfs", TraceStyle(), Words())
    stream = Demonstrations(source, seed=1, max_tokens=80)
    first = traces_of(stream, 40)
    assert [t.id for t in first[:2]] == ["g000000/r0", "g000001/r0"]
    assert max(t.num_tokens for t in first) <= 80 and stream.skipped > 0, "longer ones were skipped and counted"
    assert first == traces_of(Demonstrations(source, seed=1, max_tokens=80), 40)
    resumed = Demonstrations(source, seed=1, max_tokens=80, draws=stream.draws, ticket=stream.ticket)
    assert traces_of(stream, 10) == traces_of(resumed, 10)
    assert first != traces_of(Demonstrations(source, seed=2, max_tokens=80), 40)


def test_demonstrations_without_search_hold_no_dead_end() -> None:
    tokenizer = Words()
    source = searches([problem([3, 5, 7], 26)], "solution", TraceStyle(), tokenizer)
    for trace in traces_of(Demonstrations(source, seed=1), 20):
        words = tokenizer.decode([i for s in trace.segments[1:] for i in s.ids]).split()
        assert not {metacot.LOW, metacot.HIGH, metacot.BACK} & set(words)


def test_demonstrations_that_cannot_be_made_are_refused() -> None:
    tasks, tokenizer = [problem([3, 5, 7], 26)], Words()
    with pytest.raises(ConfigError, match="longer than 10 tokens"):
        next(Demonstrations(searches(tasks, "dfs", TraceStyle(), tokenizer), seed=1, max_tokens=10))
    with pytest.raises(ConfigError, match="'bfs'"):
        searches(tasks, "bfs", TraceStyle(), tokenizer)
    with pytest.raises(ConfigError, match="at least one problem"):
        searches([], "dfs", TraceStyle(), tokenizer)


def test_searchers_of_mixed_quality_all_reach_the_goal_and_the_narrow_informed_one_takes_the_fewest_steps() -> None:
    tasks = [problem(numbers, target) for numbers, target in (([3, 5, 7], 26), ([2, 4, 9], 17), ([1, 6, 8], 14), ([4, 5, 6], 34))]
    steps: list[float] = []
    for strategy in MIXED:
        trees = [dfs(task, random.Random(seed), strategy) for task in tasks for seed in range(50)]
        assert all(tree.nodes[-1].verdict is not None and tree.nodes[-1].verdict.correct for tree in trees)
        steps.append(statistics.mean(len(tree.nodes) - 1 for tree in trees))
    assert steps[3] < min(steps[1], steps[2]) and max(steps[1], steps[2]) < steps[0]
