"""The search loop: rounds of picking, proposing, admitting and scoring, over one problem or many at a time.

::

    strategy.pick -> affordable -> proposer.propose (all of the round at once) -> growth.admit -> judge, score (one batch) -> strategy.add
         ^                                                                                                                       |
         +-----------------------------------------------------------------------------------------------------------------------+
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from neox_rl.errors import ConfigError, NeoxRLError
from neox_rl.search.domain import Domain, State
from neox_rl.search.growth import Budget, Growth
from neox_rl.search.proposers import UNBOUNDED, Attempter, Proposal, Proposer
from neox_rl.search.strategies import make_strategy
from neox_rl.search.strategy import Ask, Options, Strategy
from neox_rl.search.values import Value, ValueFailedError
from neox_rl.types import NO_NODE, End, Problem, Tree

T = TypeVar("T")
RETRIES = "retries"
AHEAD = 4


class Order(NamedTuple):
    """What the budget pays of an ask: ``ask.n`` steps of at most ``cap`` tokens. ``cut``: it paid for fewer than the strategy asked for."""

    ask: Ask
    cap: int
    cut: bool


class Grown(NamedTuple):
    """A tree, and the state of each of its nodes: its texts alone do not always tell it, a verdict that failed among them. ``error``: what
    it FAILED of."""

    tree: Tree
    states: tuple[State, ...]
    error: Exception | None = None


@dataclass(frozen=True)
class Search:
    """One way to search, over any problem. ``domain`` gives the space of a problem, ``strategy`` is a name of ``STRATEGIES``.

    What fails (NeoxRLError, OSError: a lost server, a passed deadline) is asked again, ``max_retries`` times; when it still fails the
    tree ends as FAILED with every node that was finished. A tree depends on the seed and on what proposer and value answer to it, not
    on timing or on what else runs. ``every_value``: the tree's steps are trained or labeled by their values, so each has one whatever the
    strategy reads; else one that reads none has only its ends scored.
    """

    strategy: str
    domain: Callable[[Problem], Domain]
    options: Options = field(default_factory=Options)
    seed: int = 0
    max_retries: int = 2
    every_value: bool = False

    async def run(self, problem: Problem, proposer: Proposer, value: Value, budget: Budget) -> Tree:
        """Raises ConfigError for a problem that the domain, the proposer or the value cannot handle."""
        return (await self.grown(problem, proposer, value, budget)).tree

    async def grown(self, problem: Problem, proposer: Proposer, value: Value, budget: Budget) -> Grown:
        """As ``run``."""
        strategy = make_strategy(self.strategy, self.options)
        growth = Growth(problem, self.domain(problem), budget, strategy.distinct, self.seed)
        failed: Exception | None = None
        try:
            tree = growth.tree(await self._grow(growth, strategy, proposer, value))
        except ConfigError:
            raise
        except (NeoxRLError, OSError) as error:
            failed, tree = error, growth.tree(End.FAILED, str(error) or repr(error))
        return Grown(tree, tuple(leaf.state for leaf in growth.nodes), failed)

    async def _grow(self, growth: Growth, strategy: Strategy, proposer: Proposer, value: Value) -> End:
        waiting: deque[Ask] = deque()
        if growth.nodes[0].ended:
            await self._persist(growth, lambda: growth.judge([0]))
            return End.EXHAUSTED if growth.goal == NO_NODE else End.SOLVED
        while growth.goal == NO_NODE:
            if growth.spent:
                return End.BUDGET
            if not waiting:
                waiting.extend(asks_for(strategy.pick(growth), proposer))
            if not waiting:
                return End.BUDGET if growth.withheld else End.EXHAUSTED
            await self._round(growth, strategy, proposer, value, affordable(waiting, growth, proposer.step_tokens))
        return End.SOLVED

    async def _round(self, growth: Growth, strategy: Strategy, proposer: Proposer, value: Value, orders: Sequence[Order]) -> None:
        """Expands the nodes of ``orders``. When one cannot be expanded the others are admitted and scored before its error is raised."""
        growth.begin_round()
        answers = await asyncio.gather(*(self._propose(growth, proposer, order) for order in orders), return_exceptions=True)
        before, added = len(growth.nodes), list[tuple[Ask, list[int]]]()
        for (ask, _, cut), answer in zip(orders, answers, strict=True):
            if not isinstance(answer, BaseException):
                growth.withheld |= cut and len(answer) >= ask.n  # with fewer there was no more to be had
                added.append((ask, attempts_admitted(growth, ask.node, answer) if ask.whole else growth.admit(ask.node, _flat(answer))))
        new = range(before, len(growth.nodes))
        await self._persist(growth, lambda: growth.judge(new))
        scored = new if self.every_value or strategy.reads_values else [i for i in new if growth.nodes[i].ended]
        try:
            await self._persist(growth, lambda: growth.score(scored, value))
        except ConfigError:
            raise
        except (NeoxRLError, OSError) as error:
            raise ValueFailedError(f"the search's value: {error or repr(error)}") from error
        for ask, children in added:
            strategy.add(growth, ask.node, children)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer

    async def _propose(self, growth: Growth, proposer: Proposer, order: Order) -> Sequence[Sequence[Proposal]]:
        """Chains of steps: of one step each, unless whole attempts were asked for."""
        ask, cap, _ = order
        position = growth.position(ask.node, f"propose/{ask.draw}")
        if ask.whole and isinstance(proposer, Attempter):
            return await self._persist(growth, lambda: proposer.attempt(position, ask.n, cap))
        return [[step] for step in await self._persist(growth, lambda: proposer.propose(position, ask.n, cap))]

    async def _persist(self, growth: Growth, attempt: Callable[[], Awaitable[T]]) -> T:
        for left in range(self.max_retries, -1, -1):
            try:
                return await attempt()
            except ConfigError:
                raise
            except (NeoxRLError, OSError):
                if not left:
                    raise
                growth.counts[RETRIES] += 1
        raise AssertionError("unreachable")


def asks_for(picked: Iterable[Ask], proposer: Proposer) -> Iterator[Ask]:
    """As the proposer can answer: one that writes no whole attempts is asked for as many first steps."""
    for ask in picked:
        if ask.whole and not isinstance(proposer, Attempter):
            yield from (Ask(ask.node, 1, draw) for draw in range(ask.n))
        else:
            yield ask


def attempts_admitted(growth: Growth, node: int, attempts: Sequence[Sequence[Proposal]]) -> list[int]:
    """Where the strategy may go on: the last step of each attempt that has not come to an end."""
    if not attempts:
        return growth.admit(node, ())
    return [tip for tip in (growth.admit_attempt(node, steps)[1] for steps in attempts) if tip != NO_NODE]


def _flat(chains: Sequence[Sequence[Proposal]]) -> list[Proposal]:
    return [step for chain in chains for step in chain]


def affordable(waiting: deque[Ask], growth: Growth, step_tokens: int) -> list[Order]:
    """Takes from ``waiting`` what the budget can pay at worst, at least one ask.

    The rest waits for what refused or short steps leave over. So no budget is exceeded, however many requests run at once. Whole attempts
    share all that is left.
    """
    taken: list[Order] = []
    nodes, tokens = growth.nodes_left, growth.tokens_left
    while waiting and nodes > 0:
        n, cap = min(waiting[0].n, nodes), step_tokens or UNBOUNDED
        if waiting[0].whole:
            if not taken:
                n = n if tokens is None else min(n, tokens)
                cap = min(nodes // n * cap, UNBOUNDED if tokens is None else tokens // n)
                taken.append(_order(waiting.popleft(), n, cap))
            break
        if tokens is not None and n * step_tokens > tokens:
            if taken:
                break
            cap = min(step_tokens, tokens)
            n = min(n, tokens // cap)
        taken.append(_order(waiting.popleft(), n, cap))
        nodes -= n
        tokens = None if tokens is None else tokens - n * step_tokens
    return taken


def _order(ask: Ask, n: int, cap: int) -> Order:
    return Order(ask._replace(n=n), cap, n < ask.n)


async def run_all(jobs: Iterable[Callable[[], Awaitable[T]]], parallel: int) -> AsyncIterator[T]:
    """The results of ``jobs`` in their order, ``parallel`` running at a time, a bounded number of them ahead of the first unfinished."""
    gate = asyncio.Semaphore(parallel)

    async def gated(job: Callable[[], Awaitable[T]]) -> T:
        async with gate:
            return await job()

    running: deque[asyncio.Task[T]] = deque()
    try:
        for job in jobs:
            running.append(asyncio.ensure_future(gated(job)))
            if len(running) >= AHEAD * parallel:
                yield await running.popleft()
        while running:
            yield await running.popleft()
    finally:
        for task in running:
            task.cancel()
