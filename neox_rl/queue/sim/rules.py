"""Other delivery rules beside the project's own, under one bound and one law of lengths."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from neox_rl.queue import staleness
from neox_rl.queue.sim.books import Outcome
from neox_rl.queue.sim.cluster import Cluster, NewQueue
from neox_rl.queue.sim.scenario import Scenario
from neox_rl.queue.state import Mode, TicketQueue
from neox_rl.types import Group


class FirstReady(TicketQueue):
    """For comparison: admission by S alone, groups trained in the order they become ready, none masked.

    With ``drop_beyond`` a group with any token older than S when its turn comes is thrown away and its ticket generated afresh.
    """

    def __init__(self, groups_per_step: int, bound: int, num_steps: int, drop_beyond: bool = False) -> None:
        super().__init__(groups_per_step, bound, 0, Mode.TOKEN, num_steps)
        self._drop_beyond = drop_beyond
        self.dropped: list[Group] = []

    def take(self, step: int, tickets: Sequence[int] = ()) -> tuple[Group, ...] | None:
        if self._drop_beyond:
            self._drop(step)
        if len(self._ready) < self.groups_per_step:
            return None
        first = list(self._ready)[: self.groups_per_step]  # in the order of delivery
        self._step = step
        self.counts.trained += len(first)
        return tuple(self._ready.pop(ticket)() for ticket in first)

    def _drop(self, step: int) -> None:
        for group in [load() for load in self._ready.values()]:
            if step - 1 - min(t.oldest_version for t in group.traces) > self.bound:
                del self._ready[group.ticket]
                self._in_flight.add(group.ticket)
                self.refuse(group.ticket)
                self.dropped.append(group)


def compare(scenario: Scenario, admission_slack: int, delivery_slack: int) -> dict[str, Outcome]:
    """Every rule under one bound S = admission_slack + delivery_slack and the same law of rollout lengths, by name."""
    B, steps = scenario.groups_per_step, scenario.num_steps
    S = staleness.bound(admission_slack, delivery_slack)
    ours: dict[str, NewQueue] = {
        "token": partial(TicketQueue, B, admission_slack, delivery_slack, Mode.TOKEN, steps),
        "strict": partial(TicketQueue, B, admission_slack, delivery_slack, Mode.STRICT, steps),
        "in order": partial(TicketQueue, B, S, 0, Mode.STRICT, steps),
        "synchronous": partial(TicketQueue, B, 0, 0, Mode.STRICT, steps),
    }
    others: dict[str, NewQueue] = {
        "admission only": partial(FirstReady, B, S, steps),
        "drop stale": partial(FirstReady, B, S, steps, drop_beyond=True),
    }
    outcomes = {name: Cluster(scenario, queue, masks=name == "token").run() for name, queue in ours.items()}
    return outcomes | {name: Cluster(scenario, queue, masks=False, guards=False).run() for name, queue in others.items()}
