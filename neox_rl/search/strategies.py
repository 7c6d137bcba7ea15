"""Which node a search expands next. Strategies are plain rules over the growing tree: they neither wait nor sample.

In each round a strategy picks nodes to expand, and hears of their children in the order in which it picked. What a round holds
depends on the strategy alone, never on what answers first, so a search with many requests in flight makes the tree that one with a
single request makes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from neox_rl.config.own import found
from neox_rl.errors import ConfigError
from neox_rl.search.growth import Distinct, Growth, Leaf
from neox_rl.search.mcts import Mcts
from neox_rl.search.strategy import Ask, Options, Strategy

EPSILON = 1e-6
PARTS = ("distinct", "reads_values", "pick", "add")
"""Of a strategy."""


@dataclass
class BestOfN(Strategy):
    """``width`` whole attempts, each a chain of sampled steps; the answer is the one of the highest value (arXiv 2501.04682, 3.2)."""

    options: Options
    distinct = Distinct.NOWHERE
    reads_values = False
    _tips: list[int] | None = None

    def pick(self, tree: Growth) -> list[Ask]:
        if self._tips is None:
            self._tips = []
            return [Ask(0, self.options.width, whole=True)]
        asks, self._tips = [Ask(tip, 1) for tip in self._tips], []
        return asks

    def add(self, tree: Growth, node: int, children: Sequence[int]) -> None:
        assert self._tips is not None
        self._tips += [child for child in children if not tree.nodes[child].ended]


@dataclass
class Beam(Strategy):
    """Level by level: ``width`` steps from each of the ``beam`` nodes of the highest value (the breadth-first search of 2305.10601)."""

    options: Options
    distinct = Distinct.TREE
    _level: list[int] = field(default_factory=lambda: [0])

    def pick(self, tree: Growth) -> list[Ask]:
        best = sorted(self._level, key=lambda i: (-tree.nodes[i].hope, i))[: self.options.beam]
        self._level = []
        return [Ask(i, self.options.width) for i in best]

    def add(self, tree: Growth, node: int, children: Sequence[int]) -> None:
        self._level += [child for child in children if self.options.hopeful(tree.nodes[child])]


Priority = Callable[[Leaf, int, Options], float]
"""(node, how many nodes were queued before its siblings, options) -> what is expanded first has the least."""


@dataclass
class Frontier(Strategy):
    """Every open node waits in one queue; the first ``batch`` of them are expanded together. Of siblings the more hopeful goes first."""

    options: Options
    priority: Priority
    distinct = Distinct.TREE
    _queue: list[tuple[float, int, int]] = field(default_factory=lambda: [(0.0, 0, 0)])
    _queued: int = 1

    def pick(self, tree: Growth) -> list[Ask]:
        first = [heapq.heappop(self._queue)[-1] for _ in range(min(self.options.batch, len(self._queue)))]
        return [Ask(i, self.options.width) for i in first]

    def add(self, tree: Growth, node: int, children: Sequence[int]) -> None:
        before = self._queued
        for child in sorted(children, key=lambda i: -tree.nodes[i].hope):
            if self.options.hopeful(tree.nodes[child]):
                heapq.heappush(self._queue, (self.priority(tree.nodes[child], before, self.options), self._queued, child))
                self._queued += 1


def first_in(leaf: Leaf, before: int, options: Options) -> float:
    return leaf.depth


def last_in(leaf: Leaf, before: int, options: Options) -> float:
    return -before


def by_value(leaf: Leaf, before: int, options: Options) -> float:
    return -leaf.hope


def by_cost_and_value(leaf: Leaf, before: int, options: Options) -> float:
    """f = g + h: ``step_cost`` a step so far, and -log v for what is to come, v read as the chance to get there."""
    return leaf.depth * options.step_cost - math.log(max(leaf.hope, EPSILON))


STRATEGIES: Mapping[str, Callable[[Options], Strategy]] = {
    "best-of-n": BestOfN,
    "beam": Beam,
    "bfs": lambda options: Frontier(options, first_in),
    "dfs": lambda options: Frontier(options, last_in),
    "best-first": lambda options: Frontier(options, by_value),
    "astar": lambda options: Frontier(options, by_cost_and_value),
    "mcts": Mcts,
}


def make_strategy(name: str, options: Options) -> Strategy:
    """A strategy at its beginning; each search needs one of its own. Raises ConfigError for an unknown name, and where the user's own makes
    none."""
    make = found(STRATEGIES, name, "strategy")
    if name in STRATEGIES:
        return make(options)
    try:
        strategy = make(options)
    except Exception as error:  # the user's own may fail in any way
        raise ConfigError(f"strategy = {name!r}: {type(error).__name__}: {error}; give a function (Options) -> Strategy") from error
    if missing := [part for part in PARTS if not hasattr(strategy, part)]:
        raise ConfigError(f"strategy = {name!r}: makes {strategy!r} without {', '.join(missing)}; give a neox_rl.search.strategy.Strategy")
    return strategy
