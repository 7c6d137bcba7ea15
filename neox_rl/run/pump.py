"""Turns admitted tickets into groups: as many at once as the admission rule allows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError, DeadlineError, NeoxRLError
from neox_rl.problems.sources import ProblemCursor
from neox_rl.queue.state import TicketQueue
from neox_rl.rollout.groups import Attempts, rewards_differ
from neox_rl.rollout.vllm_client import ServerFailedError
from neox_rl.run.pulse import Pulse
from neox_rl.telemetry.events import EventLog
from neox_rl.types import Group, Json, Problem, SamplingParams

MAX_FAILURES = 3
"""Failed generations of one ticket before the run ends: by then it is not the server that is at fault."""
RETRY_S = 1.0
"""Before a ticket is handed on, twice as long each time: a server that died has ended by then, and the run names it."""


@dataclass
class PumpCounts:
    """Since the start of the run, resumes included. Tokens and rollouts of refused groups are counted too."""

    tokens_generated: int = 0
    rollouts: int = 0
    rollouts_refused: int = 0

    def restore(self, saved: PumpCounts) -> None:
        self.tokens_generated, self.rollouts, self.rollouts_refused = saved.tokens_generated, saved.rollouts, saved.rollouts_refused


class RolloutPump:
    """``run`` issues tickets until cancelled; ``changed`` fires after every event that may complete a batch or admit a ticket."""

    def __init__(
        self,
        config: RunConfig,
        queue: TicketQueue,
        cursor: ProblemCursor,
        attempts: Attempts,
        params: SamplingParams,
        events: EventLog,
        on_group: Callable[[Group, Problem], None],
        retry_s: float = RETRY_S,
    ) -> None:
        self._config, self._queue, self._cursor, self._attempts, self._params = config, queue, cursor, attempts, params
        self._events, self._on_group, self._retry_s = events, on_group, retry_s
        self.counts = PumpCounts()
        self._positions: dict[int, int] = {}
        self.changed = Pulse()

    async def run(self) -> None:
        """Raises, in an ExceptionGroup, what a generation raises; a server's failure only after ``MAX_FAILURES`` of one ticket."""
        limit = self._config.metarl.rollout.max_inflight_groups or 1 << 30
        async with asyncio.TaskGroup() as tasks:
            while True:
                while self._queue.num_in_flight < limit and (ticket := self._queue.next_ticket()) is not None:
                    tasks.create_task(self._make(ticket), name=f"group {ticket}")
                    self._events.instant("admitted", ticket=ticket, live=self._queue.live_version)
                await self.changed.wait()

    def open_problems(self) -> dict[str, int]:
        """Ticket -> the cursor's position of its problem, of tickets that were issued and not taken: for a checkpoint."""
        return {str(ticket): position for ticket, position in self._positions.items()}

    def restore_problems(self, saved: Mapping[str, Json]) -> None:
        """The tickets that are issued again get the problems they had: none is passed over in its epoch. Raises ConfigError."""
        for ticket, position in saved.items():
            if not ticket.isdecimal() or type(position) is not int or position < 0:
                raise ConfigError(
                    f"the checkpoint's problem of ticket {ticket!r} is {position!r}: must be a position; take another checkpoint"
                )
            self._positions[int(ticket)] = position

    def taken(self, groups: Sequence[Group]) -> None:
        """A step took these groups: their tickets are closed."""
        for group in groups:
            self._positions.pop(group.ticket, None)

    async def _make(self, ticket: int) -> None:
        if ticket not in self._positions:
            self._positions[ticket] = self._cursor.position
            self._cursor.next()
        problem = self._cursor.at(self._positions[ticket])
        started, begin = time.time_ns(), time.monotonic_ns()
        try:
            group = await self._attempts.group(problem, ticket, self._params, self._config.metarl.rollout.group_size)
        except (ServerFailedError, DeadlineError) as error:
            self._events.instant("error", ticket=ticket, message=str(error))
            failures = self._queue.failures(ticket)
            await asyncio.sleep(self._retry_s * 2**failures)
            if failures + 1 >= MAX_FAILURES:
                raise NeoxRLError(f"ticket g{ticket:06d} failed {MAX_FAILURES} times, the last time so: {error}") from error
            self._queue.fail(ticket)
        else:
            self._events.add_span("generate", started, time.monotonic_ns() - begin, ticket=ticket, **_sizes(group))
            self._accept(group, problem)
        self.changed.fire()

    def _accept(self, group: Group, problem: Problem) -> None:
        self.counts.rollouts += len(group.traces)
        self.counts.tokens_generated += sum(len(s.ids) for t in group.traces for s in t.segments if s.logprobs)
        staleness = self._config.metarl.staleness
        refusable = staleness.dynamic_sampling and self._queue.refusals(group.ticket) < staleness.max_refusals
        if refusable and not rewards_differ(group.traces):
            self._queue.refuse(group.ticket)
            del self._positions[group.ticket]  # another problem may teach something
            self.counts.rollouts_refused += len(group.traces)
            self._events.instant("refused", ticket=group.ticket)
        else:
            self._queue.deliver(group)
            self._on_group(group, problem)


def _sizes(group: Group) -> dict[str, list[Any]]:
    """Tokens of each rollout, and ``[version, tokens]`` of the longest in order: what a planner measures a server's speed by."""
    spans = [[(s.version, len(s.ids)) for s in trace.segments if s.logprobs] for trace in group.traces]
    lengths = [sum(tokens for _, tokens in rollout) for rollout in spans]
    return {"lengths": lengths, "longest": spans[lengths.index(max(lengths))] if lengths else []}
