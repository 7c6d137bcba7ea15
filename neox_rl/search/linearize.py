"""A search tree as Meta-CoT text and back (the language of ``neox_rl.metacot``), and as a trace with loss masks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from neox_rl import metacot
from neox_rl.arithmetic import expression
from neox_rl.metacot import Answer, Mark, Step
from neox_rl.ports import Tokenizer
from neox_rl.search.dfs import new_node, rules, step_node
from neox_rl.types import Finish, Node, Problem, Reason, Role, Segment, Trace, Tree, Verdict


class Span(NamedTuple):
    """Words of one role. ``choice``: they say which step is tried next, which a random search does not determine."""

    text: str
    role: Role
    choice: bool = False


DEMONSTRATED = Verdict(correct=True, extracted="", reason=Reason.MATCH, ms=0.0)


def linearize(tree: Tree, problem: Problem) -> list[Span]:
    """The search in the order of expansion, dead ends included, then the solution when a goal was found.

    A node whose parent is not the current state is reached by going back one level at a time, so only depth-first
    orders have a linearization: ValueError otherwise, and for a tree whose nodes are not in order of expansion.
    """
    _, target, _ = rules(problem)
    spans: list[Span] = []
    path = [tree.nodes[0]]
    for node in tree.nodes[1:]:
        while path and path[-1].id != node.parent:
            path.pop()
            spans.append(Span(metacot.BACK, Role.BACK))
        if not path:
            raise ValueError(f"node {node.id} of {tree.problem_id} hangs under {node.parent}, which was left before: not depth-first")
        if node.order != node.id:
            raise ValueError(f"node {node.id} of {tree.problem_id} has order {node.order}; number nodes in the order of expansion")
        spans.extend(_step_spans(node.text))
        if node.verdict is None:
            path.append(node)
        else:
            spans.append(Span(metacot.compare_word(int(node.verdict.extracted), target), Role.VERIFY))
            if node.verdict.correct:
                spans.append(Span(_solution(problem, [*path[1:], node]), Role.SOLUTION))
    return spans


def text_of(spans: Sequence[Span]) -> str:
    return " ".join(span.text for span in spans)


def tree_of(problem: Problem, text: str) -> Tree:
    """The tree that ``linearize`` wrote as ``text``. Raises ValueError on any other text: for a policy's output use ``replay``."""
    root, target, _ = rules(problem)
    nodes = [new_node(0, -1, "")]
    path = [0]
    for event in metacot.parse(text):
        match event:
            case Step() if path:
                leaf = len(path) == len(root) - 1
                nodes.append(step_node(len(nodes), path[-1], event, target if leaf else None))
                if not leaf:
                    path.append(nodes[-1].id)
            case Mark(metacot.BACK) if path:
                path.pop()
            case Mark() | Answer():
                continue  # follow from the verdicts
            case _:
                raise ValueError(f"{event} is not of a linearized tree")
    return Tree(problem.id, tuple(nodes))


def demonstration(problem: Problem, spans: Sequence[Span], tokenizer: Tokenizer, choice_weight: float, id: str) -> Trace:
    """The prompt as context, then every span with loss weight 1, or ``choice_weight`` where it is a choice, then EOS.

    Spans are encoded one by one, so that masks end at word ends with any tokenizer. Reward 1: a demonstration is right.
    """
    segments = [Segment(tokenizer.encode(problem.prompt), Role.PROMPT)]
    parts = itertools.groupby(spans, key=lambda span: (span.role, choice_weight if span.choice else 1.0))
    for (role, mask), group in parts:
        ids = [i for span in group for i in tokenizer.encode(" " + span.text)]
        segments.append(Segment(tuple(ids), role, mask=mask))
    last = segments.pop()
    segments.append(Segment((*last.ids, tokenizer.eos_id), last.role, mask=last.mask))
    return Trace(id, problem.id, tuple(segments), reward=1.0, finish=Finish.STOP, verdict=DEMONSTRATED)


@lru_cache(1 << 16)
def _step_spans(text: str) -> tuple[Span, Span]:
    """The operands say which step is tried; the result, the last word, follows from them."""
    operands, _, result = text.rpartition(" ")
    return Span(operands, Role.THINK, choice=True), Span(result, Role.THINK)


def _solution(problem: Problem, path: Sequence[Node]) -> str:
    steps = [_step(node.text) for node in path]
    root, _, _ = rules(problem)
    return f"{metacot.SOLUTION} {expression(root, steps)}"


@lru_cache(1 << 16)
def _step(text: str) -> Step:
    (event,) = metacot.parse(text)
    if not isinstance(event, Step):
        raise ValueError(f"node text {text!r} is not a step")
    return event
