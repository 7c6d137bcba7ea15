"""What a search did before, told to a value: Z_t of the meta-critic v(Z_t, S_t, q) (arXiv 2501.04682, 8.3.4)."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from neox_rl import metacot
from neox_rl.search.domain import BACK_LINE
from neox_rl.search.linearize import glue_of, is_arithmetic, linearize, moves
from neox_rl.search.proposers import Position
from neox_rl.search.styles import selected
from neox_rl.types import Problem, Role, Tree

MAX_EARLIER_CHARS = 2000
"""The latest of what was visited: a search has no end, and a context has."""


class Earlier(NamedTuple):
    """``texts``: the moves of the search in its words, in order. ``depth``: how many levels below the root it stands at their end."""

    texts: tuple[str, ...] = ()
    depth: int = 0


def told_earlier(tree: Tree | None, problem: Problem, max_chars: int = MAX_EARLIER_CHARS) -> Earlier:
    """``tree`` as a Meta-CoT, without a solution: its latest moves, of at most ``max_chars`` characters."""
    if tree is None or len(tree.nodes) < 2 or max_chars < 1:
        return Earlier()
    merged = selected(tree, range(len(tree.nodes)))
    depth = 0
    for node, _ in moves(merged):
        depth += -1 if node is None else int(node.verdict is None)
    told: list[list[str]] = []
    for span in linearize(merged, problem):
        if span.choice or span.role is Role.BACK:
            told.append([])
        if span.role is not Role.SOLUTION:
            told[-1].append(span.text)
    texts: deque[str] = deque()
    for parts in reversed(told):
        text = glue_of(problem).join(parts)
        max_chars -= len(text) + 1
        if max_chars < 0:
            break
        texts.appendleft(text)
    return Earlier(tuple(texts), depth)


def earlier_of(position: Position, max_chars: int = MAX_EARLIER_CHARS) -> Earlier:
    return told_earlier(position.visited() if position.visited else None, position.problem, max_chars)


def told_before_path(earlier: Earlier, problem: Problem) -> tuple[str, ...]:
    """``earlier`` and the way back to the root, where a path is told next: one Meta-CoT, which ends where the path does."""
    back = metacot.BACK if is_arithmetic(problem) else BACK_LINE + "\n"
    return (*earlier.texts, *(back,) * earlier.depth) if earlier.texts else ()


def text_before(earlier: Earlier, problem: Problem) -> str:
    return glue_of(problem).join(earlier.texts).strip()
