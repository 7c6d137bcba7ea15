"""Endless seeded demonstrations for the warm start: a search and the solution it came to, an attempt that was right, or a step's value.

=========  =================================================================================================================
searches   a searcher of the project searches a training problem, and the tree is told: (2) and (3) with a solver as the source
trees      recorded trees are told, those that found a right end: (3) where a policy's searches made them
attempts   recorded rollouts that were right, as they were written: (2) and (3) with the policy itself as the source
values     the paths of a recorded tree, and of each in one word whether it is hopeful: what a process reward model is trained on
=========  =================================================================================================================

Equations of arXiv 2501.04682.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from neox_rl.errors import ConfigError
from neox_rl.ports import Tokenizer
from neox_rl.search.credit import before, value_labels, worth
from neox_rl.search.dfs import MIXED, dfs, solution_path, with_wrong_steps
from neox_rl.search.earlier import told_before_path, told_earlier
from neox_rl.search.linearize import Mask, Span, demonstration, glue_of, is_arithmetic, linearize, solution_of
from neox_rl.search.reward_model import value_trace
from neox_rl.search.styles import BACKTRACK, STYLES, pruned
from neox_rl.types import NO_VERSION, Group, Node, Problem, Role, Segment, Trace, Tree

Searcher: TypeAlias = Callable[[Problem, random.Random], Tree]
Drawer: TypeAlias = Callable[[random.Random, str], Trace]
"""Draws one trace, which gets the id."""
Source: TypeAlias = Callable[[random.Random, str], tuple[Trace, ...]]
"""Draws one demonstration, ``g000017``: a trace of that name with ``/r0``, or several of one problem, whose common beginnings are trained
once."""
MAX_LABELS = 64
"""Of one tree, in one demonstration."""
WRITTEN = "written"
MAX_SKIPS = 1_000


def mixed(problem: Problem, rng: random.Random) -> Tree:
    """A search by one of several searchers of mixed quality: what a collection of demonstrations from many hands looks like."""
    (strategy,) = rng.choices(list(MIXED), weights=list(MIXED.values()))
    return dfs(problem, rng, strategy)


SEARCHERS: Mapping[str, Searcher] = {"dfs": dfs, "mixed": mixed, "solution": solution_path}


def alone(draw: Drawer) -> Source:
    """A source of single traces."""
    return lambda rng, name: (draw(rng, f"{name}/r0"),)


@dataclass(frozen=True, slots=True)
class TraceStyle:
    """How a tree becomes a trace: told by one of ``styles.STYLES``, after its wrong steps were thinned out with chance ``prune``."""

    telling: str = "stream"
    mask: Mask = Mask.ALL
    prune: float = 0.0
    choice_weight: float = 1.0

    def trace(self, tree: Tree, problem: Problem, tokenizer: Tokenizer, rng: random.Random, id: str) -> Trace:
        told = STYLES[self.telling](pruned(tree, rng, self.prune) if self.prune else tree, rng)
        spans = linearize(told.tree, problem, told.restart)
        return demonstration(problem, spans, tokenizer, self.choice_weight, id, self.mask, glue_of(problem), told.corrects)


def searches(problems: Sequence[Problem], searcher: str, style: TraceStyle, tokenizer: Tokenizer) -> Source:
    """Raises ConfigError for a searcher that there is not, or without problems."""
    if searcher not in SEARCHERS:
        raise ConfigError(f"warmstart.style {searcher!r} is none of {sorted(SEARCHERS)}")
    if not problems:
        raise ConfigError("demonstrations need at least one problem")

    def draw(rng: random.Random, id: str) -> Trace:
        problem = rng.choice(problems)
        tree = SEARCHERS[searcher](problem, rng)
        if style.telling == BACKTRACK:
            tree = with_wrong_steps(tree, problem)
        return style.trace(tree, problem, tokenizer, rng, id)

    return alone(draw)


def written(problems: Sequence[Problem], style: TraceStyle, tokenizer: Tokenizer) -> Source:
    """The worked solutions that the problems' rows brought along. Raises ConfigError when none has one."""
    shown = [p for p in problems if "solution" in p.meta]
    if not shown:
        raise ConfigError(
            f"warmstart.style {WRITTEN}: none of {len(problems)} training problems has a worked solution; give rows with a solution, or set"
            " warmstart.steps: 0 and start from warmstart.hf_checkpoint or load"
        )

    def draw(rng: random.Random, id: str) -> Trace:
        problem = rng.choice(shown)
        spans = [Span(str(problem.meta["solution"]), Role.SOLUTION)]
        return demonstration(problem, spans, tokenizer, style.choice_weight, id)

    return alone(draw)


def of_problems(trees: Iterable[Tree], problems: Sequence[Problem]) -> list[tuple[Tree, Problem]]:
    """The trees of ``problems``, by id; those of other problems, held-out ones among them, are left out."""
    known = {problem.id: problem for problem in problems}
    return [(tree, known[tree.problem_id]) for tree in trees if tree.problem_id in known]


def trees(found: Sequence[tuple[Tree, Problem]], style: TraceStyle, tokenizer: Tokenizer) -> Source:
    """Every tree with a right end is as likely as any other. Raises ConfigError when there is none, and where steps were cut in a line."""
    verified = [(tree, problem) for tree, problem in found if solution_of(tree)]
    if not verified:
        raise ConfigError(
            f"warmstart.style trees: none of {len(found)} trees of training problems has a right end to imitate; search with a larger"
            " budget, over rows that python -m neox_rl.problems.make_rows wrote for this config"
        )
    for tree, problem in verified:
        if not is_arithmetic(problem) and (broken := _broken_line(tree)):
            raise ConfigError(
                f"warmstart.style trees: the tree of {problem.id} goes on in the midst of the line {broken.text!r}, whose pieces would be"
                " imitated as lines; search without --cut-steps and with a larger --max-step-tokens"
            )

    def draw(rng: random.Random, id: str) -> Trace:
        tree, problem = rng.choice(verified)
        return style.trace(tree, problem, tokenizer, rng, id)

    return alone(draw)


def _broken_line(tree: Tree) -> Node | None:
    """A step that a policy wrote without an end of its line, and from which the path goes on."""
    inner = {node.parent for node in tree.nodes}
    return next((node for node in tree.nodes[1:] if node.id in inner and node.ids and "\n" not in node.text), None)


def attempts(recorded: Iterable[Trace], problems: Sequence[Problem]) -> Source:
    """The right ones of ``recorded``: a problem is drawn, then one of its attempts, so that easy problems are not shown more often.

    Raises ConfigError when no attempt at one of ``problems`` was right.
    """
    known = {problem.id for problem in problems}
    count: Counter[bool] = Counter()
    right: dict[str, list[Trace]] = {}
    for trace in recorded:
        good = trace.problem_id in known and trace.verdict.correct
        count[good] += 1
        if good:
            right.setdefault(trace.problem_id, []).append(imitated(trace))
    if not right:
        raise ConfigError(f"warmstart.style attempts: none of {count.total()} recorded rollouts is a right one of a training problem")
    names = sorted(right)
    return alone(lambda rng, id: replace(rng.choice(right[rng.choice(names)]), id=id))


def imitated(trace: Trace) -> Trace:
    """What a policy sampled, as a demonstration: its tokens are trained on, whoever made them; what it did not sample stays context."""
    segments = [Segment(s.ids, s.role, mask=float(s.version != NO_VERSION), episode=s.episode) for s in trace.segments]
    return replace(trace, segments=tuple(segments), reward=1.0)


def values(found: Sequence[tuple[Tree, Problem]], tokenizer: Tokenizer, sees_earlier: bool = False, max_tokens: int = 0) -> Source:
    """A tree, and all of its steps, or MAX_LABELS of them: siblings are what a search compares, and share their path. Each word is drawn
    anew each time, hopeful with the chance of the step's value, so that the expected loss is the cross-entropy against the value itself.
    ``sees_earlier``: what the search did before is told too (the meta-critic, 8.3.4), as far as it fits in ``max_tokens``.
    Raises ConfigError without a step, and where only ends have values, of their verdicts: a search asks of steps before them."""
    grown = [(tree, labels, problem) for tree, problem in found if (labels := list(value_labels(tree)))]
    on_the_way = [node for tree, _ in found for node in tree.nodes[1:] if node.verdict is None]
    if not grown or (on_the_way and all(worth(node) is None for node in on_the_way)):
        raise ConfigError(
            f"warmstart.style values: none of {len(found)} trees of training problems has a step with a value before its end; search"
            " with one (--value monte-carlo), over rows that python -m neox_rl.problems.make_rows wrote for this config"
        )

    def told(tree: Tree, node: Node, problem: Problem) -> tuple[str, ...]:
        if not sees_earlier:
            return ()
        return told_before_path(told_earlier(before(tree, node, verdicts=is_arithmetic(problem)), problem), problem)

    def draw(rng: random.Random, name: str) -> tuple[Trace, ...]:
        tree, labels, problem = rng.choice(grown)
        some = enumerate(rng.sample(labels, min(len(labels), MAX_LABELS)))
        return tuple(
            value_trace(
                *(problem, [node.text for node in path], rng.random() < value, tokenizer, f"{name}/r{i}"),
                *(told(tree, path[-1], problem), max_tokens),
            )
            for i, (path, value) in some
        )

    return draw


class _Begun(dict[int, "_Begun"]):
    """Token -> what follows it: the beginnings of the traces so far."""


class Demonstrations(Iterator[Group]):
    """Demonstrations as groups of traces of at most ``max_tokens`` tokens each, EOS included; ids ``g000000/r0``, ``g000001/r0``, ...

    Draw number d depends on ``(seed, d)`` alone: to continue a stream, pass the ``draws`` and ``ticket`` it had come to.
    A longer trace is left out, never cut: a cut trace would teach to stop before the goal. So are traces of a demonstration that alone is
    more than a step: ``step_tokens``, of which beginnings in common count once where they are computed once (``shared``).
    A demonstration of which nothing is left is skipped and counted in ``skipped``.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        max_tokens: int = 1 << 30,
        draws: int = 0,
        ticket: int = 0,
        step_tokens: int = 1 << 30,
        shared: bool = False,
    ) -> None:
        self.source, self.seed, self.max_tokens, self.step_tokens, self.shared = source, seed, max_tokens, step_tokens, shared
        self.draws, self.ticket, self.skipped = draws, ticket, 0

    def __next__(self) -> Group:
        """Raises ConfigError when MAX_SKIPS demonstrations in a row do not fit."""
        return self._next()[0]

    def step(self) -> list[Group]:
        """As many as make ``step_tokens`` tokens, the last of them whole. Raises as ``next``."""
        groups, tokens = list[Group](), 0
        while tokens < self.step_tokens:
            group, computed = self._next()
            groups.append(group)
            tokens += computed
        return groups

    def _next(self) -> tuple[Group, int]:
        for _ in range(MAX_SKIPS):
            rng = random.Random(f"demonstration/{self.seed}/{self.draws}")
            self.draws += 1
            traces, computed = self._fitting(self.source(rng, f"g{self.ticket:06d}"))
            if traces:
                self.ticket += 1
                return Group(self.ticket - 1, traces[0].problem_id, traces), computed
            self.skipped += 1
        raise ConfigError(
            f"{MAX_SKIPS} demonstrations in a row are longer than {self.max_tokens} tokens: raise seq_length or use smaller problems"
        )

    def _fitting(self, traces: Sequence[Trace]) -> tuple[tuple[Trace, ...], int]:
        """The first that is not too long in any case, and the tokens that are computed."""
        kept, computed, begun = list[Trace](), 0, _Begun()
        for trace in traces:
            if trace.num_tokens > self.max_tokens:
                continue
            ids = [i for segment in trace.segments for i in segment.ids]
            new = len(ids) - (_known(begun, ids) if self.shared else 0)
            if kept and computed + new > self.step_tokens:
                continue
            kept.append(trace)
            computed += new
            at = begun
            for i in ids if self.shared else ():
                at = at.setdefault(i, _Begun())
        return tuple(kept), computed


def _known(begun: _Begun, ids: Sequence[int]) -> int:
    """How many tokens ``ids`` has in common with any trace before it."""
    for count, i in enumerate(ids):
        if i not in begun:
            return count
        begun = begun[i]
    return len(ids)
