"""Turns admitted tickets into groups: as many at once as the admission rule allows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from neox_rl.batch.advantages import teaches
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import IMITATION
from neox_rl.errors import DeadlineError, NeoxRLError, ServerFailedError
from neox_rl.ports import GroupMaker
from neox_rl.problems.sources import ProblemCursor
from neox_rl.queue.book import Book
from neox_rl.queue.state import TicketQueue
from neox_rl.rollout.chunks import ChunkedGenerator
from neox_rl.run.pulse import Pulse
from neox_rl.run.unfinished import Unfinished
from neox_rl.telemetry.events import EventLog
from neox_rl.types import Group, Problem, SamplingParams

MAX_FAILURES = 3
"""Failed generations of one ticket before the run ends: by then it is not the server that is at fault."""
RETRY_S = 1.0
"""Before a ticket is handed on, twice as long each time: a server that died has ended by then, and the run names it."""


class RolloutPump:
    """``run`` issues tickets until cancelled; ``changed`` fires after every event that may complete a batch or admit a ticket.

    What it does is written down in ``book``, and while that cannot reach the disk no ticket is issued.
    """

    def __init__(
        self,
        config: RunConfig,
        book: Book,
        queue: TicketQueue,
        cursor: ProblemCursor,
        maker: GroupMaker,
        params: SamplingParams,
        events: EventLog,
        on_group: Callable[[Group, Problem], None],
        retry_s: float = RETRY_S,
    ) -> None:
        self._config, self._book, self._queue, self._cursor, self._params = config, book, queue, cursor, params
        self._unfinished = Unfinished(book)
        self._maker = maker.chunked(partial(ChunkedGenerator, flush_tokens=config.metarl.rollout.flush_tokens, record=self._unfinished))
        self._events, self._on_group, self._retry_s = events, on_group, retry_s
        self._positions: dict[int, int] = {}
        self.changed = Pulse()

    async def run(self) -> None:
        """Raises, in an ExceptionGroup, what a generation raises; a server's failure only after ``MAX_FAILURES`` of one ticket."""
        limit = self._config.metarl.rollout.max_inflight_groups or 1 << 30
        async with asyncio.TaskGroup() as tasks:
            while True:
                while self._may_issue(limit) and (ticket := self._queue.next_ticket()) is not None:
                    if ticket not in self._positions:
                        self._positions[ticket] = self._cursor.position
                        self._cursor.next()
                    self._book.add("issued", ticket=ticket, position=self._positions[ticket], live=self._queue.live_version)
                    tasks.create_task(self._make(ticket), name=f"group {ticket}")
                    self._events.instant("admitted", ticket=ticket, live=self._queue.live_version)
                await self.changed.wait()

    def open_problems(self) -> dict[str, int]:
        """Ticket -> the cursor's position of its problem, of tickets that were issued and not taken: for a checkpoint."""
        return {str(ticket): position for ticket, position in self._positions.items()}

    def restore_problems(self, positions: Mapping[int, int]) -> None:
        """The tickets that are issued again get the problems they had: none is passed over in its epoch."""
        self._positions = dict(positions)

    def problem(self, ticket: int) -> Problem | None:
        """Of an open ticket, where it has one."""
        return self._cursor.at(self._positions[ticket]) if ticket in self._positions else None

    def taken(self, groups: Sequence[Group]) -> dict[int, int]:
        """A step took these groups: their tickets are closed. Returns the positions that they had, where they are known."""
        return {group.ticket: self._positions.pop(group.ticket) for group in groups if group.ticket in self._positions}

    def _may_issue(self, limit: int) -> bool:
        return self._queue.num_in_flight < limit and not self._book.journal.full

    async def _make(self, ticket: int) -> None:
        problem = self._cursor.at(self._positions[ticket])
        started, begin = time.time_ns(), time.monotonic_ns()
        failures = self._queue.failures(ticket)
        try:
            with self._unfinished.attempt(ticket, anew=failures + 1 == MAX_FAILURES):  # it may fail of what it was answered
                group = await self._maker.group(problem, ticket, self._params, self._config.metarl.rollout.group_size)
        except (ServerFailedError, DeadlineError) as error:
            self._events.instant("error", ticket=ticket, message=str(error))
            await asyncio.sleep(self._retry_s * 2**failures)
            if failures + 1 >= MAX_FAILURES:
                raise NeoxRLError(f"ticket g{ticket:06d} failed {MAX_FAILURES} times, the last time so: {error}") from error
            self._queue.fail(ticket)
            self._book.add("failed", ticket=ticket)
        else:
            self._events.add_span("generate", started, time.monotonic_ns() - begin, ticket=ticket, **_sizes(group))
            self._accept(group, problem)
        self.changed.fire()

    def _accept(self, group: Group, problem: Problem) -> None:
        staleness = self._config.metarl.staleness
        imitated = self._config.metarl.objective.loss == IMITATION
        refusable = staleness.dynamic_sampling and self._queue.refusals(group.ticket) < staleness.max_refusals
        if refusable and not teaches(group.traces, imitated):
            self._queue.refuse(group.ticket)
            self._book.refused(group, self._positions.pop(group.ticket))  # another problem may teach something
            self._events.instant("refused", ticket=group.ticket)
        else:
            self._book.group(group)  # first: no step takes a group that is not in the book
            self._queue.deliver(group)
            self._on_group(group, problem)


def _sizes(group: Group) -> dict[str, list[Any]]:
    """Tokens of each rollout, and ``[version, tokens]`` of the longest in order: what a planner measures a server's speed by."""
    spans = [[(s.version, len(s.ids)) for s in trace.written if s.logprobs] for trace in group.traces]
    lengths = [sum(tokens for _, tokens in rollout) for rollout in spans]
    return {"lengths": lengths, "longest": spans[lengths.index(max(lengths))] if lengths else []}
