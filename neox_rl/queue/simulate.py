"""A discrete-event simulation of the queue: the real TicketQueue against other delivery rules, in seconds instead of GPU days.

Time is in optimizer steps (training one batch takes 1). Each group is one rollout; it samples at a constant rate for a
long-tailed time, switches to a new version in mid-flight the moment it goes live, and its group carries the version of every token.
What is not modeled: the throughput of the servers (every admitted ticket starts at once), pauses, and groups of several rollouts.
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from neox_rl.ages import beyond, count_ages, token_ages
from neox_rl.errors import NeoxRLError
from neox_rl.queue import staleness
from neox_rl.queue.state import Mode, TicketQueue
from neox_rl.types import Finish, Group, Reason, Role, Segment, Trace, Verdict

VERDICT = Verdict(True, "", Reason.MATCH, 0.0)


@dataclass(frozen=True, slots=True)
class Scenario:
    """``mean_rollout_steps`` is the mean time of a rollout in steps; ``sigma`` the spread of its log-normal law
    (at 0.9 one rollout in a hundred takes more than eight steps)."""

    num_steps: int = 400
    groups_per_step: int = 16
    mean_rollout_steps: float = 1.5
    sigma: float = 0.9
    publish_delay_steps: float = 0.1
    tokens_per_step: int = 40  # tokens that one rollout samples in the time of one optimizer step
    refuse_frac: float = 0.0
    fail_frac: float = 0.0
    seed: int = 1


@dataclass(slots=True)
class Outcome:
    """Counts in tokens, times in steps. ``long_frac``: of the tokens in the longest tenth of the rollouts, the share that got gradient."""

    tokens_generated: int = 0
    tokens_consumed: int = 0
    tokens_beyond: int = 0
    tokens_masked: int = 0
    tokens_dropped: int = 0
    max_staleness: int = -1
    idle: float = 0.0
    elapsed: float = 0.0
    long_frac: float = 0.0

    @property
    def beyond_frac(self) -> float:
        """Of the tokens consumed, those that got gradient though older than S."""
        return self.tokens_beyond / max(1, self.tokens_consumed)

    @property
    def masked_frac(self) -> float:
        return self.tokens_masked / max(1, self.tokens_consumed)

    @property
    def dropped_frac(self) -> float:
        """Of the tokens generated in finished rollouts, those of rollouts thrown away."""
        return self.tokens_dropped / max(1, self.tokens_generated)

    @property
    def idle_frac(self) -> float:
        return self.idle / max(self.elapsed, 1e-9)


class FirstReady(TicketQueue):
    """For comparison: admission by S alone, groups trained in the order they become ready, none masked.

    With ``drop_beyond`` a group with any token older than S when its turn comes is thrown away and its ticket generated afresh.
    """

    def __init__(self, groups_per_step: int, bound: int, num_steps: int, drop_beyond: bool = False) -> None:
        super().__init__(groups_per_step, bound, 0, Mode.TOKEN, num_steps)
        self._drop_beyond = drop_beyond
        self.dropped: list[Group] = []

    def take(self, step: int) -> tuple[Group, ...] | None:
        if self._drop_beyond:
            self._drop(step)
        if len(self._ready) < self.groups_per_step:
            return None
        first = list(self._ready)[: self.groups_per_step]  # in the order of delivery
        self._step = step
        self.counts.trained += len(first)
        return tuple(self._ready.pop(ticket) for ticket in first)

    def _drop(self, step: int) -> None:
        for group in list(self._ready.values()):
            if step - 1 - min(t.oldest_version for t in group.traces) > self.bound:
                self._in_flight.add(self._ready.pop(group.ticket).ticket)
                self.refuse(group.ticket)
                self.dropped.append(group)


def compare(scenario: Scenario, admission_slack: int, delivery_slack: int) -> dict[str, Outcome]:
    """Every rule under one bound S = admission_slack + delivery_slack and the same law of rollout lengths, by name."""
    B, steps = scenario.groups_per_step, scenario.num_steps
    S = staleness.bound(admission_slack, delivery_slack)
    token = TicketQueue(B, admission_slack, delivery_slack, Mode.TOKEN, steps)
    others = {
        "strict": TicketQueue(B, admission_slack, delivery_slack, Mode.STRICT, steps),
        "admission only": FirstReady(B, S, steps),
        "drop stale": FirstReady(B, S, steps, drop_beyond=True),
        "in order": TicketQueue(B, S, 0, Mode.STRICT, steps),
        "synchronous": TicketQueue(B, 0, 0, Mode.STRICT, steps),
    }
    outcomes = {"token": Simulation(scenario, token, masks=True).run()}
    return outcomes | {name: Simulation(scenario, queue, masks=False).run() for name, queue in others.items()}


class Simulation:
    """One run of a scenario under one queue. ``run`` raises NeoxRLError on a deadlock, naming what the trainer waits for."""

    def __init__(self, scenario: Scenario, queue: TicketQueue, masks: bool) -> None:
        self.scenario, self.queue, self._masks = scenario, queue, masks
        self.outcome = Outcome()
        self._rng = random.Random(scenario.seed)
        self._now = self._idle_since = 0.0
        self._training = False
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._switches: list[float] = []  # when v0, v1, ... went live
        self._lengths: list[tuple[int, int]] = []  # of every trained rollout: tokens, tokens with gradient

    def run(self) -> Outcome:
        self._at(0.0, lambda: self._live(0))
        while self._events:
            self._now, _, event = heapq.heappop(self._events)
            event()
            self._admit()
            self._train()
        if self.queue.step < self.scenario.num_steps:
            raise NeoxRLError(f"deadlock at step {self.queue.step + 1}: {self.queue.waiting_for(self.queue.step + 1)}")
        self.outcome.elapsed = self._now
        dropped = self.queue.dropped if isinstance(self.queue, FirstReady) else []
        self.outcome.tokens_dropped = sum(_num_sampled(g) for g in dropped)
        self._lengths += [(_num_sampled(g), 0) for g in dropped]
        longest = sorted(self._lengths)[-max(1, len(self._lengths) // 10) :]
        self.outcome.long_frac = sum(used for _, used in longest) / sum(total for total, _ in longest)
        return self.outcome

    def _at(self, time: float, event: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time, self._num_events, event))

    def _live(self, version: int) -> None:
        self.queue.set_live(version)
        self._switches.append(self._now)

    def _admit(self) -> None:
        mean, sigma = self.scenario.mean_rollout_steps, self.scenario.sigma
        while (ticket := self.queue.next_ticket()) is not None:
            duration = mean * self._rng.lognormvariate(-(sigma**2) / 2, sigma)  # this mu gives the mean asked for
            self._at(self._now + duration, partial(self._finish, ticket, self._now))

    def _finish(self, ticket: int, start: float) -> None:
        group = self._group(ticket, start)
        self.outcome.tokens_generated += _num_sampled(group)
        draw = self._rng.random()
        if draw < self.scenario.fail_frac:
            self.queue.fail(ticket)
        elif draw < self.scenario.fail_frac + self.scenario.refuse_frac:
            self.queue.refuse(ticket)
        else:
            self.queue.deliver(group)

    def _group(self, ticket: int, start: float) -> Group:
        """One rollout sampled from ``start`` until now, cut where versions went live."""
        first = bisect_right(self._switches, start) - 1
        edges = [start, *self._switches[first + 1 :], self._now]
        rate = self.scenario.tokens_per_step
        counts = [int(rate * (b - start)) - int(rate * (a - start)) for a, b in pairwise(edges)]
        counts[-1] += not sum(counts)  # a rollout has at least one token
        segments = tuple(Segment((0,) * n, Role.THINK, (0.0,) * n, first + i, 1.0) for i, n in enumerate(counts) if n)
        return Group(ticket, "p", (Trace(f"g{ticket:06d}/r0", "p", segments, 1.0, Finish.STOP, VERDICT),))

    def _train(self) -> None:
        step = self.queue.step + 1
        if self._training or step > self.scenario.num_steps or (batch := self.queue.take(step)) is None:
            return
        self._training = True
        self.outcome.idle += self._now - self._idle_since
        self._count(batch, step)
        self._at(self._now + 1.0, lambda: self._trained(step))

    def _trained(self, step: int) -> None:
        self._training, self._idle_since = False, self._now
        if step < self.scenario.num_steps:
            self._at(self._now + self.scenario.publish_delay_steps, lambda: self._live(step))

    def _count(self, batch: tuple[Group, ...], step: int) -> None:
        outcome, bound = self.outcome, self.queue.bound
        for trace in (t for group in batch for t in group.traces):
            ages = token_ages(trace, step)
            trained = count_ages([ages[~beyond(ages, bound)] if self._masks else ages])
            outcome.tokens_consumed += len(ages)
            outcome.tokens_beyond += sum(tokens for age, tokens in trained.items() if age > bound)
            outcome.tokens_masked += len(ages) - sum(trained.values())
            outcome.max_staleness = max([outcome.max_staleness, *trained])
            self._lengths.append((len(ages), sum(trained.values())))


def _num_sampled(group: Group) -> int:
    return sum(trace.num_tokens for trace in group.traces)
