"""What a tree teaches beside its telling: step advantages, preferred steps, labels for a process reward model, paths as traces."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from neox_rl.types import NO_NODE, Finish, Node, Problem, Reason, Role, Segment, Trace, Tree, Verdict

UNFINISHED = Verdict(correct=False, extracted="", reason=Reason.NO_ANSWER, ms=0.0)


class Preference(NamedTuple):
    """Of two steps from the same place, the one of the higher value and the other. ``path``: the steps that lead there."""

    path: tuple[Node, ...]
    better: Node
    worse: Node


def children_of(tree: Tree) -> dict[int, list[Node]]:
    found: dict[int, list[Node]] = defaultdict(list)
    for node in tree.nodes[1:]:
        found[node.parent].append(node)
    return found


def step_advantages(tree: Tree) -> dict[int, float]:
    """v(child) - v(parent) of every step (VinePPO, arXiv 2410.01679; TreeRL, 2506.11902), with the tree's own values.

    A search does not score its root: that is the mean of its children. Along any path the advantages add up to v(end) - v(root).
    """
    first = [node.value for node in tree.nodes[1:] if node.parent == 0]
    values = [sum(first) / len(first) if first else 0.0, *(node.value for node in tree.nodes[1:])]
    return {node.id: node.value - values[node.parent] for node in tree.nodes[1:]}


def preferences(tree: Tree, margin: float) -> Iterator[Preference]:
    """The best and the worst step from each node, where their values differ by ``margin`` at least; ties go to the earlier step."""
    for parent, children in children_of(tree).items():
        better = max(children, key=lambda node: (node.value, -node.order))
        worse = min(children, key=lambda node: (node.value, node.order))
        if better.id != worse.id and better.value - worse.value >= margin:
            yield Preference(tree.path(parent), better, worse)


def value_labels(tree: Tree) -> Iterator[tuple[tuple[Node, ...], float]]:
    """Every path and the value of its end: what a process reward model v(q, S_t) is trained on, with Monte-Carlo values (11)."""
    for node in tree.nodes[1:]:
        yield tree.path(node.id), node.value


def path_trace(tree: Tree, problem: Problem, prompt_ids: Sequence[int], node: int, id: str) -> Trace:
    """The path to ``node`` as the policy sampled it: its tokens, log-probs and versions; reward 1 at a right end, else 0.

    Each step was sampled after exactly these tokens, so the log-probs are those of the trace. Raises ValueError for other steps.
    """
    if node == NO_NODE:
        raise ValueError(f"tree of {tree.problem_id} has no node {node}")
    segments = [Segment(tuple(prompt_ids), Role.PROMPT)]
    for step in tree.path(node):
        if not step.spans:
            raise ValueError(f"step {step.id} of {tree.problem_id} has no policy version: it cannot be trained off-policy")
        for span in step.spans:
            part = slice(span.start, span.end)
            segments.append(Segment(step.ids[part], Role.THINK, step.logprobs[part], span.version, mask=1.0))
    verdict = tree.nodes[node].verdict or UNFINISHED
    return Trace(id, problem.id, tuple(segments), float(verdict.correct), Finish.STOP, verdict)
