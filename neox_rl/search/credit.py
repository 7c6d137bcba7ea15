"""What a tree teaches beside its telling: the values of its paths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from neox_rl.types import Node, Reason, Tree, Verdict

UNFINISHED = Verdict(correct=False, extracted="", reason=Reason.NO_ANSWER, ms=0.0)


def children_of(tree: Tree) -> dict[int, list[Node]]:
    found: dict[int, list[Node]] = defaultdict(list)
    for node in tree.nodes[1:]:
        found[node.parent].append(node)
    return found


def value_labels(tree: Tree) -> Iterator[tuple[tuple[Node, ...], float]]:
    """Every path and the value of its end: what a process reward model v(q, S_t) is trained on, with Monte-Carlo values (11)."""
    for node in tree.nodes[1:]:
        yield tree.path(node.id), node.value
