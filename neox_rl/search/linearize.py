"""A search tree as Meta-CoT text and back (arXiv 2501.04682, (1)-(3)), and as a trace with loss masks ((22)-(24)).

Arithmetic problems are written in the words of ``neox_rl.metacot``, others as lines of text, with marker lines. Both tell a search
the same way: each node once, in the order in which it was made, and the moves in between. After a dead end the search is in its parent
again; ``back`` goes up a level; a step that was told before enters that node once more. So trees of any order can be told, and the
text of a depth-first search has no such repetition. Z is everything up to the solution S, which is told when a right end was found.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from neox_rl import metacot
from neox_rl.arithmetic import ARITHMETIC_TASKS
from neox_rl.ports import Tokenizer
from neox_rl.search.arithmetic_domain import ArithmeticDomain, Operation, read_operation
from neox_rl.search.dfs import leaf_verdict, new_tree
from neox_rl.search.domain import BACK_LINE, MARKER_LINES, RIGHT_LINE, SOLUTION_LINE, WRONG_LINE
from neox_rl.types import NO_NODE, Finish, Node, Problem, Reason, Role, Segment, Trace, Tree, Verdict


class Span(NamedTuple):
    """Words of one role.

    ``choice``: they say which step is tried next, which a random search does not determine. ``on_path``: they belong to the solution
    path, not to a branch off it. ``boundary``: where Z ends and S begins.
    """

    text: str
    role: Role
    choice: bool = False
    on_path: bool = True
    boundary: bool = False


class Mask(StrEnum):
    """Which tokens of a trace are trained on: all of it (22), the search alone (23), or what is not off the solution path (24),
    or in a telling that ``corrects`` what is no wrong step (10). The search ends with the word (the line) that S begins with, or what
    learned from it alone would never stop to search."""

    ALL = "all"
    SEARCH = "search"
    PATH = "path"


DEMONSTRATED = Verdict(correct=True, extracted="", reason=Reason.MATCH, ms=0.0)
_COMPARE = frozenset((metacot.LOW, metacot.HIGH, metacot.GOAL))
_BACK = Span(metacot.BACK, Role.BACK, on_path=False)
_BACK_LINE = Span(BACK_LINE + "\n", Role.BACK, on_path=False)
_BOUNDARY = Span(metacot.SOLUTION, Role.SOLUTION, boundary=True)
_BOUNDARY_LINE = Span(SOLUTION_LINE + "\n", Role.SOLUTION, boundary=True)


class Told(NamedTuple):
    """One move of a told search: back up a level (``node`` None), into a node told before (``again``), or a new node."""

    node: Node | None
    again: bool = False


_UP = Told(None)


def moves(tree: Tree, restart: bool = False) -> Iterator[Told]:
    """The moves that tell ``tree``. ``restart``: whatever follows an end or another branch begins at the root, as a new attempt does.

    Raises ValueError for a tree whose nodes are not numbered in their order, and where two siblings say the same (``said``).
    """
    path = [0]
    told: set[tuple[int, str, bool | None]] = set()
    over = False
    for node in tree.nodes[1:]:
        if node.order != node.id:
            raise ValueError(f"node {node.id} of {tree.problem_id} has order {node.order}; number nodes in their order")
        says = (node.parent, *said(node))
        if says in told:
            raise ValueError(f"node {node.id} of {tree.problem_id} is told as {node.text!r}, as one of its siblings is; merge them")
        told.add(says)
        if path[-1] != node.parent or (restart and over):
            yield from _jump(tree, path, node.parent, restart)
        yield Told(node)
        over = node.verdict is not None
        if not over:
            path.append(node.id)


def said(node: Node) -> tuple[str, bool | None]:
    """What a told step says: its words without the space around them and, of an end, whether it is right. A path may go on behind the
    words with which another ends."""
    return node.text.strip(), None if node.verdict is None else node.verdict.correct


def _jump(tree: Tree, path: list[int], to: int, restart: bool) -> Iterator[Told]:
    """From the end of ``path``, which is changed, to node ``to``: up to an ancestor of it, and down the way there."""
    down: list[Node] = []
    keep = {0} if restart else set(path)
    while to not in keep:
        node = tree.nodes[to]
        if node.verdict is not None:
            raise ValueError(f"node {to} of {tree.problem_id} has a verdict and children: nothing follows an end")
        down.append(node)
        to = node.parent
    while path[-1] != to:
        path.pop()
        yield _UP
    for node in reversed(down):
        path.append(node.id)
        yield Told(node, again=True)


def _on_path(told: Sequence[Told], restart: bool, solution: Sequence[Node]) -> set[int]:
    """Which moves are the steps of the solution path. Such a step is on it where it is told first; with ``restart`` where it is told last
    before the right end, in the attempt that comes to it: told earlier, it belongs to an attempt that came out wrong."""
    path = {node.id for node in solution}
    found = dict[int, int]()
    for at, (node, again) in enumerate(told):
        if node is not None and node.id in path and (restart or not again):
            found[node.id] = at
            if node is solution[-1]:
                break
    return set(found.values())


def solution_of(tree: Tree) -> tuple[Node, ...]:
    """The path to the first right end, empty without one."""
    goal = next((n.id for n in tree.nodes if n.verdict is not None and n.verdict.correct), NO_NODE)
    return tree.path(goal)


def bare(tree: Tree, problem: Problem) -> Tree:
    """What a text can hold of ``tree``: its shape, its steps and its verdicts, without tokens, statistics and cost."""
    nodes = (
        Node(n.id, n.parent, n.text.strip(), n.order, verdict=_told_verdict(problem, n.text, n.verdict) if n.verdict and n.id else None)
        for n in tree.nodes
    )
    return new_tree(tree.problem_id, tuple(nodes))


def _told_verdict(problem: Problem, text: str, verdict: Verdict) -> Verdict:
    return leaf_verdict(str(_operation(text).result) if is_arithmetic(problem) else "", verdict.correct)


def is_arithmetic(problem: Problem) -> bool:
    return problem.task in ARITHMETIC_TASKS


def linearize(tree: Tree, problem: Problem, restart: bool = False) -> list[Span]:
    """The search, dead ends included, then the solution when a right end was found. See ``moves`` for ``restart`` and ValueError."""
    return _words(tree, problem, restart) if is_arithmetic(problem) else _lines(bare(tree, problem), restart)


def _words(tree: Tree, problem: Problem, restart: bool) -> list[Span]:
    target = int(str(problem.meta["target"]))
    solution = solution_of(tree)
    told = list(moves(tree, restart))
    on_path = _on_path(told, restart, solution)
    spans: list[Span] = []
    for at, (node, _) in enumerate(told):
        if node is None:
            spans.append(_BACK)
            continue
        good = at in on_path
        spans.extend(_step_spans(node.text, good))
        if node.verdict is not None:
            spans.append(_compare_span(node.text, target, good))
    if solution:
        answer = ArithmeticDomain(problem).answer([node.text for node in solution])
        spans += (_BOUNDARY, Span(answer.removeprefix(f"{metacot.SOLUTION} "), Role.SOLUTION))
    return spans


def _lines(tree: Tree, restart: bool) -> list[Span]:
    solution = solution_of(tree)
    told = list(moves(tree, restart))
    on_path = _on_path(told, restart, solution)
    spans: list[Span] = []
    for at, (node, _) in enumerate(told):
        if node is None:
            spans.append(_BACK_LINE)
            continue
        if "\n" in node.text or node.text in MARKER_LINES:
            raise ValueError(f"node {node.id} of {tree.problem_id} is not one line of its own: {node.text!r}")
        good = at in on_path
        spans.append(Span(node.text + "\n", Role.THINK, True, good))
        if node.verdict is not None:
            spans.append(Span((RIGHT_LINE if node.verdict.correct else WRONG_LINE) + "\n", Role.VERIFY, False, good))
    if solution:
        spans += (_BOUNDARY_LINE, Span("".join(f"{node.text}\n" for node in solution), Role.SOLUTION))
    return spans


def glue_of(problem: Problem) -> str:
    """What stands between spans: a space between words, nothing between lines."""
    return " " if is_arithmetic(problem) else ""


def text_of(spans: Sequence[Span], glue: str = " ") -> str:
    return glue.join([span.text for span in spans])


def tree_of(problem: Problem, text: str) -> Tree:
    """The tree that ``linearize`` wrote as ``text``. For a policy's output use ``replay``: of other texts ValueError refuses what cannot be
    followed, and no more. Steps that the numbers do not allow, and what stands behind ``solution``, pass."""
    return _tree_of_words(problem, text) if is_arithmetic(problem) else _tree_of_lines(problem, text)


def _tree_of_lines(problem: Problem, text: str) -> Tree:
    nodes = [Node(0, NO_NODE, "", 0)]
    path, entered = [0], dict[tuple[int, str], int]()
    lines = text.split("\n")
    for line, following in itertools.pairwise(lines):
        if line == SOLUTION_LINE:
            break
        if line == BACK_LINE:
            path.pop()
        elif following in (RIGHT_LINE, WRONG_LINE):
            nodes.append(Node(len(nodes), path[-1], line, len(nodes), verdict=leaf_verdict("", following == RIGHT_LINE)))
        elif line not in MARKER_LINES:
            known = entered.get((path[-1], line))
            if known is None:
                known = entered[path[-1], line] = len(nodes)
                nodes.append(Node(known, path[-1], line, known))
            path.append(known)
        if not path:
            raise ValueError(f"{BACK_LINE} at the root of {problem.id}: not of a linearized tree")
    return new_tree(problem.id, tuple(nodes))


def _tree_of_words(problem: Problem, text: str) -> Tree:
    numbers = problem.meta["numbers"]
    assert isinstance(numbers, list)
    target, leaf_depth = int(str(problem.meta["target"])), len(numbers) - 1
    nodes = [Node(0, NO_NODE, "", 0)]
    path, entered = [0], dict[tuple[int, str], int]()
    words = text.split()
    i, end = 0, len(words)
    while i < end:
        word = words[i]
        if word == metacot.BACK and len(path) > 1:
            path.pop()
        elif word == metacot.SOLUTION and nodes[-1].verdict is not None:
            break
        elif word in _COMPARE and nodes[-1].verdict is not None:
            if word != _compare_span(nodes[-1].text, target, False).text:
                raise ValueError(f"{word!r} after {nodes[-1].text!r}: no linearized tree says so")
        else:
            step = " ".join(words[i : i + 3])
            i += 2
            if len(path) == leaf_depth:
                result = str(_operation(step).result)
                nodes.append(Node(len(nodes), path[-1], step, len(nodes), verdict=leaf_verdict(result, result == str(target))))
            else:
                path.append(_enter(nodes, entered, path[-1], step))
        i += 1
    return new_tree(problem.id, tuple(nodes))


def _enter(nodes: list[Node], entered: dict[tuple[int, str], int], parent: int, step: str) -> int:
    known = entered.get((parent, step))
    if known is None:
        _operation(step)
        known = entered[parent, step] = len(nodes)
        nodes.append(Node(known, parent, step, known))
    return known


def weight(span: Span, mask: Mask, choice_weight: float = 1.0, corrects: bool = False) -> float:
    """The loss weight of each of the span's tokens. ``corrects``: see ``styles.Telling``."""
    if mask is Mask.SEARCH and span.role is Role.SOLUTION and not span.boundary:
        return 0.0
    if mask is Mask.PATH and not span.on_path and not (corrects and span.role is not Role.THINK):
        return 0.0
    return choice_weight if span.choice else 1.0


def demonstration(
    problem: Problem,
    spans: Sequence[Span],
    tokenizer: Tokenizer,
    choice_weight: float,
    id: str,
    mask: Mask = Mask.ALL,
    glue: str = " ",
    corrects: bool = False,
) -> Trace:
    """The prompt as context, then every span with its loss weight and ``glue`` before it, then EOS with the weight of the last span.

    Spans are encoded one by one, so that masks end at word ends with any tokenizer. Reward 1: a demonstration is right.
    """
    segments = [Segment(tokenizer.encode_prompt(problem.prompt), Role.PROMPT)]
    parts = itertools.groupby(spans, key=lambda span: (span.role, weight(span, mask, choice_weight, corrects)))
    for (role, loss_weight), group in parts:
        ids = [i for span in group for i in tokenizer.encode(glue + span.text)]
        segments.append(Segment(tuple(ids), role, mask=loss_weight))
    last = segments.pop()
    segments.append(Segment((*last.ids, tokenizer.eos_id), last.role, mask=last.mask))
    return Trace(id, problem.id, tuple(segments), reward=1.0, finish=Finish.STOP, verdict=DEMONSTRATED)


@lru_cache(1 << 16)
def _step_spans(text: str, on_path: bool) -> tuple[Span, Span]:
    """The operands say which step is tried; the result, the last word, follows from them."""
    operands, _, result = text.rpartition(" ")
    return Span(operands, Role.THINK, True, on_path), Span(result, Role.THINK, False, on_path)


@lru_cache(1 << 16)
def _compare_span(text: str, target: int, on_path: bool) -> Span:
    result = _operation(text).result
    word = metacot.GOAL if result == target else metacot.LOW if result < target else metacot.HIGH
    return Span(word, Role.VERIFY, False, on_path)


@lru_cache(1 << 16)
def _operation(text: str) -> Operation:
    """Raises ValueError for words that are no step as ``linearize`` writes it."""
    operation = read_operation(text)
    if operation is None or operation.text != text:
        raise ValueError(f"{text!r} is not of a linearized tree")
    return operation
