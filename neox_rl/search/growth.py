"""A search tree while it grows: what proposals become nodes, what they cost, and what becomes of those that do not."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial

from neox_rl.errors import ConfigError
from neox_rl.search.domain import Domain, Rejection, State
from neox_rl.search.proposers import Position, Proposal, derived_seed
from neox_rl.search.values import Value
from neox_rl.types import NO_NODE, End, Node, Problem, Tree, Verdict, VersionSpan

NO_PROPOSAL, BAD_VALUE = "no_proposal", "bad_value"


class Distinct(StrEnum):
    """Where a state may occur once only: among the children of a node, in the whole tree (a graph search), or anywhere again."""

    SIBLINGS = "siblings"
    TREE = "tree"
    NOWHERE = "nowhere"


@dataclass(frozen=True, slots=True)
class Budget:
    """What a search may spend: nodes, the root left out, and tokens, those of its value and of refused steps included. Never exceeded."""

    nodes: int
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name, bound in (("nodes", self.nodes), ("tokens", self.tokens)):
            if bound is not None and (type(bound) is not int or bound < 0):
                raise ConfigError(f"budget of {bound!r} {name}: give an integer of at least 0; with 0 a search returns its root")


@dataclass(slots=True)
class Leaf:
    """A node in growth. ``value`` and ``visits`` belong to the strategy once the node was scored; until then it counts as hopeless, and
    what is trained must leave it out, as it must a ``guide`` (``Scores``). ``exact``, ``seen``: see ``Node``. ``discount``: strategies
    go by ``hope``, and the tree records ``value``: what is worth trying next says nothing of what a step is worth."""

    id: int
    parent: int
    depth: int
    state: State
    proposal: Proposal
    text: str
    value: float = 0.0
    scored: bool = False
    visits: int = 1
    verdict: Verdict | None = None
    ended: bool = False
    children: list[int] = field(default_factory=list)
    exact: float | None = None
    seen: int = 0
    guide: bool = False
    discount: float = 1.0

    @property
    def hope(self) -> float:
        return self.value * self.discount


class Growth:
    """The tree of one problem. Nodes are numbered as they are made; nothing is ever taken back. ``withheld``: the budget left did not
    pay for a step that was to be had, or for all of it: it ended the search, even if that has nothing left to try."""

    def __init__(self, problem: Problem, domain: Domain, budget: Budget, distinct: Distinct, seed: int) -> None:
        self.problem, self.domain, self.budget, self.distinct, self.seed = problem, domain, budget, distinct, seed
        root = Leaf(0, NO_NODE, 0, domain.root, Proposal("", 0), "", visits=0, ended=domain.is_end(domain.root))
        self.nodes = [root]
        self.counts: Counter[str] = Counter()
        self.num_tokens = 0
        self.withheld = False
        self.ends: list[int] = []
        self.earlier: list[tuple[str, ...]] = []
        self._ended: list[tuple[str, ...]] = []
        self._seen = 0
        self._states = {root.state}

    @property
    def nodes_left(self) -> int:
        return self.budget.nodes + 1 - len(self.nodes)

    @property
    def tokens_left(self) -> int | None:
        return None if self.budget.tokens is None else self.budget.tokens - self.num_tokens

    @property
    def spent(self) -> bool:
        return self.nodes_left <= 0 or (self.tokens_left is not None and self.tokens_left <= 0)

    def path(self, id: int) -> list[Leaf]:
        """From the root, left out, to ``id``."""
        found: list[Leaf] = []
        while id > 0:
            found.append(self.nodes[id])
            id = found[-1].parent
        found.reverse()
        return found

    def position(self, id: int, purpose: str) -> Position:
        path = self.path(id)
        return Position(
            problem=self.problem,
            domain=self.domain,
            state=self.nodes[id].state,
            texts=tuple([leaf.text for leaf in path]),
            ids=tuple([i for leaf in path for i in leaf.proposal.ids]),
            seed=derived_seed(self.seed, self.problem.id, id, purpose),
            earlier=self.earlier,
        )

    def begin_round(self) -> None:
        """What the round before ended is earlier from now on: no path is an earlier attempt at itself, or at one made beside it."""
        self.earlier += self._ended
        self._ended.clear()
        self._seen = len(self.nodes)

    def admit(self, parent: int, proposals: Sequence[Proposal]) -> list[int]:
        """The new children that ``proposals`` make, as far as the budget goes; what is refused is counted, its tokens paid."""
        above = self.nodes[parent]
        if not proposals:
            self.counts[NO_PROPOSAL] += 1
        added: list[int] = []
        for proposal in proposals:
            tokens_left = self.tokens_left
            if self.nodes_left <= 0:
                break
            if tokens_left is not None and proposal.num_tokens > tokens_left:
                self.withheld = True
                break
            self.num_tokens += proposal.num_tokens
            if (leaf := self._grown(above, proposal)) is not None:
                added.append(leaf.id)
        return added

    def admit_attempt(self, parent: int, steps: Sequence[Proposal]) -> tuple[list[int], int]:
        """The chain of new nodes that ``steps`` make, and where it may go on: NO_NODE after an end and a refused step.

        All of ``steps`` is paid, what comes after an end or the last node of the budget too: it was asked for.
        """
        self.num_tokens += sum(step.num_tokens for step in steps)
        above, added = self.nodes[parent], list[int]()
        for step in steps:
            if self.nodes_left <= 0 or above.ended:
                break
            leaf = self._grown(above, step)
            if leaf is None:
                return added, NO_NODE
            above = leaf
            added.append(leaf.id)
        return added, NO_NODE if above.ended or not added else above.id

    def _grown(self, above: Leaf, proposal: Proposal) -> Leaf | None:
        """The new child; None, and a count, where the step is refused."""
        self.withheld |= proposal.cut_short
        stepped = self._step(above, proposal)
        if isinstance(stepped, Rejection):
            self.counts[stepped.value] += 1
            return None
        leaf = Leaf(len(self.nodes), above.id, above.depth + 1, stepped[1], proposal, stepped[0], ended=self.domain.is_end(stepped[1]))
        leaf.seen = self._seen
        self.nodes.append(leaf)
        above.children.append(leaf.id)
        self._states.add(leaf.state)
        return leaf

    def _step(self, above: Leaf, proposal: Proposal) -> tuple[str, State] | Rejection:
        if not proposal.complete:
            return Rejection.TOO_LONG
        if not proposal.text.strip() and not proposal.ended:
            return Rejection.EMPTY
        stepped = self.domain.step(above.state, proposal.text, proposal.ended)
        if isinstance(stepped, Rejection):
            return stepped
        state = stepped.state
        if state in self._states and state in (above.state, *(leaf.state for leaf in self.path(above.id)), self.nodes[0].state):
            return Rejection.CYCLE
        seen = {Distinct.TREE: self._states, Distinct.NOWHERE: ()}.get(self.distinct)
        if state in (seen if seen is not None else [self.nodes[child].state for child in above.children]):
            return Rejection.REPEATED
        return stepped

    async def judge(self, ids: Sequence[int]) -> None:
        """Gives the ended nodes of ``ids`` their verdict, and by it their exact value. The search goes by that where the question alone can
        tell it; where only the gold answer does, the search must not know it. Raises what the verifier raises."""
        ends = [self.nodes[i] for i in ids if self.nodes[i].ended]
        paths = [[leaf.text for leaf in self.path(end.id)] for end in ends]
        verdicts = await asyncio.gather(*(self.domain.judge(path, end.state) for path, end in zip(paths, ends, strict=True)))
        for end, verdict in zip(ends, verdicts, strict=True):
            end.verdict, end.scored = verdict, self.domain.checkable
            end.exact = float(verdict.correct)
            end.value = end.exact if end.scored else 0.0
        self.ends += [end.id for end in ends]
        self._ended += map(tuple, paths)

    async def score(self, ids: Sequence[int], value: Value) -> None:
        """Scores the nodes of ``ids``, those left out that have a value already: of a verdict, or of a call that failed half way. Raises
        what ``value`` raises, and what some of its values failed of once the others are kept.

        A value that is not in [0, 1], as the NaN of a path that is too long for its model, counts as ``bad_value`` and leaves its node
        unscored, as one that cannot be paid does.
        """
        unknown = [i for i in ids if not self.nodes[i].scored]
        if not unknown:
            return
        asked = [replace(self.position(i, "value"), visited=partial(self._visited, self.nodes[i].seen)) for i in unknown]
        scores = await value.score(asked, self.tokens_left)
        self.num_tokens += scores.num_tokens
        if not scores.values:
            return
        discounts = scores.discounts or [1.0] * len(unknown)
        for i, score, discount in zip(unknown, scores.values, discounts, strict=True):
            good = math.isfinite(score) and 0.0 <= score <= 1.0
            self.counts[BAD_VALUE] += not good and not (math.isnan(score) and (scores.failed or scores.unpaid))
            self.nodes[i].value, self.nodes[i].scored, self.nodes[i].discount = float(score) if good else 0.0, good, discount
            self.nodes[i].guide = self.nodes[0].guide = scores.guide  # the root's value is a mean of theirs
            if self.nodes[i].verdict is None:
                self.nodes[i].exact = float(score) if good and scores.exact else None
        if scores.failed:
            raise scores.failed

    def _visited(self, count: int) -> Tree:
        """The first ``count`` nodes; without what the verdicts say where only the gold answer tells them, which no value may see."""
        leaves = self.nodes[:count] if self.domain.checkable else [replace(leaf, verdict=None, exact=None) for leaf in self.nodes[:count]]
        return Tree(self.problem.id, tuple(map(_node, leaves)))

    @property
    def goal(self) -> int:
        """The first right end, where the domain may know it; else NO_NODE."""
        if not self.domain.checkable:
            return NO_NODE
        return next((i for i in self.ends if (verdict := self.nodes[i].verdict) is not None and verdict.correct), NO_NODE)

    @property
    def answer(self) -> int:
        """The goal; where the domain cannot know one, the end of the highest value, the earliest of them."""
        if self.domain.checkable:
            return self.goal
        return max(self.ends, key=lambda i: (self.nodes[i].value, -i), default=NO_NODE)

    def tree(self, end: End, error: str = "") -> Tree:
        counts = {name: count for name, count in sorted(self.counts.items()) if count}
        return Tree(self.problem.id, tuple(map(_node, self.nodes)), end, self.answer, self.num_tokens, counts, error)


def _node(leaf: Leaf) -> Node:
    spans: tuple[VersionSpan, ...] = leaf.proposal.spans
    ids, logprobs = leaf.proposal.ids, leaf.proposal.logprobs
    value = leaf.value if leaf.scored and not leaf.guide else None
    return Node(leaf.id, leaf.parent, leaf.text, leaf.id, ids, logprobs, spans, value, leaf.visits, leaf.verdict, leaf.exact, leaf.seen)
