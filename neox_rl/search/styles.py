"""Other trees made of a search tree, for ``linearize`` to tell: the styles of Meta-CoT demonstrations (arXiv 2501.04682).

==========  ====================================================================================================================
stream      the search as it was: every step where it was made (stream of search)
taken       the search as its steps were taken: what was proposed and never gone into is left out
revision    (5), (7): j ~ Unif(1, 8) earlier attempts that came out wrong, each from the root, then the right one
backtrack   (8), (10): the right attempt, with a wrong step and the way back before a right one, at a rate of the places that have one
solution    (2), STaR: the right attempt alone
==========  ====================================================================================================================

With the mask ``path`` the tokens of the wrong steps are not trained: (24). For ``backtrack`` that is (10): what it teaches is to see that a
step was wrong and to go back, so the word on a wrong end and ``back`` are trained, which (24) leaves out with the branch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple, TypeAlias

from neox_rl.search.dfs import new_tree
from neox_rl.search.linearize import said, solution_of
from neox_rl.types import Node, Tree

BACKTRACK = "backtrack"
MAX_ATTEMPTS = 8
WRONG_RATE = 0.5
"""Half of the steps wrong was best in the paper: 78 -> 94 % on a model of 124 M parameters (8)."""


class Telling(NamedTuple):
    """A tree and how ``linearize`` is to tell it."""

    tree: Tree
    restart: bool = False
    corrects: bool = False
    """Judging a wrong step and going back from it are what is told, not a part of the branch."""


Style: TypeAlias = Callable[[Tree, random.Random], Telling]


def selected(tree: Tree, ids: Iterable[int]) -> Tree:
    """The nodes ``ids`` with all their ancestors, the root first, in that order. Siblings that say the same become one."""
    new_id = {0: 0}
    children: dict[tuple[int, str, bool | None], int] = {}
    nodes = [replace(tree.nodes[0], order=0)]
    for wanted in ids:
        for node in tree.path(wanted):
            if node.id in new_id:
                continue
            parent = new_id[node.parent]
            known = children.get((parent, *said(node)))
            if known is None:
                known = children[(parent, *said(node))] = len(nodes)
                nodes.append(replace(node, id=known, parent=parent, order=known))
            new_id[node.id] = known
    return replace(new_tree(tree.problem_id, tuple(nodes)), num_tokens=tree.num_tokens, counts=tree.counts)


def stream(tree: Tree, rng: random.Random) -> Telling:
    return Telling(selected(tree, _until_goal(tree, range(len(tree.nodes)))))


def taken(tree: Tree, rng: random.Random) -> Telling:
    """A step is taken when its first child was made, or, of an end, when it was made itself."""
    when = {n.id: n.order for n in tree.nodes if n.verdict is not None}
    for node in tree.nodes[1:]:
        when[node.parent] = min(when.get(node.parent, node.order), node.order)
    return Telling(selected(tree, _until_goal(tree, sorted(when, key=lambda i: (when[i], i)))))


def revision(tree: Tree, rng: random.Random) -> Telling:
    """At most j wrong attempts, as many as the tree has, in the order in which they were made, then the right one if there is one."""
    wrong = [n.id for n in tree.nodes if n.verdict is not None and not n.verdict.correct]
    chosen = sorted(rng.sample(wrong, min(rng.randint(1, MAX_ATTEMPTS), len(wrong))))
    return Telling(selected(tree, [*chosen, *(n.id for n in solution_of(tree))]), restart=True)


def backtrack(tree: Tree, rng: random.Random, rate: float = WRONG_RATE) -> Telling:
    """A wrong step is one beside the right one that was not taken. Those known not to be wrong are left out: right ends, and where the
    tree's values are exact (the oracle's) steps that can be won. Where they are estimates nothing tells such steps, and they are told.

    Where the tree has no wrong step beside the right one none is told, so of a search as a policy made it fewer right steps than ``rate``
    have one before them. Of the solver's demonstrations every place that allows one does (``dfs.with_wrong_steps``)."""
    solution = solution_of(tree)
    right = {node.id for node in solution}
    told: list[int] = []
    for node in solution:
        wrong = [n.id for n in tree.nodes[1:] if n.parent == node.parent and n.id not in right and not _known_good(n)]
        if wrong and rng.random() < rate:
            told.append(rng.choice(wrong))
        told.append(node.id)
    return Telling(selected(tree, told), corrects=True)


def _known_good(node: Node) -> bool:
    return (node.exact or 0.0) > 0.0 or (node.verdict is not None and node.verdict.correct)


def solution_alone(tree: Tree, rng: random.Random) -> Telling:
    return Telling(selected(tree, [node.id for node in solution_of(tree)]))


STYLES: Mapping[str, Style] = {
    "stream": stream,
    "taken": taken,
    "revision": revision,
    BACKTRACK: backtrack,
    "solution": solution_alone,
}


def pruned(tree: Tree, rng: random.Random, p: float) -> Tree:
    """A copy in which each step off the solution path is gone with chance ``p``, and with it all that came of it."""
    right = {0, *(node.id for node in solution_of(tree))}
    kept = {0}
    for node in tree.nodes[1:]:
        if node.parent in kept and (node.id in right or rng.random() >= p):
            kept.add(node.id)
    return selected(tree, sorted(kept))


def _until_goal(tree: Tree, ids: Iterable[int]) -> list[int]:
    """``ids`` up to the first right end: the solution follows it."""
    found: list[int] = []
    for i in ids:
        found.append(i)
        verdict = tree.nodes[i].verdict
        if verdict is not None and verdict.correct:
            break
    return found
