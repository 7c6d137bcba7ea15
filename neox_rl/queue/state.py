"""The queue as a pure state machine: no sockets, no clock. Versions, groups and steps are passed in.

    never issued --next_ticket--> in flight --deliver--> ready --take--> trained
                       ^              |                    ^
                       +-- to hand on <- refuse, fail      |
                               |---------preload-----------|
                               +--hold--> held --preload---+            release: held -> to hand on

A ticket leaves this path nowhere: nothing is dropped, nothing is trained twice. ``staleness.py`` has the rule and its proof.
The lower two lines are for recovery: a group that the journal has is ready at once, or held while it is not known whether the policy that
made it exists in this timeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

from neox_rl.errors import ConfigError, StalenessError
from neox_rl.queue import staleness
from neox_rl.types import NO_VERSION, Group, Json

MAX_NAMED = 8
"""Tickets that a message names before it says how many more there are."""


class Mode(StrEnum):
    """What a step waits for beyond B ready groups: nothing, or every ticket whose deadline has come."""

    TOKEN = "token"
    STRICT = "strict"


@dataclass(slots=True)
class Counts:
    """Events since the start of the run, over all resumes. A handed-on ticket is issued again."""

    issued: int = 0
    delivered: int = 0
    refused: int = 0
    failed: int = 0
    trained: int = 0


class TicketQueue:
    """Groups on their way from admission to the step that trains them. Every call that breaks the rule raises StalenessError.

    ``groups_per_step`` is B, ``admission_slack`` eta, ``delivery_slack`` rho. ``num_steps`` bounds the tickets: B * num_steps
    are ever issued, so that a run ends with nothing generated for nothing. Two writers are not supported: one event loop owns it.
    """

    def __init__(self, groups_per_step: int, admission_slack: int, delivery_slack: int, mode: str, num_steps: int) -> None:
        if groups_per_step < 1 or admission_slack < 0 or delivery_slack < 0 or num_steps < 0:
            raise ConfigError(
                f"groups_per_step {groups_per_step} must be >= 1; admission_slack {admission_slack}, delivery_slack {delivery_slack} "
                f"and num_steps {num_steps} must be >= 0"
            )
        self.groups_per_step = groups_per_step
        self.admission_slack = admission_slack
        self.delivery_slack = delivery_slack
        self.mode = Mode(mode)
        self.num_steps = num_steps
        self.counts = Counts()
        self._live = NO_VERSION
        self._step = 0
        self._fresh = 0  # the smallest ticket never issued
        self._again: set[int] = set()  # tickets to hand on
        self._in_flight: set[int] = set()
        self._held: set[int] = set()
        self._ready: dict[int, Callable[[], Group]] = {}
        self._refusals: dict[int, int] = {}
        self._failures: dict[int, int] = {}

    @property
    def bound(self) -> int:
        """S, in optimizer steps."""
        return staleness.bound(self.admission_slack, self.delivery_slack)

    @property
    def live_version(self) -> int:
        """The newest version that every server serves, -1 before v0."""
        return self._live

    @property
    def step(self) -> int:
        """The last step that took its batch; 0 before the first."""
        return self._step

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    @property
    def groups_dropped(self) -> int:
        """Tickets issued that are in no state and came to no end. 0, or the books are wrong."""
        counts = self.counts
        left = len(self._in_flight) + len(self._ready) + len(self._held)
        return counts.issued - counts.refused - counts.failed - counts.trained - left

    @property
    def groups_trained_twice(self) -> int:
        """Groups handed to steps, minus tickets that have left the queue. 0, or the books are wrong."""
        return self.counts.trained - (self._fresh - len(self._open()))

    def refusals(self, ticket: int) -> int:
        """Refusals in a row of an open ticket, for the limit after which its group is accepted as it is."""
        return self._refusals.get(ticket, 0)

    def failures(self, ticket: int) -> int:
        """Failed generations of an open ticket, for the limit after which the run stops."""
        return self._failures.get(ticket, 0)

    def set_live(self, version: int) -> None:
        """Every server now serves ``version``. Versions never fall, and v(s) exists only after step s took its batch."""
        if version < self._live:
            raise StalenessError(f"live version fell from v{self._live} to v{version}: a server serves old weights; restart it")
        if version > self._step:
            raise StalenessError(
                f"v{version} is said to be live, but only {self._step} steps took a batch: the servers hold another run's weights"
            )
        self._live = version

    def next_ticket(self) -> int | None:
        """Issues the smallest admissible ticket, handed-on ones included; None when the rule admits none now."""
        ticket = min(self._again) if self._again else self._fresh
        if ticket >= self.groups_per_step * self.num_steps:
            return None
        if not staleness.admissible(ticket, self._live, self.groups_per_step, self.admission_slack):
            return None
        if self._again:
            self._again.remove(ticket)
        else:
            self._fresh += 1
        self._in_flight.add(ticket)
        self.counts.issued += 1
        return ticket

    def deliver(self, group: Group) -> None:
        """A group in flight is ready. Raises StalenessError if its tokens are older than its admission allows, or not yet made."""
        self._require_in_flight(group.ticket, "deliver")
        self._require_possible(group.ticket, {s.version for t in group.traces for s in t.segments if s.version != NO_VERSION})
        self._in_flight.remove(group.ticket)
        self._ready[group.ticket] = lambda: group
        self.counts.delivered += 1

    def preload(self, ticket: int, versions: Iterable[int], load: Callable[[], Group]) -> None:
        """The group of an open ticket is there from before, with tokens of ``versions``: ready. ``load`` gives it when a step takes it."""
        self._require_possible(ticket, versions)
        self._leave_waiting(ticket, "preload")
        self._ready[ticket] = load

    def allows(self, ticket: int, versions: Iterable[int]) -> bool:
        """Whether tokens of these versions can be the ticket's. Not where they were made with greater slacks than the run has now."""
        oldest = staleness.oldest_version(ticket, self.groups_per_step, self.admission_slack)
        newest = self.num_steps
        if self.mode is Mode.STRICT:
            oldest = max(oldest, self._step - staleness.bound(self.admission_slack, self.delivery_slack))
            newest = ticket // self.groups_per_step + self.delivery_slack  # its deadline is the step that makes the next one
        return all(oldest <= version <= newest for version in versions)

    def hold(self, ticket: int) -> None:
        """An open ticket is not issued again for now: what was made for it may be of use once a version is published again."""
        if ticket not in self._again:
            raise self._wrong(ticket, "hold", "waiting to be handed on")
        self._leave_waiting(ticket, "hold")
        self._held.add(ticket)

    def release(self, ticket: int) -> None:
        """A held ticket is handed on after all."""
        if ticket not in self._held:
            raise self._wrong(ticket, "release", "held")
        self._held.remove(ticket)
        self._again.add(ticket)
        self.counts.failed += 1

    @property
    def held(self) -> frozenset[int]:
        return frozenset(self._held)

    def are_ready(self, tickets: Iterable[int]) -> bool:
        return self._ready.keys() >= set(tickets)

    def refuse(self, ticket: int) -> None:
        """Dynamic sampling refuses the group of ``ticket`` in flight: the ticket is handed on to a fresh problem."""
        self._hand_on(ticket, "refuse")
        self._refusals[ticket] = self._refusals.get(ticket, 0) + 1
        self.counts.refused += 1

    def fail(self, ticket: int) -> None:
        """Generation of ``ticket`` failed: the ticket is handed on."""
        self._hand_on(ticket, "fail")
        self._failures[ticket] = self._failures.get(ticket, 0) + 1
        self.counts.failed += 1

    def take(self, step: int, tickets: Sequence[int] = ()) -> tuple[Group, ...] | None:
        """The batch of ``step``: the B smallest-numbered ready tickets, in order; None while the step has to wait.

        ``tickets``: those that this step took before it was undone, and that are all ready: it takes the same ones again.
        Steps come in order, each once. Raises StalenessError otherwise: a batch is never handed out twice.
        """
        if step != self._step + 1 or step > self.num_steps:
            raise StalenessError(f"step {step} asks for a batch, but the next is step {self._step + 1} of {self.num_steps}")
        if tickets and (len(set(tickets)) != self.groups_per_step or not self.are_ready(tickets)):
            raise StalenessError(f"step {step} cannot take {_names(tickets)} again: they are not {self.groups_per_step} ready groups")
        if not tickets:
            if len(self._ready) < self.groups_per_step or self._overdue(step):
                return None
            tickets = sorted(self._ready)[: self.groups_per_step]
        batch = tuple(self._ready.pop(ticket)() for ticket in tickets)
        for ticket in tickets:
            self._refusals.pop(ticket, None)
            self._failures.pop(ticket, None)
        self._step = step
        self.counts.trained += len(batch)
        return batch

    def waiting_for(self, step: int) -> str:
        """What ``take(step)`` waits for, in words: tickets by name, or the version that would admit them."""
        if overdue := self._overdue(step):
            text = f"{_names(overdue)}, due by step {step}"
        elif (missing := self.groups_per_step - len(self._ready)) > 0:
            text = f"{missing} of {self.groups_per_step} groups; in flight: {_names(self._in_flight)}"
        else:
            return "nothing"
        ticket = min(self._again) if self._again else self._fresh
        if not self._in_flight and not staleness.admissible(ticket, self._live, self.groups_per_step, self.admission_slack):
            needed = staleness.oldest_version(ticket, self.groups_per_step, self.admission_slack)
            text += f"; the servers must first serve v{needed} (live: {'none' if self._live < 0 else f'v{self._live}'})"
        return text

    def snapshot(self) -> dict[str, Json]:
        """The state between two steps, for a checkpoint. Open tickets are named, not their groups: they are generated again."""
        tickets: list[Json] = [*sorted(self._open())]
        return {
            "groups_per_step": self.groups_per_step,
            "step": self._step,
            "fresh": self._fresh,
            "open": tickets,
            "counts": {**asdict(self.counts)},
        }

    def restore(self, state: Mapping[str, Json], refusals: Mapping[int, int] | None = None) -> None:
        """Continues from ``snapshot()``: its open tickets are issued again, first. The live version must be attested anew.

        Slacks, mode and ``num_steps`` may differ from those of the snapshot, B may not. Raises ConfigError.
        """
        step, fresh, tickets, counts = _checked(state, self.groups_per_step)
        if self._fresh:
            raise StalenessError(f"restore after {self._fresh} tickets were issued: a queue is restored before its first ticket")
        self._step, self._fresh, self._again = step, fresh, set(tickets)
        self._refusals = dict(refusals or {})
        ended = counts.refused + counts.failed + counts.trained
        issued = max(counts.issued, ended)  # fewer where the journal lost records
        self.counts = Counts(issued, counts.delivered, counts.refused, counts.failed + issued - ended, counts.trained)

    def _overdue(self, step: int) -> list[int]:
        """Tickets that are not ready though their deadline is ``step`` or earlier; none in token mode."""
        if self.mode is Mode.TOKEN:
            return []
        due = staleness.num_due(step, self.groups_per_step, self.delivery_slack)
        return sorted(t for t in {*self._again, *self._in_flight, *self._held, *range(self._fresh, due)} if t < due)

    def _open(self) -> set[int]:
        return {*self._again, *self._in_flight, *self._held, *self._ready}

    def _leave_waiting(self, ticket: int, event: str) -> None:
        """From held, or from the tickets to hand on, where ``restore`` counted it as failed."""
        if ticket in self._held:
            self._held.remove(ticket)
        elif ticket in self._again:
            self._again.remove(ticket)
            self.counts.failed -= 1
        else:
            raise self._wrong(ticket, event, "waiting to be handed on, or held")

    def _require_possible(self, ticket: int, versions: Iterable[int]) -> None:
        found = sorted(versions)
        floor = staleness.oldest_version(ticket, self.groups_per_step, self.admission_slack)
        if found and (found[0] < floor or found[-1] > self._step):
            raise StalenessError(
                f"group {name(ticket)} has tokens of v{found[0]} to v{found[-1]}; it was admitted at v{floor} or later and "
                f"v{self._step} is the newest there can be: a server attests versions that were not live"
            )

    def _hand_on(self, ticket: int, event: str) -> None:
        self._require_in_flight(ticket, event)
        self._in_flight.remove(ticket)
        self._again.add(ticket)

    def _require_in_flight(self, ticket: int, event: str) -> None:
        if ticket not in self._in_flight:
            raise self._wrong(ticket, event, "in flight")

    def _wrong(self, ticket: int, event: str, needed: str) -> StalenessError:
        places = {"in flight": self._in_flight, "ready already": self._ready, "waiting to be handed on": self._again, "held": self._held}
        closed = "trained already" if 0 <= ticket < self._fresh else "not issued yet"
        state = next((place for place, tickets in places.items() if ticket in tickets), closed)
        return StalenessError(f"{event} {name(ticket)}: it is {state}; it must be {needed}")


def name(ticket: int) -> str:
    """The one name of a ticket everywhere, e.g. ``g000017``."""
    return f"g{ticket:06d}"


def _names(tickets: Iterable[int]) -> str:
    ordered = sorted(tickets)
    more = len(ordered) - MAX_NAMED
    return (", ".join(name(t) for t in ordered[:MAX_NAMED]) or "none") + (f" and {more} more" if more > 0 else "")


def _checked(state: Mapping[str, Json], groups_per_step: int) -> tuple[int, int, list[int], Counts]:
    """``(step, fresh, open tickets, counts)`` of a snapshot that can be one. Raises ConfigError."""
    match state:
        case {
            "groups_per_step": int() as saved,
            "step": int() as step,
            "fresh": int() as fresh,
            "open": list() as raw,
            "counts": {"issued": int() as i, "delivered": int() as d, "refused": int() as r, "failed": int() as f, "trained": int() as t},
        }:
            tickets = [k for k in raw if isinstance(k, int) and 0 <= k < fresh]
        case _:
            raise ConfigError(f"queue state in the checkpoint is not a snapshot: {str(state)[:200]}")
    if saved != groups_per_step:
        raise ConfigError(f"the checkpoint has rollout.groups_per_step = {saved}, the config {groups_per_step}: set it back to {saved}")
    if len(set(tickets)) != len(raw) or fresh - len(raw) != step * saved or t != step * saved:
        raise ConfigError(f"queue state in the checkpoint does not add up: step {step}, {fresh} tickets, {len(raw)} open, {t} trained")
    return step, fresh, tickets, Counts(i, d, r, f, t)
