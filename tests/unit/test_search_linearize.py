"""Trees of any search told as Meta-CoT and read back, the styles, and the masks."""

from __future__ import annotations

import asyncio
import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_rl import metacot
from neox_rl.metacot import BACK, GOAL, SOLUTION
from neox_rl.search.analyze import analyze
from neox_rl.search.analyze_lines import analyze_lines
from neox_rl.search.arithmetic_domain import ArithmeticDomain
from neox_rl.search.demonstrations import TraceStyle
from neox_rl.search.domain import BACK_LINE, MARKER_LINES, RIGHT_LINE, SOLUTION_LINE, WRONG_LINE
from neox_rl.search.growth import Budget
from neox_rl.search.linearize import Mask, bare, demonstration, glue_of, linearize, solution_of, text_of, tree_of
from neox_rl.search.proposers import ExhaustiveProposer, Position, Proposal
from neox_rl.search.rollouts import told_trace
from neox_rl.search.search import Search
from neox_rl.search.strategies import STRATEGIES
from neox_rl.search.strategy import Options
from neox_rl.search.styles import MAX_ATTEMPTS, STYLES, backtrack, pruned, revision, selected, stream, taken
from neox_rl.search.text_domain import TextDomain
from neox_rl.search.values import HeuristicValue, NoValue
from neox_rl.types import Node, Problem, Reason, Role, Tree, Verdict, VersionSpan
from neox_rl.verify.verifier import ArithmeticVerifier
from tests.unit.search_worlds import TOKENIZER, countdown
from tests.unit.test_episodes import Letters

TASKS = [countdown([3, 5, 7], 26), countdown([2, 4, 9, 1], 17), countdown([1, 2, 3, 4], 59), countdown([1, 3, 4, 6], 24, None)]


def grown(problem: Problem, strategy: str, seed: int, nodes: int, width: int = 4) -> Tree:
    made = Search(strategy, ArithmeticDomain, Options(width), seed)
    return asyncio.run(made.run(problem, ExhaustiveProposer(), HeuristicValue(), Budget(nodes)))


trees = st.builds(
    lambda task, strategy, seed, nodes: (task, grown(task, strategy, seed, nodes)),
    st.sampled_from(TASKS),
    st.sampled_from(sorted(STRATEGIES)),
    st.integers(0, 1 << 16),
    st.integers(0, 60),
)
lines = (
    st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=12)
    .map(str.strip)
    .filter(lambda s: s not in MARKER_LINES)
)


@st.composite
def text_trees(draw: st.DrawFn) -> Tree:
    """Any shape and any lines, siblings of different ones; nothing hangs under an end."""
    nodes = [Node(0, -1, "", 0)]
    for i in range(1, draw(st.integers(1, 25))):
        parent = draw(st.sampled_from([n.id for n in nodes if n.verdict is None]))
        text = draw(lines)
        if any(n.parent == parent and n.text == text for n in nodes):
            text = f"{text} {i}"
        correct = draw(st.sampled_from([None, None, True, False]))
        verdict = None if correct is None else Verdict(correct, "", Reason.MATCH if correct else Reason.MISMATCH, 0.0)
        nodes.append(Node(i, parent, text, i, verdict=verdict))
    return Tree("text", tuple(nodes))


@settings(deadline=None)
@given(trees, st.sampled_from(sorted(STYLES)), st.booleans(), st.floats(0, 1))
def test_a_told_tree_reads_back_whatever_the_search_and_the_style(made: tuple[Problem, Tree], style: str, restart: bool, p: float) -> None:
    task, tree = made
    telling = STYLES[style](tree, random.Random(p))
    for told in (telling.tree, pruned(telling.tree, random.Random(p), p)):
        text = text_of(linearize(told, task, restart or telling.restart))
        assert tree_of(task, text) == bare(told, task)


@settings(deadline=None)
@given(text_trees(), st.booleans())
def test_a_tree_of_any_lines_reads_back(tree: Tree, restart: bool) -> None:
    task = Problem("text", "math", "", "", "")
    assert tree_of(task, text_of(linearize(tree, task, restart), glue_of(task))) == bare(tree, task)


class Babbler:
    """Writes lines with space around them, markers, nothing, and the same words as an end and as a step that goes on."""

    words = ("a", " a", "b", "b\t", "", BACK_LINE, f" {WRONG_LINE}", SOLUTION_LINE, "a\vb", "[EPISODE 2]", "<eos>", "c\rd", "e\nf")

    @property
    def step_tokens(self) -> int:
        return 1

    async def propose(self, position: Position, n: int, max_tokens: int) -> list[Proposal]:
        rng = random.Random(position.seed)
        drawn = [(rng.choice(self.words), rng.random() < 0.4) for _ in range(n)]
        texts = [(word if ended else f"{word}\n", ended) for word, ended in drawn]
        return [Proposal(text, 1, (i,), (-1.0,), (VersionSpan(0, 0, 1),), True, ended) for i, (text, ended) in enumerate(texts)]


class Coin:
    async def check(self, problem: Problem, text: str) -> Verdict:
        correct = len(text) % 3 == 0
        return Verdict(correct, "", Reason.MATCH if correct else Reason.MISMATCH, 0.0)


@settings(deadline=None)
@given(
    st.sampled_from(sorted(STRATEGIES)), st.sampled_from(sorted(STYLES)), st.sampled_from(Mask), st.integers(0, 1 << 16), st.floats(0, 1)
)
def test_whatever_a_policy_writes_is_told_and_reads_back(strategy: str, style: str, mask: Mask, seed: int, p: float) -> None:
    task = Problem("text", "math", "question", "", "")
    search = Search(strategy, lambda problem: TextDomain(problem, Coin()), Options(3), seed)
    tree = asyncio.run(search.run(task, Babbler(), NoValue(), Budget(30)))
    telling = STYLES[style](pruned(tree, random.Random(seed), p), random.Random(seed))
    text = text_of(linearize(telling.tree, task, telling.restart), glue_of(task))
    assert tree_of(task, text) == bare(telling.tree, task)
    assert bool(solution_of(telling.tree)) == bool(solution_of(tree)) == (SOLUTION_LINE in text.split("\n"))
    trace = told_trace(tree, task, TraceStyle(style, mask, p), TOKENIZER, random.Random(seed), 10_000, lambda *_: 1.0)
    assert any(s.mask for s in trace.segments) == bool(solution_of(tree))
    counted = analyze_lines(text)
    assert (counted.num_illegal_backtracks, counted.num_misplaced) == (0, 0), "its own telling holds no flaw"


def test_lines_are_told_with_markers() -> None:
    task = Problem("text", "math", "", "", "")
    right, wrong = Verdict(True, "4", Reason.MATCH, 1.0), Verdict(False, "5", Reason.MISMATCH, 1.0)
    nodes = [(-1, "", None), (0, "Let me see.\n", None), (1, "2+2=5\n", wrong), (0, "Again.\n", None), (1, "2+2=4\n", right)]
    tree = Tree("text", tuple(Node(i, parent, text, i, verdict=v) for i, (parent, text, v) in enumerate(nodes)))
    text = text_of(linearize(tree, task), glue_of(task))
    assert text.split("\n")[:-1] == [
        *("Let me see.", "2+2=5", WRONG_LINE, BACK_LINE, "Again.", BACK_LINE, "Let me see.", "2+2=4", RIGHT_LINE),
        *(SOLUTION_LINE, "Let me see.", "2+2=4"),
    ]
    trace = demonstration(task, linearize(tree, task), Letters(), 1.0, "g000000/r0", Mask.SEARCH, glue_of(task))
    assert Letters().decode([i for s in trace.segments if s.mask for i in s.ids]) == text[: text.index("[SOLUTION]\n") + 11]
    with pytest.raises(ValueError, match="not one line"):
        linearize(Tree("text", (nodes_root := Node(0, -1, "", 0), Node(1, nodes_root.id, BACK_LINE, 1))), task)
    with pytest.raises(ValueError, match="at the root"):
        tree_of(task, f"{BACK_LINE}\n")


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1 << 16), st.sampled_from(sorted(STRATEGIES)), st.sampled_from(sorted(STYLES)))
def test_what_is_told_holds_no_flaw_and_its_solution_is_right(seed: int, strategy: str, style: str) -> None:
    task = TASKS[seed % 2]
    tree = grown(task, strategy, seed, 60, width=8)
    telling = STYLES[style](tree, random.Random(seed))
    text = text_of(linearize(telling.tree, task, telling.restart))
    seen = analyze(task, text)
    assert (seen.num_wrong, seen.num_false_goals, seen.num_illegal_backtracks, seen.num_junk_words, seen.num_misplaced) == (0, 0, 0, 0, 0)
    assert seen.has_answer == bool(solution_of(tree))
    if seen.has_answer:
        assert ArithmeticVerifier().check_sync(task, text).correct


@cache
def solved_tree(seed: int = 0, wrong_ends: int = 0) -> Tree:
    """A search of TASKS[1] with a right end and at least so many wrong ones."""
    for s in range(seed, seed + 500):
        tree = grown(TASKS[1], "mcts", s, 150)
        if solution_of(tree) and sum(n.verdict is not None for n in tree.nodes) > wrong_ends:
            return tree
    raise AssertionError("no search succeeds")


def test_a_revision_holds_j_wrong_attempts_each_from_the_root() -> None:
    tree = solved_tree(wrong_ends=MAX_ATTEMPTS)
    drawn = []
    for seed in range(60):
        telling = revision(tree, random.Random(seed))
        ends = [n for n in telling.tree.nodes if n.verdict is not None]
        assert [n.verdict.correct for n in ends if n.verdict] == [False] * (len(ends) - 1) + [True]
        drawn.append(len(ends) - 1)
        text = text_of(linearize(telling.tree, TASKS[1], telling.restart))
        attempts = text.partition(SOLUTION)[0].replace(metacot.HIGH, metacot.LOW).replace(GOAL, metacot.LOW).split(metacot.LOW)[:-1]
        assert len(attempts) == len(ends) and all(a.split().count("=") + sum(w[0] == "=" for w in a.split()) == 3 for a in attempts)
    assert set(drawn) == set(range(1, MAX_ATTEMPTS + 1))


def test_backtracking_puts_a_wrong_step_before_a_right_one_at_its_rate() -> None:
    tree = solved_tree()
    path = [n.text for n in solution_of(tree)]
    none, each = (backtrack(tree, random.Random(0), rate).tree for rate in (0.0, 1.0))
    assert [n.text for n in none.nodes[1:]] == path
    words = text_of(linearize(each, TASKS[1])).partition(SOLUTION)[0]
    assert len(each.nodes) - 1 == 2 * len(path) and words.split().count(BACK) == len(path) - 1
    assert [n.text for n in each.nodes[2::2]] == path


def test_taken_leaves_out_what_was_never_gone_into() -> None:
    tree = grown(TASKS[1], "best-first", 1, 60)
    told = taken(tree, random.Random(0)).tree
    expanded = {n.parent for n in tree.nodes}
    kept = [n for n in tree.nodes[1:] if n.id in expanded or n.verdict is not None]
    assert {n.text for n in told.nodes[1:]} <= {n.text for n in kept} and len(told.nodes) <= len(kept) + 1 < len(tree.nodes)
    assert stream(told, random.Random(0)).tree == told


@given(st.floats(0, 1), st.integers(0, 99))
@settings(deadline=None)
def test_pruning_never_touches_the_solution(p: float, seed: int) -> None:
    tree = solved_tree(seed % 3)
    left = pruned(tree, random.Random(seed), p)
    assert [n.text for n in solution_of(left)] == [n.text for n in solution_of(tree)]
    assert p < 1 or len(left.nodes) == len(solution_of(tree)) + 1
    assert p > 0 or left.nodes == selected(tree, range(len(tree.nodes))).nodes


def test_masks_train_all_the_search_alone_or_the_path_alone() -> None:
    tree = solved_tree()
    spans = linearize(tree, TASKS[1])
    right = {n.text for n in solution_of(tree)}

    def trained(mask: Mask) -> list[tuple[str, Role]]:
        trace = demonstration(TASKS[1], spans, TOKENIZER, 1.0, "g000000/r0", mask)
        assert trace.segments[0].mask == 0.0
        return [(TOKENIZER.decode(s.ids), s.role) for s in trace.segments if s.mask]

    everything = " ".join(text for text, _ in trained(Mask.ALL)).strip()
    assert everything == text_of(spans)
    search = trained(Mask.SEARCH)
    assert [text for text, role in search if role is Role.SOLUTION] == [SOLUTION] and search[-1][1] is Role.SOLUTION, "where Z ends"
    assert " ".join(text for text, _ in search).strip() == everything[: everything.index(SOLUTION) + len(SOLUTION)]
    assert {role for _, role in search} == {Role.THINK, Role.VERIFY, Role.BACK, Role.SOLUTION}
    path = trained(Mask.PATH)
    steps = " ".join(text for text, role in path if role is Role.THINK)
    assert steps == " ".join(n.text for n in solution_of(tree)) and {" ".join(steps.split()[i : i + 3]) for i in range(0, 9, 3)} == right
    assert [text for text, role in path if role is Role.VERIFY] == [GOAL] and not any(role is Role.BACK for _, role in path)


def test_of_a_revision_the_path_is_trained_where_the_right_attempt_tells_it() -> None:
    """The step that both attempts begin with is context in the wrong one."""
    steps, parents = ["", "7 *3 =21", "21 -5 =16", "21 +5 =26"], (-1, 0, 1, 1)
    verdicts = [None, None, Verdict(False, "16", Reason.MISMATCH, 0.0), Verdict(True, "26", Reason.MATCH, 0.0)]
    tree = Tree(TASKS[0].id, tuple(Node(i, parents[i], steps[i], i, verdict=verdicts[i]) for i in range(4)))
    spans = linearize(tree, TASKS[0], restart=True)
    assert [(span.text, span.on_path) for span in spans] == [
        *(("7 *3", False), ("=21", False), ("21 -5", False), ("=16", False), (metacot.LOW, False), (BACK, False)),
        *(("7 *3", True), ("=21", True), ("21 +5", True), ("=26", True), (GOAL, True), (SOLUTION, True), ("( 7 * 3 ) + 5", True)),
    ]


@settings(deadline=None)
@given(trees, text_trees(), st.sampled_from(sorted(STYLES)), st.booleans(), st.integers(0, 99))
def test_the_path_is_told_once_and_with_restarts_in_one_piece(
    made: tuple[Problem, Tree], texts: Tree, style: str, restart: bool, seed: int
) -> None:
    for task, tree in (made, (Problem("text", "math", "", "", ""), texts)):
        telling = STYLES[style](tree, random.Random(seed))
        again = restart or telling.restart
        spans = linearize(telling.tree, task, again)
        alone = linearize(STYLES["solution"](tree, random.Random(0)).tree, task)
        on_path = [i for i, span in enumerate(spans) if span.on_path]
        assert [spans[i] for i in on_path] == alone
        steps = [i for i in on_path if spans[i].role is not Role.SOLUTION]
        assert not again or steps == list(range(steps[0], steps[-1] + 1) if steps else ())


def test_a_search_out_of_order_enters_known_steps_again() -> None:
    steps = ["", "7 +5 =12", "7 *3 =21", "12 +3 =15", "21 +5 =26"]
    verdicts = [None, None, None, Verdict(False, "15", Reason.MISMATCH, 0.0), Verdict(True, "26", Reason.MATCH, 0.0)]
    parents = (-1, 0, 0, 1, 2)
    tree = Tree(TASKS[0].id, tuple(Node(i, parents[i], steps[i], i, verdict=verdicts[i]) for i in range(5)))
    text = text_of(linearize(tree, TASKS[0]))
    again = f"{BACK} {steps[1]} {steps[3]} {metacot.LOW} {BACK} {steps[2]}"
    assert text == f"{steps[1]} {BACK} {steps[2]} {again} {steps[4]} {GOAL} {SOLUTION} ( 7 * 3 ) + 5"
    assert analyze(TASKS[0], text).num_repeated == 2
