"""Monte-Carlo tree search with UCT, and virtual loss for expansions in parallel (arXiv 2501.04682, appendix D)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from neox_rl.search.growth import Distinct, Growth, Leaf
from neox_rl.search.strategy import Ask, Options, Strategy
from neox_rl.types import NO_NODE

VIRTUAL_VALUE = 0.0


@dataclass
class Mcts(Strategy):
    """Goes down by U = Q + c sqrt(log N(parent) / N(child)), expands a node by ``width`` samples, and scores them without playouts.

    UCT and not PUCT, since the likelihoods of whole steps are too skewed for priors. (The paper prints the fraction upside down;
    this is the standard form.) A child starts with N = 1 and Q = its value v; each ancestor is updated by N += 1, Q += (v - Q) / N.
    A node below which everything was tried is closed and not entered again, so the search ends.

    ``batch`` nodes are picked a round. Those picked before count as visits of value 0 along their paths (virtual loss) until the
    round is over, so that the round spreads; with a batch of 1 this is the serial search.
    """

    options: Options
    distinct = Distinct.SIBLINGS
    _closed: set[int] = field(default_factory=set)
    _expanded: set[int] = field(default_factory=set)
    _busy: set[int] = field(default_factory=set)

    def pick(self, tree: Growth) -> list[Ask]:
        self._busy.clear()
        virtual: Counter[int] = Counter()
        asks: list[Ask] = []
        while len(asks) < self.options.batch and not self._blocked(0):
            node = self._descend(tree, virtual)
            asks.append(Ask(node, self.options.width))
            virtual.update([0, *(leaf.id for leaf in tree.path(node))])
            self._mark_up(tree, node, self._busy)
        return asks

    def _descend(self, tree: Growth, virtual: Counter[int]) -> int:
        """The open leaf that UCT leads to, from a root that is not blocked."""
        node = 0
        while node in self._expanded:
            above = tree.nodes[node].visits + virtual[node]
            open_children = [c for c in tree.nodes[node].children if not self._blocked(c)]
            node = max(open_children, key=lambda c: (self.uct(tree.nodes[c], above, virtual[c]), -c))
        return node

    def _blocked(self, node: int) -> bool:
        """Nothing is left to expand at or below it, or all that is left was picked in this round."""
        return node in self._closed or node in self._busy

    def _mark_up(self, tree: Growth, node: int, marked: set[int]) -> None:
        """Adds ``node`` to ``marked``, and the ancestors that are blocked by that."""
        marked.add(node)
        node = tree.nodes[node].parent
        while node != NO_NODE and all(self._blocked(c) for c in tree.nodes[node].children):
            marked.add(node)
            node = tree.nodes[node].parent

    def uct(self, leaf: Leaf, parent_visits: int, virtual: int = 0) -> float:
        visits = leaf.visits + virtual
        mean = (leaf.hope * leaf.visits + VIRTUAL_VALUE * virtual) / visits
        return mean + self.options.exploration * math.sqrt(math.log(max(parent_visits, 1)) / visits)

    def add(self, tree: Growth, node: int, children: Sequence[int]) -> None:
        self._busy.clear()
        self._expanded.add(node)
        for child in children:
            if tree.nodes[child].scored:
                self._back_up(tree, node, tree.nodes[child].value)
            if not self.options.hopeful(tree.nodes[child]):
                self._closed.add(child)
        if all(c in self._closed for c in tree.nodes[node].children):
            self._mark_up(tree, node, self._closed)

    def _back_up(self, tree: Growth, node: int, value: float) -> None:
        while node != NO_NODE:
            leaf = tree.nodes[node]
            leaf.visits += 1
            leaf.value += (value - leaf.value) / leaf.visits
            leaf.scored |= node == 0  # it is the mean of what is below it
            node = leaf.parent
