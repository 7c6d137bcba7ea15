"""What a tree teaches beside its telling: the values of its paths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from neox_rl.types import NO_NODE, Node, Reason, Tree, Verdict

UNFINISHED = Verdict(correct=False, extracted="", reason=Reason.NO_ANSWER, ms=0.0)


def children_of(tree: Tree) -> dict[int, list[Node]]:
    found: dict[int, list[Node]] = defaultdict(list)
    for node in tree.nodes[1:]:
        found[node.parent].append(node)
    return found


def worth(node: Node) -> float | None:
    """What training takes a node's value to be, None where nobody knows. An exact one is taken as it was given: MCTS makes ``value`` the
    mean of what it saw below, which is lower wherever it tried a wrong step there. An estimate gets better by that mean, which is taken."""
    return node.value if node.exact is None else node.exact


def value_labels(tree: Tree) -> Iterator[tuple[tuple[Node, ...], float]]:
    """Every path to a node with a value, and its ``worth``: what a process reward model v(q, S_t) learns, with Monte-Carlo values (11)."""
    for node in tree.nodes[1:]:
        if (value := worth(node)) is not None:
            yield tree.path(node.id), value


def before(tree: Tree, node: Node, verdicts: bool) -> Tree:
    """The tree as a value saw it that was asked for ``node``: what was made before its round. ``verdicts``: those of ends are known without
    the gold answer, and so are their exact values."""
    made = tree.nodes[: node.seen]
    return replace(tree, nodes=made if verdicts else tuple(replace(n, verdict=None, exact=None) for n in made), answer=NO_NODE)
